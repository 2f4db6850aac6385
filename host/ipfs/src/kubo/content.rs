//! Owns files of a Kubo daemon. It receives files to pin and paths to read, and returns verified files.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use cid::Cid;
use dim_model::ident::ContentPath;
use serde::Deserialize;

use super::rpc::{Call, Rpc};
use crate::unixfs::{self, Blocks};
use crate::{BackendError, Content};

/// The maximum size of a block, in bytes. Bitswap transfers no block larger than 2 MiB.
const MAX_BLOCK: usize = 4 << 20;

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
