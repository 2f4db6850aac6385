//! IPNS names: publishes under the host's keys and reads any name.

use std::time::Duration;

use bytes::Bytes;
use reqwest::Method;
use serde::Deserialize;
use serde_json::json;

use crate::ClientError;
use crate::http::Http;

/// Access to IPNS names through a host.
#[derive(Clone, Debug)]
pub struct Ipns {
    http: Http,
}

/// A name after a publish.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Published {
    /// The key of the name.
    pub key: String,
    /// The name, `k51…`.
    pub name: String,
    /// The path that the name points to: `/ipfs/CID` or `/ipns/NAME`.
    pub path: String,
    /// The number of this value of the name. It increases with each value.
    pub sequence: u64,
    /// Whether the backend accepted the value. If not, the value is committed and the host retries.
    pub published: bool,
}

/// The record of a name that the host knows.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Resolution {
    /// The name in canonical form, `k51…`.
    pub name: String,
    /// The path that the name points to.
    pub path: String,
    /// The record's sequence number, or for a name of the host the number of its value.
    pub sequence: u64,
    /// The end of the record's validity.
    pub valid_until: jiff::Timestamp,
    /// The last time at which the backend confirmed the record. An old time means that the record may be stale.
    pub confirmed_at: jiff::Timestamp,
}

#[derive(Deserialize)]
struct KeyId {
    name: String,
}

impl Ipns {
    pub(crate) fn new(http: Http) -> Self {
        Self { http }
    }

    /// Points the name of `key` at `path`. The host creates the key if it does not exist.
    ///
    /// The record is valid for `lifetime`, from one minute to one year (default 24 h). The host renews it after half of
    /// that time. Returns when the value is committed and the backend has accepted it, at the latest after 20 s.
    pub async fn publish(
        &self,
        key: &str,
        path: &str,
        lifetime: Option<Duration>,
    ) -> Result<Published, ClientError> {
        let body = json!({ "path": path });
        self.http.send_json(Method::PUT, &["keys", key, "path"], &query(lifetime), &body).await
    }

    /// Stores `data`, at most 16 MiB, as a file and points the name of `key` at it, like [`Ipns::publish`].
    pub async fn update_state(
        &self,
        key: &str,
        data: impl Into<Bytes>,
        lifetime: Option<Duration>,
    ) -> Result<Published, ClientError> {
        self.http.send_bytes(Method::PUT, &["keys", key, "state"], &query(lifetime), data).await
    }

    /// Resolves a name or a key of the host.
    pub async fn resolve(&self, name: &str) -> Result<Resolution, ClientError> {
        self.http.get(&["names", bare(name)], &[]).await
    }

    /// Returns the file of a name or of a key of the host.
    pub async fn get_state(&self, name: &str) -> Result<Bytes, ClientError> {
        self.http.bytes(self.http.request(Method::GET, &["names", bare(name), "state"])?).await
    }

    /// Returns the name of a key. The host creates the key if it does not exist.
    pub async fn get_key_id(&self, key: &str) -> Result<String, ClientError> {
        let id: KeyId = self.http.send_bytes(Method::PUT, &["keys", key], &[], Bytes::new()).await?;
        Ok(id.name)
    }
}

fn query(lifetime: Option<Duration>) -> Vec<(&'static str, String)> {
    lifetime.map(|lifetime| ("lifetime_seconds", lifetime.as_secs().to_string())).into_iter().collect()
}

fn bare(name: &str) -> &str {
    name.strip_prefix("/ipns/").unwrap_or(name)
}
