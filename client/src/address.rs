//! Where a host's API is: the socket in its state directory, or a loopback address.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use reqwest::Url;

use crate::{ClientError, masked};

/// The name of the API's socket inside a host's state directory.
pub const SOCKET: &str = "api.sock";

/// The name of the file inside a host's state directory that holds the token of its API over TCP.
pub const TOKEN: &str = "api-token";

/// Where a host's API is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// Plain HTTP.
    Http(Url),
}

impl Address {
    /// Whether it is on this machine.
    pub fn is_loopback(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Http(url) => match url.host_str() {
                Some("localhost") => true,
                host => {
                    let ip = host.and_then(|host| host.trim_matches(['[', ']']).parse::<IpAddr>().ok());
                    ip.is_some_and(|ip| ip.is_loopback())
                }
            },
        }
    }

    /// The socket of the host whose state is in `state_dir`.
    pub fn in_state_dir(state_dir: &Path) -> Self {
        Self::Unix(state_dir.join(SOCKET))
    }
}

impl FromStr for Address {
    type Err = ClientError;

    /// Reads `unix:PATH`, `/unix/PATH`, `/PATH` or `http://HOST:PORT`.
    fn from_str(text: &str) -> Result<Self, ClientError> {
        let refuse = || ClientError::Address(masked(text));
        if text.starts_with("http://") {
            let url = Url::parse(text).ok().filter(|url| url.path() == "/" && url.query().is_none());
            return url.map(Self::Http).ok_or_else(refuse);
        }
        if let Some(path) = text.strip_prefix("/unix/") {
            return Ok(Self::Unix(format!("/{path}").into()));
        }
        let path = text.strip_prefix("unix:").or_else(|| text.starts_with('/').then_some(text));
        path.filter(|path| !path.is_empty()).map(|path| Self::Unix(path.into())).ok_or_else(refuse)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Http(url) => f.write_str(masked(url.as_str()).trim_end_matches('/')),
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
            ("/unixes/api.sock", "unix:/unixes/api.sock"),
            ("http://127.0.0.1:7080/", "http://127.0.0.1:7080"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), shown);
        }
        for (text, is_here) in
            [("http://[::1]:7080", true), ("http://localhost:1", true), ("http://127.0.0.1.example:1", false)]
        {
            assert_eq!(text.parse::<Address>().unwrap().is_loopback(), is_here, "{text}");
        }
        for text in ["", "unix:", "127.0.0.1:7080", "https://127.0.0.1", "http://", "http://127.0.0.1/v1"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
