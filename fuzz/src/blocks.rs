//! Fuzzes the reader of UnixFS files with chosen blocks.
//!
//! The first byte selects the codec of the first block. The blocks follow, separated by `\n--\n`. A block that contains
//! `#CID` and one more byte refers to a later block with that number: these five bytes and the next 31 are replaced by
//! its CID. So bytes can describe a graph.

use std::collections::BTreeMap;

use async_trait::async_trait;
use bytes::Bytes;
use cid::Cid;
use cid::multihash::Multihash;
use dim_ipfs::BackendError;
use dim_ipfs::unixfs::{Blocks, read_file};
use sha2::{Digest as _, Sha256};

use crate::{APART, parts};

const LIMIT: usize = 1 << 20;

/// The placeholder of a CID.
const PLACE: &[u8] = b"#CID";

/// Length of a CIDv1 with SHA-256, in bytes.
const CID_BYTES: usize = 36;

struct Known(BTreeMap<Cid, Bytes>);

#[async_trait]
impl Blocks for Known {
    async fn block(&self, cid: &Cid) -> Result<Bytes, BackendError> {
        self.0.get(cid).cloned().ok_or_else(|| BackendError::NotFound(cid.to_string()))
    }
}

/// Reads the first block as a file, and the paths `a` and `a/b` below it.
pub fn run(data: &[u8]) {
    let Some((how, data)) = data.split_first() else { return };
    let codec = |byte: u8| if byte.is_multiple_of(2) { 0x70 } else { 0x55 };
    let parts = parts(data);
    let mut known: BTreeMap<Cid, Bytes> = BTreeMap::new();
    let mut cids: Vec<Option<Cid>> = vec![None; parts.len()];
    for number in (0..parts.len()).rev() {
        let block = filled(parts[number], &cids);
        let cid = cid_of(codec(if number == 0 { *how } else { parts[number].len() as u8 }), &block);
        cids[number] = Some(cid);
        known.insert(cid, block.into());
    }
    let Some(root) = cids.first().copied().flatten() else { return };
    let blocks = Known(known);
    for path in [format!("/ipfs/{root}"), format!("/ipfs/{root}/a"), format!("/ipfs/{root}/a/b")] {
        let path = path.parse().expect("a path");
        let read = read_file(&blocks, &path, LIMIT);
        match futures::executor::block_on(read) {
            Ok((_, file)) => assert!(file.len() <= LIMIT, "more than was asked for"),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}

fn cid_of(codec: u64, block: &[u8]) -> Cid {
    Cid::new_v1(codec, Multihash::wrap(0x12, &Sha256::digest(block)).expect("32 bytes fit"))
}

fn filled(block: &[u8], cids: &[Option<Cid>]) -> Vec<u8> {
    let mut block = block.to_vec();
    for at in 0..block.len().saturating_sub(CID_BYTES - 1) {
        if !block[at..].starts_with(PLACE) {
            continue;
        }
        let number = usize::from(block[at + PLACE.len()].wrapping_sub(b'0'));
        if let Some(Some(cid)) = cids.get(number) {
            block[at..at + CID_BYTES].copy_from_slice(&cid.to_bytes());
        }
    }
    block
}

/// Returns a single block, a file of two blocks, and a directory with a file.
pub fn seeds() -> Vec<Vec<u8>> {
    let place = |number: u8| [PLACE, &[b'0' + number], &[b'-'; CID_BYTES - 5]].concat();
    // Protocol buffers: a link has a hash, a name and a size; a node has its links, then its data.
    let link = |number: u8, name: &str, size: u8| {
        let link = [
            &[0x0a, CID_BYTES as u8],
            place(number).as_slice(),
            &[0x12, name.len() as u8],
            name.as_bytes(),
            &[0x18, size],
        ]
        .concat();
        [&[0x12, link.len() as u8], link.as_slice()].concat()
    };
    let node = |links: Vec<Vec<u8>>, data: &[u8]| {
        [links.concat(), [&[0x0a, data.len() as u8], data].concat()].concat()
    };
    let file = node(vec![link(1, "", 3), link(2, "", 3)], &[0x08, 2, 0x18, 6, 0x20, 3, 0x20, 3]);
    let directory = node(vec![link(1, "a", 3)], &[0x08, 1]);
    let inline = node(vec![], &[0x08, 2, 0x12, 2, b'h', b'i', 0x18, 2]);
    let blocks = |how: u8, blocks: &[&[u8]]| [&[how], blocks.join(APART).as_slice()].concat();
    vec![
        blocks(1, &[b"plain"]),
        blocks(0, &[&file, b"one", b"two"]),
        blocks(0, &[&directory, b"one"]),
        blocks(0, &[&inline]),
    ]
}
