//! Fuzz targets for the code that reads untrusted input. A target accepts any bytes. It panics if the code under test
//! panics or returns a wrong result.
//!
//! `fuzz/run` runs the targets with cargo-fuzz. The test suite runs each target on its corpus and on mutations of it.

pub mod api;
pub mod blocks;
pub mod bundles;
pub mod components;
pub mod config;
pub mod documents;
pub mod events;
pub mod heads;
pub mod heartbeats;
pub mod ipns_records;
pub mod job_events;
pub mod kubo;
pub mod manifests;
pub mod membership;
pub mod random_components;
pub mod scenarios;

mod fleet;

use std::path::{Path, PathBuf};

/// A fuzz target.
pub struct Target {
    /// The name of the target and of its corpus directory.
    pub name: &'static str,
    /// Runs the target on an input.
    pub run: fn(&[u8]),
    /// Returns the initial inputs of the corpus.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

macro_rules! targets {
    ($($name:ident),* $(,)?) => {
        /// All fuzz targets.
        pub const TARGETS: &[Target] =
            &[$(Target { name: stringify!($name), run: $name::run, seeds: $name::seeds },)*];
    };
}

targets![
    api,
    blocks,
    bundles,
    components,
    config,
    documents,
    events,
    heads,
    heartbeats,
    ipns_records,
    job_events,
    kubo,
    manifests,
    membership,
    random_components,
    scenarios,
];

impl Target {
    /// Returns the corpus directory of the target.
    pub fn corpus(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(self.name)
    }
}

/// The separator of the parts of an input.
const APART: &[u8] = b"\n--\n";

/// Splits an input into its parts.
fn parts(mut data: &[u8]) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    while let Some(at) = data.windows(APART.len()).position(|window| window == APART) {
        parts.push(&data[..at]);
        data = &data[at + APART.len()..];
    }
    parts.push(data);
    parts
}

/// Converts texts to seeds.
fn texts<const N: usize>(texts: [&str; N]) -> Vec<Vec<u8>> {
    texts.into_iter().map(|text| text.as_bytes().to_vec()).collect()
}
