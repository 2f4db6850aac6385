//! The address of a host's API: a Unix socket, or an HTTP URL.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use reqwest::Url;

use crate::{ClientError, masked};

/// The file name of the API's socket in the state directory of a host.
pub const SOCKET: &str = "api.sock";

/// The file name of the token for the API over TCP, in the state directory of a host.
pub const TOKEN: &str = "api-token";

/// The address of a host's API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// An HTTP URL without a path.
    Http(Url),
}

impl Address {
    /// Returns whether the address is on this machine: a socket, `localhost` or a loopback IP address.
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

    /// Returns the socket of the host with the state directory `state_dir`.
    pub fn in_state_dir(state_dir: &Path) -> Self {
        Self::Unix(state_dir.join(SOCKET))
    }
}

impl FromStr for Address {
    type Err = ClientError;

    /// Parses `unix:PATH`, `/unix/PATH`, `/PATH` or `http://HOST:PORT`. Any other text is a [`ClientError::Address`].
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
