//! Owns the input of the user: files, standard input, JSON and times. Reads at most one byte more than the host
//! accepts, so that the client refuses an input that is too large.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use anyhow::Context as _;
use clap::ValueEnum;
use dim_api::MAX_BODY;
use dim_model::time::Since;
use serde::de::DeserializeOwned;

/// Reads a file.
pub fn file(path: &Path) -> anyhow::Result<Vec<u8>> {
    File::open(path).and_then(bounded).with_context(|| format!("cannot read {}", path.display()))
}

/// Reads standard input to its end.
pub fn standard_input() -> anyhow::Result<Vec<u8>> {
    bounded(io::stdin().lock()).context("cannot read standard input")
}

/// The name of an enum value, as the API expects it.
pub fn word(value: impl ValueEnum) -> String {
    value.to_possible_value().expect("no value is hidden").get_name().to_owned()
}

/// Parses JSON on the command line. `Box<RawValue>` keeps the text unchanged.
pub fn json<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))
}

/// Parses JSON on the command line, or in the file after an `@`.
pub fn json_or_file<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let text = text_or_file(text)?;
    json(&text)
}

fn text_or_file(text: &str) -> Result<Cow<'_, str>, String> {
    let Some(path) = text.strip_prefix('@') else { return Ok(Cow::Borrowed(text)) };
    let bytes = file(path.as_ref()).map_err(|error| format!("{error:#}"))?;
    String::from_utf8(bytes).map(Cow::Owned).map_err(|error| format!("{path} is not JSON: {error}"))
}

/// Checks a time or a duration, and returns the text unchanged. The host parses it again, because a duration counts
/// from the host's clock.
pub fn since(text: &str) -> Result<String, String> {
    text.parse::<Since>().map(|_| text.to_owned())
}

fn bounded(input: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    input.take(MAX_BODY as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}
