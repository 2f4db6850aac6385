//! Owns files of a Kubo daemon. It receives files to pin and paths to read, and returns verified files.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use cid::Cid;
use dim_model::ident::ContentPath;
use reqwest::Body;
use serde::{Deserialize, Serialize};
use tokio_stream::wrappers::ReceiverStream;

use super::rpc::{Call, Rpc};
use crate::unixfs::{self, Blocks};
use crate::{BackendError, Content};

/// The maximum size of a block, in bytes. Bitswap transfers no block larger than 2 MiB.
const MAX_BLOCK: usize = 4 << 20;

/// The size from which on a piece of an archive is sent, in bytes.
const PIECE: usize = 256 << 10;

/// The number of pieces of an archive that wait to be sent.
const PIECES: usize = 4;

/// The files of a daemon.
#[derive(Debug)]
pub struct Files {
    rpc: Arc<Rpc>,
}

impl Files {
    pub fn new(rpc: Arc<Rpc>) -> Self {
        Self { rpc }
    }
}

/// Writes a number as an unsigned LEB128.
fn put_length(out: &mut Vec<u8>, mut length: usize) {
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
}

/// The header of a CAR of version 1 (<https://ipld.io/specs/transport/car/carv1/>).
fn archive_header(root: &Cid) -> Vec<u8> {
    #[derive(Serialize)]
    struct Header<'a> {
        roots: [&'a Cid; 1],
        version: u64,
    }
    let header = Header { roots: [root], version: 1 };
    let header = serde_ipld_dagcbor::to_vec(&header).expect("a map of plain fields");
    let mut out = Vec::new();
    put_length(&mut out, header.len());
    out.extend(header);
    out
}

/// A CAR of version 1 with one root. The blocks are read while it is sent.
fn archive(root: &Cid, blocks: crate::Blocks) -> Body {
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Bytes, BackendError>>(PIECES);
    let header = archive_header(root);
    tokio::task::spawn_blocking(move || {
        let mut piece = header;
        for block in blocks {
            let (cid, block) = match block {
                Ok(block) => block,
                Err(error) => {
                    // The request fails then. Its receiver may have gone.
                    let _ = sender.blocking_send(Err(error));
                    return;
                }
            };
            let cid = cid.to_bytes();
            put_length(&mut piece, cid.len() + block.len());
            piece.extend(cid);
            piece.extend(block);
            if piece.len() >= PIECE && sender.blocking_send(Ok(std::mem::take(&mut piece).into())).is_err() {
                return;
            }
        }
        let _ = sender.blocking_send(Ok(piece.into()));
    });
    Body::wrap_stream(ReceiverStream::new(receiver))
}

/// Checks that the daemon has stored data under the expected CID.
fn expect(call: &'static str, found: &str, cid: &Cid) -> Result<(), BackendError> {
    if Cid::try_from(found).ok().as_ref() == Some(cid) {
        return Ok(());
    }
    Err(BackendError::Unbelievable { call, why: format!("{found} instead of {cid}") })
}

#[async_trait]
impl Content for Files {
    async fn put(&self, cid: &Cid, data: Bytes) -> Result<(), BackendError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Added {
            hash: String,
        }
        // Data that is not the file must not reach the daemon: it may be the text of an encrypted document.
        expect("add", &unixfs::file_cid(&data).to_string(), cid)?;
        // The CID would depend on the daemon's config without these options.
        let call = Call::new("add")
            .option("cid-version", "1")
            .option("raw-leaves", "true")
            .option("chunker", format!("size-{}", unixfs::CHUNK))
            .option("hash", "sha2-256")
            .option("trickle", "false")
            .option("inline", "false")
            .option("wrap-with-directory", "false")
            .option("pin", "true")
            .option("progress", "false")
            .file(data);
        let added: Added = self.rpc.json(call).await?;
        expect("add", &added.hash, cid)
    }

    async fn file(&self, path: &ContentPath, limit: usize) -> Result<(Cid, Bytes), BackendError> {
        unixfs::read_file(self, path, limit).await
    }

    async fn is_pinned(&self, cid: &Cid) -> Result<bool, BackendError> {
        let call = Call::new("pin/ls").arg(cid.to_string()).option("type", "recursive");
        match self.rpc.bytes(call).await {
            Ok(_) => Ok(true),
            Err(BackendError::Refused { message, .. }) if message.contains("not pinned") => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn unpin(&self, cid: &Cid) -> Result<(), BackendError> {
        let call = Call::new("pin/rm").arg(cid.to_string()).option("recursive", "true");
        match self.rpc.bytes(call).await {
            Ok(_) => Ok(()),
            Err(BackendError::Refused { message, .. }) if message.contains("not pinned") => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn put_block(&self, cid: &Cid, block: Bytes) -> Result<(), BackendError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Put {
            key: String,
        }
        let call = Call::new("block/put")
            .option("cid-codec", "dag-cbor")
            .option("mhtype", "sha2-256")
            .option("pin", "false")
            .option("allow-big-block", "true")
            .file(block);
        let put: Put = self.rpc.json(call).await?;
        expect("block/put", &put.key, cid)
    }

    async fn pin_graph(
        &self,
        cid: &Cid,
        before: Option<&Cid>,
        timeout: Duration,
    ) -> Result<(), BackendError> {
        if let Some(before) = before {
            let update =
                Call::new("pin/update").arg(before.to_string()).arg(cid.to_string()).timeout(timeout);
            match self.rpc.bytes(update).await {
                Ok(_) => return Ok(()),
                // Another program has removed the pin, or the repository is another one.
                Err(BackendError::Refused { message, .. }) if message.contains("not recursively pinned") => {}
                Err(error) => return Err(error),
            }
        }
        self.rpc.bytes(Call::new("pin/add").arg(cid.to_string()).timeout(timeout)).await.map(drop)
    }

    async fn import_graph(
        &self,
        root: &Cid,
        blocks: crate::Blocks,
        timeout: Duration,
    ) -> Result<(), BackendError> {
        /// A line of the answer.
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Imported {
            root: Option<Pinned>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Pinned {
            pin_error_msg: String,
        }
        let call = Call::new("dag/import")
            .option("pin-roots", "true")
            .option("allow-big-block", "true")
            .option("fast-provide-root", "false")
            .timeout(timeout)
            .stream_file(archive(root, blocks));
        let answer = self.rpc.bytes(call).await?;
        let wrong = |why: String| BackendError::Unbelievable { call: "dag/import", why };
        for line in answer.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let imported: Imported =
                serde_json::from_slice(line).map_err(|error| wrong(error.to_string()))?;
            if let Some(Pinned { pin_error_msg: message }) = imported.root {
                let call = "dag/import";
                return if message.is_empty() {
                    Ok(())
                } else {
                    Err(BackendError::Refused { call, message })
                };
            }
        }
        Err(wrong("no root is pinned".to_owned()))
    }

    async fn block(&self, cid: &Cid, limit: usize, timeout: Duration) -> Result<Bytes, BackendError> {
        let call = Call::new("block/get").arg(cid.to_string()).timeout(timeout);
        let block = self.rpc.bytes_up_to(call, limit).await?;
        unixfs::verify(cid, &block)?;
        Ok(block)
    }
}

#[async_trait]
impl Blocks for Files {
    async fn block(&self, cid: &Cid) -> Result<Bytes, BackendError> {
        self.rpc.bytes_up_to(Call::new("block/get").arg(cid.to_string()), MAX_BLOCK).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_of_an_archive_is_that_of_the_specification() {
        let root = unixfs::raw_cid(b"");
        let mut expected = vec![0x3a, 0xa2, 0x65];
        expected.extend(b"roots");
        expected.extend([0x81, 0xd8, 0x2a, 0x58, 0x25, 0x00]);
        expected.extend(root.to_bytes());
        expected.push(0x67);
        expected.extend(b"version\x01");
        assert_eq!(archive_header(&root), expected);
        let lengths = [(0, vec![0]), (127, vec![127]), (128, vec![0x80, 1]), (300, vec![0xac, 2])];
        for (length, bytes) in lengths {
            let mut out = Vec::new();
            put_length(&mut out, length);
            assert_eq!(out, bytes);
        }
    }
}
