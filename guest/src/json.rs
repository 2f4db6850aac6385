//! Reads the JSON bodies and writes the JSON replies of commands and queries.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Refusal;

/// Reads the body of a command or query. A body that does not fit is [`Refusal::Invalid`].
pub fn read<T: DeserializeOwned>(body: &str) -> Result<T, Refusal> {
    serde_json::from_str(body).map_err(|error| Refusal::Invalid(error.to_string()))
}

/// Writes a reply as JSON.
pub fn write<T: Serialize + ?Sized>(reply: &T) -> Result<String, Refusal> {
    serde_json::to_string(reply).map_err(|error| Refusal::Other(error.to_string()))
}
