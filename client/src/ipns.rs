//! IPNS names: publishing under the host's keys, and reading any name.

use std::time::Duration;

use bytes::Bytes;
use reqwest::Method;
use serde::Deserialize;
use serde_json::json;

use crate::ClientError;
use crate::http::Http;

/// The names of a host.
#[derive(Clone, Debug)]
pub struct Ipns {
    http: Http,
}

/// A name that was given a new value.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Published {
    /// The key.
    pub key: String,
    /// Its name, `k51…`.
    pub name: String,
    /// What the name points to: `/ipfs/CID` or `/ipns/NAME`.
    pub path: String,
    /// Counts the values of the name.
    pub sequence: u64,
    /// Whether the backend has accepted it. If not, the value is committed and the host goes on trying.
    pub published: bool,
}

/// What is known of a name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Resolution {
    /// The name in canonical form, `k51…`.
    pub name: String,
    /// What it points to.
    pub path: String,
    /// The record's sequence; of a name of the host the count of its values.
    pub sequence: u64,
    /// When the record stops being valid.
    pub valid_until: jiff::Timestamp,
    /// When the host last had the record confirmed; long ago means stale.
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

    /// Points the name of `key` at `path`. The key is made if there is none; the record is valid for
    /// `lifetime`, a minute to a year (a day if none is given), and signed anew at half of it.
    ///
    /// Returns once the value is committed and the backend has accepted it, or after 20 s without.
    pub async fn publish(
        &self,
        key: &str,
        path: &str,
        lifetime: Option<Duration>,
    ) -> Result<Published, ClientError> {
        let body = json!({ "path": path });
        self.http.send_json(Method::PUT, &["keys", key, "path"], &query(lifetime), &body).await
    }

    /// Stores `data`, at most 16 MiB, as a file and points the name of `key` at it, as
    /// [`Ipns::publish`] does.
    pub async fn update_state(
        &self,
        key: &str,
        data: impl Into<Bytes>,
        lifetime: Option<Duration>,
    ) -> Result<Published, ClientError> {
        self.http.send_bytes(Method::PUT, &["keys", key, "state"], &query(lifetime), data).await
    }

    /// What a name, or a key of the host, points to.
    pub async fn resolve(&self, name: &str) -> Result<Resolution, ClientError> {
        self.http.get(&["names", bare(name)], &[]).await
    }

    /// The file behind a name, or behind a key of the host.
    pub async fn get_state(&self, name: &str) -> Result<Bytes, ClientError> {
        self.http.bytes(self.http.request(Method::GET, &["names", bare(name), "state"])?).await
    }

    /// The name that belongs to a key, which is made if there is none.
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
