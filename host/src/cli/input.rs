//! What the user hands over: files, standard input, JSON and times. Of what is more than a host takes there is a
//! byte too much, for the client to refuse.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use anyhow::Context as _;
use clap::ValueEnum;
use serde::de::DeserializeOwned;

use crate::api::MAX_BODY;
use crate::time::Since;

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

/// JSON on the command line: a value, or `Box<RawValue>` for what is passed on to the letter.
pub fn json<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))
}

/// JSON on the command line, or in a file after an @.
pub fn json_or_file<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let text = text_or_file(text)?;
    json(&text)
}

fn text_or_file(text: &str) -> Result<Cow<'_, str>, String> {
    let Some(path) = text.strip_prefix('@') else { return Ok(Cow::Borrowed(text)) };
    let bytes = file(path.as_ref()).map_err(|error| format!("{error:#}"))?;
    String::from_utf8(bytes).map(Cow::Owned).map_err(|error| format!("no JSON in {path}: {error}"))
}

/// From when on something is meant. The host reads it again: a duration counts by its clock.
pub fn since(text: &str) -> Result<String, String> {
    text.parse::<Since>().map(|_| text.to_owned())
}

fn bounded(input: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    input.take(MAX_BODY as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}
