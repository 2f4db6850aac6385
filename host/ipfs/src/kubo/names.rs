//! Owns IPNS names and keys of a Kubo daemon. It receives publications and names, and returns records and paths.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use dim_model::ident::{ContentPath, Domain, IpnsName, KeyName};
use dim_model::time::Timestamp;
use libp2p_identity::Keypair;
use serde::Deserialize;
use tokio::sync::Mutex;

use super::rpc::{Call, Rpc};
use crate::ipns_record::{MAX_RECORD, Record};
use crate::keys::Key;
use crate::{BackendError, Current, Names as Backend, Prepared, Publication, Published};

/// The time limit of a publish. The first publish of a new key on a public network takes 30 s.
const PUBLISH: Duration = Duration::from_secs(120);

/// The text with which a daemon refuses a sequence number that is not higher than that of its own record.
const NOT_GREATER: &str = "sequence number must be greater";

/// The text with which a daemon refuses a record whose sequence number is not higher than that of the one it finds.
const NOT_NEWER: &str = "existing IPNS record has sequence";

/// The names of a daemon.
#[derive(Debug)]
pub struct Names {
    rpc: Arc<Rpc>,
    /// Serializes publishes. A daemon publishes one name at a time, and waiting there would count for the time limit.
    publishing: Mutex<()>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Keys {
    keys: Vec<KeyInfo>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct KeyInfo {
    name: String,
    id: String,
}

impl Names {
    pub fn new(rpc: Arc<Rpc>) -> Self {
        Self { rpc, publishing: Mutex::new(()) }
    }

    async fn find(&self, key: &KeyName) -> Result<Option<IpnsName>, BackendError> {
        let keys = self.keys().await?;
        Ok(keys.into_iter().find(|(name, _)| name == key).map(|(_, name)| name))
    }

    async fn import(&self, name: &KeyName, pair: &Keypair) -> Result<(), BackendError> {
        let bytes = pair
            .to_protobuf_encoding()
            .map_err(|error| BackendError::Refused { call: "key/import", message: error.to_string() })?;
        let call = Call::new("key/import").arg(name.as_str()).file(Bytes::from(bytes));
        match self.rpc.bytes(call).await {
            Ok(_) => Ok(()),
            // A concurrent import was faster. The next list of the keys shows which key it was.
            Err(BackendError::Refused { message, .. }) if message.contains("already exists") => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn send(&self, publication: &Publication, sequence: Option<u64>) -> Result<(), BackendError> {
        // Without `resolve=false` the daemon waits for the content, possibly without end.
        let mut call = Call::new("name/publish")
            .arg(publication.path.as_str())
            .option("key", publication.key_name.as_str())
            .option("resolve", "false")
            .option("allow-offline", "true")
            .option("lifetime", format!("{}s", publication.lifetime.as_secs()))
            .option("ttl", format!("{}s", publication.ttl.as_secs().max(1)))
            .timeout(PUBLISH);
        if let Some(sequence) = sequence {
            call = call.option("sequence", sequence.to_string());
        }
        self.rpc.bytes(call).await.map(drop)
    }
}

#[async_trait]
impl Backend for Names {
    async fn keys(&self) -> Result<Vec<(KeyName, IpnsName)>, BackendError> {
        let keys: Keys = self.rpc.json(Call::new("key/list").option("ipns-base", "base36")).await?;
        let parsed =
            keys.keys.into_iter().filter_map(|key| Some((key.name.parse().ok()?, key.id.parse().ok()?)));
        Ok(parsed.collect())
    }

    async fn prepare(&self, name: &KeyName, key: &Key) -> Result<Prepared, BackendError> {
        let mut there = self.find(name).await?;
        if there.is_none() {
            let Key::Own(pair) = key else { return Ok(Prepared::Gone) };
            self.import(name, pair).await?;
            there = self.find(name).await?;
        }
        match there {
            Some(there) if there == key.name() => Ok(Prepared::Ready),
            Some(other) => Ok(Prepared::Taken(other)),
            None => Err(BackendError::Unbelievable {
                call: "key/import",
                why: format!("{name} is not listed after it"),
            }),
        }
    }

    async fn publish(&self, publication: &Publication) -> Result<Published, BackendError> {
        let _turn = self.publishing.lock().await;
        let name = publication.key.name();
        // The daemon itself increases the sequence number by one for a new value and keeps it for the same value. The
        // call has a number only if this is lower than the wanted one.
        let counts_to = |current: &Current| {
            current.sequence.unwrap_or(0).saturating_add(u64::from(current.path != publication.path))
        };
        let falls_short =
            publication.current.as_ref().is_none_or(|current| counts_to(current) < publication.sequence);
        let wanted = (falls_short && publication.sequence > 0).then_some(publication.sequence);
        match self.send(publication, wanted).await {
            // The daemon has a newer record than it returned. A daemon that runs offline returns no sequence number.
            Err(BackendError::Refused { message, .. }) if message.contains(NOT_GREATER) => {
                self.send(publication, None).await?;
            }
            sent => sent?,
        }
        let sequence = match self.current(&name).await {
            Ok(Some(Current { path, sequence: Some(sequence) })) if path == publication.path => sequence,
            // The daemon does not yet return the record that it just published.
            _ => publication.sequence,
        };
        Ok(Published { sequence, record: None })
    }

    async fn put(&self, name: &IpnsName, record: Bytes) -> Result<(), BackendError> {
        let call = Call::new("name/put").arg(name.as_str()).option("allow-offline", "true");
        match self.rpc.bytes(call.file(record).timeout(PUBLISH)).await {
            Err(BackendError::Refused { message, .. }) if message.contains(NOT_NEWER) => Ok(()),
            put => put.map(drop),
        }
    }

    async fn current(&self, name: &IpnsName) -> Result<Option<Current>, BackendError> {
        match self.record(name).await {
            Ok(bytes) => {
                // An expired record counts too, because the next one must have a higher number.
                let record = Record::verify(&bytes, name, Timestamp(0)).map_err(|error| {
                    BackendError::Unbelievable { call: "name/get", why: error.to_string() }
                })?;
                Ok(Some(Current { path: record.path, sequence: Some(record.sequence) }))
            }
            Err(BackendError::NotFound(_)) => Ok(None),
            Err(BackendError::Refused { message, .. }) if message.contains(OFFLINE) => {
                let path = self.resolve(&format!("/ipns/{name}")).await;
                path.map(|path| Some(Current { path, sequence: None })).or_else(absent)
            }
            Err(error) => Err(error),
        }
    }

    async fn dnslink(&self, domain: &Domain) -> Result<ContentPath, BackendError> {
        self.resolve(&format!("/ipns/{domain}")).await
    }

    async fn record(&self, name: &IpnsName) -> Result<Vec<u8>, BackendError> {
        let (path, limit) = (format!("/ipns/{name}"), MAX_RECORD);
        let record = self.rpc.bytes_up_to(Call::new("name/get").arg(&path), limit).await;
        Ok(record.map_err(|error| missing(error, &path))?.to_vec())
    }
}

impl Names {
    /// Resolves a name or a domain by one step.
    async fn resolve(&self, path: &str) -> Result<ContentPath, BackendError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Resolved {
            path: ContentPath,
        }
        let call = Call::new("name/resolve").arg(path).option("recursive", "false").option("nocache", "true");
        let resolved: Resolved = self.rpc.json(call).await.map_err(|error| missing(error, path))?;
        Ok(resolved.path)
    }
}

/// The text with which a daemon refuses a call that needs a network while it has none.
const OFFLINE: &str = "online mode";

/// Distinguishes a name without a record from a failed call.
fn missing(error: BackendError, path: &str) -> BackendError {
    match error {
        BackendError::Refused { message, .. }
            if message.contains("could not resolve name") || message.contains("not found") =>
        {
            BackendError::NotFound(path.to_owned())
        }
        other => other,
    }
}

fn absent<T>(error: BackendError) -> Result<Option<T>, BackendError> {
    match error {
        BackendError::NotFound(_) => Ok(None),
        other => Err(other),
    }
}
