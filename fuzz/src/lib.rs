//! What comes from outside, at random. Each target takes any bytes and fails by a panic: where the code that it
//! tries panics, and where what it answers cannot be right.
//!
//! `fuzz/run` has cargo-fuzz run them; the suite runs each over its corpus and over changes of it.

pub mod api;
pub mod blocks;
pub mod components;
pub mod config;
pub mod events;
pub mod heartbeats;
pub mod ipns_records;
pub mod job_events;
pub mod kubo;
pub mod manifests;
pub mod random_components;
pub mod scenarios;

mod fleet;

use std::path::{Path, PathBuf};

/// Something to try.
pub struct Target {
    /// Its name; its corpus lies under it.
    pub name: &'static str,
    /// Tries some bytes.
    pub run: fn(&[u8]),
    /// Where a corpus begins.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

macro_rules! targets {
    ($($name:ident),* $(,)?) => {
        /// All of them.
        pub const TARGETS: &[Target] =
            &[$(Target { name: stringify!($name), run: $name::run, seeds: $name::seeds },)*];
    };
}

targets![
    api,
    blocks,
    components,
    config,
    events,
    heartbeats,
    ipns_records,
    job_events,
    kubo,
    manifests,
    random_components,
    scenarios,
];

impl Target {
    /// The directory of its corpus.
    pub fn corpus(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(self.name)
    }
}

/// What lies between the parts of an input that has several.
const APART: &[u8] = b"\n--\n";

/// The parts of an input.
fn parts(mut data: &[u8]) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    while let Some(at) = data.windows(APART.len()).position(|window| window == APART) {
        parts.push(&data[..at]);
        data = &data[at + APART.len()..];
    }
    parts.push(data);
    parts
}

/// Texts as seeds.
fn texts<const N: usize>(texts: [&str; N]) -> Vec<Vec<u8>> {
    texts.into_iter().map(|text| text.as_bytes().to_vec()).collect()
}
