//! Owns the address of a daemon's RPC. It receives a multiaddr or a URL, with or without `/api/v0`, and returns a
//! checked address.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use dim_client::masked;
use multiaddr::{Multiaddr, Protocol};
use reqwest::Url;
use thiserror::Error;

/// The error of text that is not an address.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{text:?} is not the address of an IPFS API: {why}; write /ip4/127.0.0.1/tcp/5001, /dns4/HOST/tcp/5001, /unix/PATH or http://HOST:5001"
)]
pub struct AddressError {
    text: String,
    why: String,
}

/// The address of a daemon's RPC.
#[derive(Clone, PartialEq, Eq)]
pub enum Address {
    /// A TCP address. The URL has no path.
    Tcp(Url),
    /// A Unix socket.
    Unix(PathBuf),
}

impl Address {
    /// Returns the URL of a command, such as `id` or `pubsub/pub`.
    pub fn command(&self, command: &str) -> Url {
        let base = match self {
            Address::Tcp(url) => url.clone(),
            Address::Unix(_) => Url::parse("http://kubo.localhost").expect("a valid URL"),
        };
        base.join(&format!("/api/v0/{command}")).expect("commands are plain paths")
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let refuse = |why: String| AddressError { text: masked(text), why };
        let bare = text.trim_end_matches('/');
        let bare = bare.strip_suffix("/api/v0").unwrap_or(bare);
        if bare.starts_with('/') {
            return from_multiaddr(bare).map_err(refuse);
        }
        let url = Url::parse(bare).map_err(|error| refuse(error.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
            return Err(refuse("neither a multiaddr nor an http URL".to_owned()));
        }
        if url.path() != "/" {
            return Err(refuse("a path other than /api/v0".to_owned()));
        }
        Ok(Address::Tcp(url))
    }
}

fn from_multiaddr(text: &str) -> Result<Address, String> {
    // The path of a Unix socket is the rest of the multiaddr, including slashes. The library parses one segment only.
    if let Some(path) = text.strip_prefix("/unix/") {
        return Ok(Address::Unix(PathBuf::from(format!("/{}", path.trim_start_matches('/')))));
    }
    let address: Multiaddr = text.parse().map_err(|error: multiaddr::Error| error.to_string())?;
    let (mut host, mut port, mut scheme) = (None, None, "http");
    for protocol in &address {
        match protocol {
            Protocol::Ip4(ip) => host = Some(ip.to_string()),
            Protocol::Ip6(ip) => host = Some(format!("[{ip}]")),
            Protocol::Dns(name) | Protocol::Dns4(name) | Protocol::Dns6(name) => {
                host = Some(name.into_owned())
            }
            Protocol::Tcp(number) => port = Some(number),
            Protocol::Http => {}
            Protocol::Https | Protocol::Tls => scheme = "https",
            other => return Err(format!("{other} does not lead to an HTTP API")),
        }
    }
    let (Some(host), Some(port)) = (host, port) else { return Err("no host or no TCP port".to_owned()) };
    let url = Url::parse(&format!("{scheme}://{host}:{port}")).map_err(|error| error.to_string())?;
    Ok(Address::Tcp(url))
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Address({self})")
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(url) => f.write_str(masked(url.as_str()).trim_end_matches('/')),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_an_address_is_understood() {
        for (text, shown) in [
            ("/ip4/127.0.0.1/tcp/5001", "http://127.0.0.1:5001"),
            ("/ip4/127.0.0.1/tcp/5001/http", "http://127.0.0.1:5001"),
            ("/ip6/::1/tcp/5001", "http://[::1]:5001"),
            ("/dns4/kubo.internal/tcp/443/https", "https://kubo.internal"),
            ("http://127.0.0.1:5001", "http://127.0.0.1:5001"),
            ("http://127.0.0.1:5001/api/v0", "http://127.0.0.1:5001"),
            ("http://127.0.0.1:5001/api/v0/", "http://127.0.0.1:5001"),
            ("/ip4/127.0.0.1/tcp/5001/api/v0", "http://127.0.0.1:5001"),
        ] {
            assert_eq!(text.parse::<Address>().expect(text).to_string(), shown);
        }
        let unix: Address = "/unix/run/ipfs/api.sock".parse().unwrap();
        assert_eq!(unix, Address::Unix("/run/ipfs/api.sock".into()));
    }

    #[test]
    fn what_is_no_address_is_refused_with_examples() {
        for text in
            ["", "/", "127.0.0.1:5001", "/ip4/127.0.0.1", "/ip4/1.2.3/tcp/1", "ftp://x", "http://x/other"]
        {
            let error = text.parse::<Address>().expect_err(text).to_string();
            assert!(error.contains("/ip4/127.0.0.1/tcp/5001"), "{error}");
        }
    }

    #[test]
    fn a_password_in_an_address_is_sent_and_never_shown() {
        let address: Address = "http://ada:hush@127.0.0.1:5001".parse().unwrap();
        assert_eq!(address.to_string(), "http://***@127.0.0.1:5001");
        assert_eq!(address.command("id").as_str(), "http://ada:hush@127.0.0.1:5001/api/v0/id");
        for wrong in ["http://ada:hush@127.0.0.1/x", "http://ada:hu/sh@host", "ftp://ada:hush@host"] {
            let error = wrong.parse::<Address>().unwrap_err();
            assert!(!format!("{error} {address:?} {error:?}").contains("hush"), "{error} {address:?}");
        }
    }

    #[test]
    fn a_command_has_its_url() {
        let address: Address = "http://127.0.0.1:5001/api/v0".parse().unwrap();
        assert_eq!(address.command("pubsub/pub").as_str(), "http://127.0.0.1:5001/api/v0/pubsub/pub");
    }
}
