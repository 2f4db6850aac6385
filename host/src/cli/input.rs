//! What the user hands over: files, standard input, JSON and times. Of what is more than a host takes there is a
//! byte too much, for the client to refuse.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use anyhow::Context as _;
use clap::ValueEnum;
use jiff::Timestamp as Time;
use serde_json::Value;

use crate::api::MAX_BODY;
use crate::time::duration_of;

/// The content of a file.
pub fn file(path: &Path) -> anyhow::Result<Vec<u8>> {
    File::open(path).and_then(bounded).with_context(|| format!("cannot read {}", path.display()))
}

/// Standard input to its end.
pub fn standard_input() -> anyhow::Result<Vec<u8>> {
    bounded(io::stdin().lock()).context("cannot read standard input")
}

/// A value of a list as the API takes it.
pub fn word(value: impl ValueEnum) -> String {
    value.to_possible_value().expect("no value is hidden").get_name().to_owned()
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

/// A time, or a duration before now, as the API takes it.
pub fn since(text: &str) -> Result<String, String> {
    if let Ok(ago) = duration_of(text) {
        let since = Time::now().checked_sub(ago).map_err(|error| error.to_string())?;
        return Ok(since.to_string());
    }
    let time: Time =
        text.parse().map_err(|_| "write it like 2026-01-31T12:00:00Z, or 2h for the last two hours")?;
    Ok(time.to_string())
}

fn bounded(input: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    input.take(MAX_BODY as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}
