//! What the user hands over: files, standard input, JSON and durations. Of what is more than a host takes there is a
//! byte too much, for the client to refuse.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use anyhow::Context as _;
use serde_json::Value;

use crate::api::MAX_BODY;

/// The content of a file.
pub fn file(path: &Path) -> anyhow::Result<Vec<u8>> {
    File::open(path).and_then(bounded).with_context(|| format!("cannot read {}", path.display()))
}

/// Standard input to its end.
pub fn standard_input() -> anyhow::Result<Vec<u8>> {
    bounded(io::stdin().lock()).context("cannot read standard input")
}

/// JSON on the command line.
pub fn json(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))
}

/// JSON on the command line, or in a file after an @.
pub fn json_or_file(text: &str) -> Result<Value, String> {
    match text.strip_prefix('@') {
        Some(path) => {
            let bytes = file(path.as_ref()).map_err(|error| format!("{error:#}"))?;
            serde_json::from_slice(&bytes).map_err(|error| format!("no JSON in {path}: {error}"))
        }
        None => json(text),
    }
}

fn bounded(input: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    input.take(MAX_BODY as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}
