//! Owns UnixFS files. It computes the CID of a document, and reads a file block by block and verifies each block
//! against its CID.
//!
//! See <https://specs.ipfs.tech/unixfs/> and <https://ipld.io/specs/codecs/dag-pb/spec/>.

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use cid::Cid;
use cid::multihash::Multihash;
use dim_model::ident::ContentPath;
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use crate::BackendError;

/// The multicodec of raw bytes.
const RAW: u64 = 0x55;
/// The multicodec of a DAG-PB node.
const DAG_PB: u64 = 0x70;
/// The multihash code of SHA-256.
const SHA2_256: u64 = 0x12;
/// The multihash code of bytes that are their own hash.
const IDENTITY: u64 = 0x00;
/// The size of a leaf, in bytes.
pub const CHUNK: usize = 1 << 20;
/// The maximum number of blocks of a file. A hostile graph can repeat blocks.
const MAX_BLOCKS: usize = 70_000;
/// The maximum depth of a file's graph. Kubo's own balanced graphs have at most five levels.
const MAX_DEPTH: usize = 16;

/// Computes the CID of a file as `ipfs add` does, with CID version 1, raw leaves and chunks of 1 MiB.
pub fn file_cid(data: &[u8]) -> Cid {
    if data.len() <= CHUNK {
        return raw_cid(data);
    }
    let leaves = data.chunks(CHUNK).map(|chunk| (raw_cid(chunk), chunk.len() as u64)).collect();
    cid_of(DAG_PB, &node(leaves))
}

/// Computes the CID of a raw block.
pub fn raw_cid(data: &[u8]) -> Cid {
    cid_of(RAW, data)
}

fn cid_of(codec: u64, data: &[u8]) -> Cid {
    let digest = Sha256::digest(data);
    Cid::new_v1(codec, Multihash::wrap(SHA2_256, &digest).expect("32 bytes fit"))
}

fn node(leaves: Vec<(Cid, u64)>) -> Vec<u8> {
    let file = wire::UnixFs {
        kind: wire::FILE,
        data: None,
        file_size: Some(leaves.iter().map(|(_, size)| size).sum()),
        block_sizes: leaves.iter().map(|(_, size)| *size).collect(),
    };
    let link = |(cid, size): (Cid, u64)| wire::Link {
        hash: Some(cid.to_bytes()),
        name: Some(String::new()),
        size: Some(size),
    };
    let links = leaves.into_iter().map(link).collect();
    wire::Node { links, data: Some(file.encode_to_vec()) }.canonical()
}

/// Verifies a block against its CID.
pub fn verify(cid: &Cid, data: &[u8]) -> Result<(), BackendError> {
    let hash = cid.hash();
    let unbelievable = |why| Err(BackendError::Unbelievable { call: "reading a block", why });
    let matches = match hash.code() {
        SHA2_256 => hash.digest() == Sha256::digest(data).as_slice(),
        IDENTITY => hash.digest() == data,
        code => return unbelievable(format!("{cid} has the hash {code:#x}; only SHA-256 is supported")),
    };
    if matches { Ok(()) } else { unbelievable(format!("the bytes are not those of {cid}")) }
}

/// A source of blocks. Its blocks are not trusted.
#[async_trait]
pub trait Blocks: Send + Sync {
    /// Returns a block, unverified.
    async fn block(&self, cid: &Cid) -> Result<Bytes, BackendError>;
}

/// Reads the file at `path`, which can contain directories below the CID. It returns the CID of the file itself and
/// its content.
///
/// # Errors
/// The path does not lead to a file, the file is larger than `limit` bytes, or a block is not valid.
pub async fn read_file(
    blocks: &dyn Blocks,
    path: &ContentPath,
    limit: usize,
) -> Result<(Cid, Bytes), BackendError> {
    let (mut cid, below) = path.ipfs().ok_or_else(|| BackendError::NotFound(path.to_string()))?;
    for segment in below {
        cid = entry(blocks, &cid, segment).await?;
    }
    let mut reading = Reading { blocks, limit, data: BytesMut::new(), count: 0 };
    reading.read(cid).await?;
    Ok((cid, reading.data.freeze()))
}

async fn entry(blocks: &dyn Blocks, cid: &Cid, name: &str) -> Result<Cid, BackendError> {
    let block = fetch(blocks, cid).await?;
    let missing = || BackendError::NotFound(format!("{name} in {cid}"));
    if cid.codec() != DAG_PB {
        return Err(missing());
    }
    let (node, file) = parse(cid, &block)?;
    if file.kind != wire::DIRECTORY {
        return Err(unreadable(cid, &file));
    }
    let link = node.links.into_iter().find(|link| link.name.as_deref() == Some(name)).ok_or_else(missing)?;
    link_cid(cid, &link)
}

async fn fetch(blocks: &dyn Blocks, cid: &Cid) -> Result<Bytes, BackendError> {
    if cid.hash().code() == IDENTITY {
        return Ok(Bytes::copy_from_slice(cid.hash().digest()));
    }
    let block = blocks.block(cid).await?;
    verify(cid, &block)?;
    Ok(block)
}

struct Reading<'a> {
    blocks: &'a dyn Blocks,
    limit: usize,
    data: BytesMut,
    count: usize,
}

impl Reading<'_> {
    /// Reads the leaves in order. It uses a stack, because recursion on a hostile graph would exhaust the thread's
    /// stack.
    async fn read(&mut self, root: Cid) -> Result<(), BackendError> {
        let mut stack = vec![(root, 0)];
        while let Some((cid, depth)) = stack.pop() {
            self.count += 1;
            if self.count > MAX_BLOCKS || depth > MAX_DEPTH {
                let why = format!("{root} has too many blocks");
                return Err(BackendError::Unbelievable { call: "reading a file", why });
            }
            let block = fetch(self.blocks, &cid).await?;
            if cid.codec() == RAW {
                self.push(&root, &block)?;
                continue;
            }
            let (node, file) = parse(&cid, &block)?;
            if !matches!(file.kind, wire::FILE | wire::RAW) {
                return Err(unreadable(&cid, &file));
            }
            self.push(&root, file.data.as_deref().unwrap_or_default())?;
            for link in node.links.iter().rev() {
                stack.push((link_cid(&cid, link)?, depth + 1));
            }
        }
        Ok(())
    }

    fn push(&mut self, root: &Cid, data: &[u8]) -> Result<(), BackendError> {
        if self.data.len() + data.len() > self.limit {
            return Err(BackendError::TooLarge { what: format!("/ipfs/{root}"), limit: self.limit });
        }
        self.data.extend_from_slice(data);
        Ok(())
    }
}

fn parse(cid: &Cid, block: &[u8]) -> Result<(wire::Node, wire::UnixFs), BackendError> {
    let no = |what| BackendError::Unbelievable { call: "reading a file", why: format!("{cid} is no {what}") };
    if cid.codec() != DAG_PB {
        return Err(no("file: its codec is neither raw nor dag-pb"));
    }
    let node = wire::Node::decode(block).map_err(|_| no("DAG-PB node"))?;
    let data = node.data.as_deref().ok_or_else(|| no("UnixFS node"))?;
    let file = wire::UnixFs::decode(data).map_err(|_| no("UnixFS node"))?;
    Ok((node, file))
}

fn link_cid(cid: &Cid, link: &wire::Link) -> Result<Cid, BackendError> {
    let hash = link.hash.as_deref().unwrap_or_default();
    let why = || format!("{cid} contains a link that is not a CID");
    Cid::try_from(hash).map_err(|_| BackendError::Unbelievable { call: "reading a file", why: why() })
}

fn unreadable(cid: &Cid, file: &wire::UnixFs) -> BackendError {
    let what = match file.kind {
        wire::DIRECTORY => "a directory, not a file",
        wire::SHARD => "a sharded directory, which this host does not read",
        wire::FILE | wire::RAW => "a file, not a directory",
        _ => "of a kind that this host does not read",
    };
    BackendError::Unbelievable { call: "reading a file", why: format!("{cid} is {what}") }
}

/// The protocol buffers of DAG-PB and UnixFS.
mod wire {
    use prost::Message as _;

    pub const RAW: i32 = 0;
    pub const DIRECTORY: i32 = 1;
    pub const FILE: i32 = 2;
    pub const SHARD: i32 = 5;

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Link {
        #[prost(bytes = "vec", optional, tag = "1")]
        pub hash: Option<Vec<u8>>,
        #[prost(string, optional, tag = "2")]
        pub name: Option<String>,
        #[prost(uint64, optional, tag = "3")]
        pub size: Option<u64>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Node {
        #[prost(message, repeated, tag = "2")]
        pub links: Vec<Link>,
        #[prost(bytes = "vec", optional, tag = "1")]
        pub data: Option<Vec<u8>>,
    }

    impl Node {
        /// Encodes the node with the links before the data, as DAG-PB requires.
        pub fn canonical(self) -> Vec<u8> {
            let data = Node { links: Vec::new(), data: self.data }.encode_to_vec();
            let mut bytes = Node { links: self.links, data: None }.encode_to_vec();
            bytes.extend(data);
            bytes
        }
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct UnixFs {
        // The specification requires this field, so it is written even if it has the default value.
        #[prost(int32, required, tag = "1")]
        pub kind: i32,
        #[prost(bytes = "vec", optional, tag = "2")]
        pub data: Option<Vec<u8>>,
        #[prost(uint64, optional, tag = "3")]
        pub file_size: Option<u64>,
        #[prost(uint64, repeated, packed = "false", tag = "4")]
        pub block_sizes: Vec<u64>,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_files_have_the_cid_that_kubo_gives_them() {
        // `ipfs add --cid-version=1 --raw-leaves` of nothing and of "hello world\n".
        let nothing = "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku";
        let hello = "bafkreifjjcie6lypi6ny7amxnfftagclbuxndqonfipmb64f2km2devei4";
        assert_eq!(file_cid(b"").to_string(), nothing);
        assert_eq!(file_cid(b"hello world\n").to_string(), hello);
    }

    #[test]
    fn a_block_that_is_not_what_its_cid_says_is_refused() {
        assert!(verify(&raw_cid(b"right"), b"right").is_ok());
        assert!(verify(&raw_cid(b"right"), b"wrong").is_err());
    }
}
