//! Where a host's API is: the socket in its state directory, or a loopback address.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use reqwest::Url;

use crate::ClientError;

/// The name of the API's socket inside a host's state directory.
pub const SOCKET: &str = "api.sock";

/// Where a host's API is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// Plain HTTP.
    Http(Url),
}

impl Address {
    /// The socket of the host whose state is in `state_dir`.
    pub fn in_state_dir(state_dir: &Path) -> Self {
        Self::Unix(state_dir.join(SOCKET))
    }
}

impl FromStr for Address {
    type Err = ClientError;

    /// Reads `unix:PATH`, `/unix/PATH`, `/PATH` or `http://HOST:PORT`.
    fn from_str(text: &str) -> Result<Self, ClientError> {
        if text.starts_with("http://") {
            return Url::parse(text).map(Self::Http).map_err(|_| ClientError::Address(text.to_owned()));
        }
        let path = text.strip_prefix("unix:").or_else(|| text.strip_prefix("/unix"));
        match path.or_else(|| text.starts_with('/').then_some(text)) {
            Some(path) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(ClientError::Address(text.to_owned())),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Http(url) => f.write_str(url.as_str().trim_end_matches('/')),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_spelling_is_understood_and_others_are_refused() {
        for (text, shown) in [
            ("unix:/run/dim/api.sock", "unix:/run/dim/api.sock"),
            ("/unix/run/dim/api.sock", "unix:/run/dim/api.sock"),
            ("/run/dim/api.sock", "unix:/run/dim/api.sock"),
            ("http://127.0.0.1:7080/", "http://127.0.0.1:7080"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), shown);
        }
        for text in ["", "unix:", "127.0.0.1:7080", "https://127.0.0.1", "http://"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
