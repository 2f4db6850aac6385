//! Owns the border to what stands behind content, names and pubsub. Domain types in and out; the
//! backends know neither plugins nor WebAssembly.

pub mod embedded;
pub mod kubo;
pub mod record;
pub mod unixfs;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use cid::Cid;
use futures::Stream;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::contact::Contact;
use crate::ident::{ContentPath, Domain, InvalidWord, IpnsName, KeyName, PeerName, Root, Topic};
use crate::keys::Key;
use crate::time::Timestamp;

use record::Record;

/// Why a backend could not do what it was asked.
#[derive(Debug, Error)]
pub enum BackendError {
    /// It cannot be reached; it may be later.
    #[error("{what} cannot be reached: {why}")]
    Unreachable {
        /// What.
        what: String,
        /// Why.
        why: String,
    },
    /// It broke off; what was asked may have happened.
    #[error("the answer of {call} broke off: {why}")]
    Interrupted {
        /// Which call.
        call: &'static str,
        /// Why.
        why: String,
    },
    /// It did not answer in time; what was asked may have happened.
    #[error("{0} did not answer in time")]
    Timeout(&'static str),
    /// It refused.
    #[error("{call} was refused: {message}")]
    Refused {
        /// Which call.
        call: &'static str,
        /// What it said.
        message: String,
    },
    /// What it said cannot be understood or is not true.
    #[error("{call} answered what cannot be believed: {why}")]
    Unbelievable {
        /// Which call.
        call: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// There is no such thing.
    #[error("{0} was not found")]
    NotFound(String),
    /// More bytes than can be held.
    #[error("{what} is larger than {limit} bytes")]
    TooLarge {
        /// What.
        what: String,
        /// The limit in bytes.
        limit: usize,
    },
    /// The host's own store failed.
    #[error("the store failed: {0}")]
    Store(String),
}

impl BackendError {
    /// Whether what was asked has certainly not happened.
    pub fn certainly_not_sent(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Refused { .. })
    }

    /// Whether the daemon itself has given up after the time that it was given: it has looked, and found nothing.
    pub fn is_deadline_of_daemon(&self) -> bool {
        matches!(self, Self::Refused { message, .. } if message.contains("deadline exceeded"))
    }
}

/// Files by their CID. Calls may take as long as the network does.
#[async_trait]
pub trait Content: Send + Sync + 'static {
    /// Stores a file whose CID is `cid` for others to read.
    async fn put(&self, cid: &Cid, data: Bytes) -> Result<(), BackendError>;

    /// Reads the file at a path of at most `limit` bytes, checked against its CID, which comes too.
    async fn file(&self, path: &ContentPath, limit: usize) -> Result<(Cid, Bytes), BackendError>;

    /// Whether someone has the backend hold a file already.
    async fn is_pinned(&self, cid: &Cid) -> Result<bool, BackendError>;

    /// Stops holding a file that something newer has taken the place of.
    async fn unpin(&self, cid: &Cid) -> Result<(), BackendError>;
}

/// IPNS names. Calls may take as long as the network does.
#[async_trait]
pub trait Names: Send + Sync + 'static {
    /// Makes sure that the backend can publish under `key`; says whose it is if it had it before.
    async fn prepare(&self, name: &KeyName, key: &Key) -> Result<Prepared, BackendError>;

    /// Publishes. Called for one name at a time; the newest value is asked for again until this
    /// succeeds.
    async fn publish(&self, publication: &Publication) -> Result<Published, BackendError>;

    /// The newest record that the backend finds, in its stored form; the caller checks it.
    async fn record(&self, name: &IpnsName) -> Result<Vec<u8>, BackendError>;

    /// What one of the host's own names points to as far as the backend knows; none if it knows no record. Unlike
    /// [`Names::record`] it also answers while the backend is cut off from the network.
    async fn current(&self, name: &IpnsName) -> Result<Option<Current>, BackendError>;

    /// What the DNSLink record of a domain points to. See <https://dnslink.org>.
    async fn dnslink(&self, domain: &Domain) -> Result<ContentPath, BackendError>;

    /// The names of the keys that the backend had before the host came.
    async fn keys(&self) -> Result<Vec<(KeyName, IpnsName)>, BackendError>;
}

/// Whether a backend can publish under a key.
#[derive(Debug, PartialEq, Eq)]
pub enum Prepared {
    /// It can.
    Ready,
    /// It has another key of that name.
    Taken(IpnsName),
    /// It has no such key, and the host cannot give it the private half: the key was adopted.
    Gone,
}

/// What a backend knows to be published under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Current {
    /// What the record points to.
    pub path: ContentPath,
    /// The record's sequence number; none where the backend does not show the record itself.
    pub sequence: Option<u64>,
}

/// A value to publish under a name.
#[derive(Clone, Debug)]
pub struct Publication {
    /// The key's name.
    pub key_name: KeyName,
    /// The key.
    pub key: Key,
    /// What the name points to.
    pub path: ContentPath,
    /// The sequence number that the record should have; a backend may know of a higher one.
    pub sequence: u64,
    /// What the backend knew to be published just before.
    pub current: Option<Current>,
    /// How long the record is valid.
    pub lifetime: Duration,
    /// How long others may keep the record before they ask again.
    pub ttl: Duration,
}

/// What was published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// The record's sequence number.
    pub sequence: u64,
    /// The signed record, where it was signed here.
    pub record: Option<Vec<u8>>,
}

/// A message as it comes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// The sender's bytes.
    pub data: Bytes,
    /// Who signed it.
    pub from: PeerName,
    /// The sender's sequence number, as bytes.
    pub sequence: Bytes,
}

/// The messages of a topic until the stream ends or fails.
pub type Messages = Pin<Box<dyn Stream<Item = Result<Incoming, BackendError>> + Send>>;

/// Topics. Calls may take as long as the network does.
#[async_trait]
pub trait Pubsub: Send + Sync + 'static {
    /// Publishes. Called for one message at a time.
    async fn publish(&self, topic: &Topic, data: Bytes) -> Result<(), BackendError>;

    /// Subscribes; returns once messages would be heard.
    async fn subscribe(&self, topic: &Topic) -> Result<Messages, BackendError>;

    /// The peers that are known on a topic.
    async fn peers(&self, topic: &Topic) -> Result<Vec<PeerName>, BackendError>;

    /// The topics that anyone subscribes to at this end of the network.
    async fn topics(&self) -> Result<Vec<Topic>, BackendError>;

    /// Whether it has any peer at all, on whatever topic: one without may be cut off.
    async fn is_connected(&self) -> Result<bool, BackendError>;

    /// Who signs what this backend publishes now; another daemon may have taken its place.
    async fn identity(&self) -> Result<PeerName, BackendError>;
}

/// What stands behind the host.
#[derive(Clone)]
pub struct Backend {
    /// `kubo` or `embedded`.
    pub name: &'static str,
    /// Where it is, for the operator.
    pub address: String,
    /// Files.
    pub content: Arc<dyn Content>,
    /// Names.
    pub names: Arc<dyn Names>,
    /// Topics.
    pub pubsub: Arc<dyn Pubsub>,
    /// Whether there is a network behind it: whether listening must be proven from outside.
    pub network: bool,
    /// Whether it answers, as far as it is asked: every two seconds at the least while a host runs.
    pub contact: Arc<Contact>,
}

/// The keeper of what the embedded backend has accepted.
const EMBEDDED: &str = "embedded";

/// Who has accepted a record, a key and a document. What one keeper has accepted no other has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Keeper(String);

/// How often a name may point to another name.
const MAX_HOPS: usize = 4;

impl Backend {
    /// The newest record of a name that the backend finds, verified.
    pub async fn record(&self, name: &IpnsName) -> Result<Record, BackendError> {
        let bytes = self.names.record(name).await?;
        Record::verify(&bytes, name, Timestamp::wall())
            .map_err(|error| BackendError::Unbelievable { call: "name/get", why: error.to_string() })
    }

    /// Resolves a path to one under `/ipfs/`: a name or a domain at its start is replaced by what it points to, and
    /// what lies below it stays below.
    pub async fn end_of_chain(&self, mut path: ContentPath) -> Result<ContentPath, BackendError> {
        for _ in 0..=MAX_HOPS {
            let (call, target) = match path.root() {
                Root::Content(_) => return Ok(path),
                Root::Name(name) => ("name/get", self.record(&name).await?.path),
                Root::Domain(domain) => ("name/resolve", self.names.dnslink(&domain).await?),
            };
            let unbelievable = |why: InvalidWord| BackendError::Unbelievable { call, why: why.to_string() };
            path = target.join(path.below()).map_err(unbelievable)?;
        }
        Err(BackendError::NotFound(format!("the end of a chain of more than {MAX_HOPS} names")))
    }

    /// Who keeps what is published through this backend: the daemon's peer id, so that another daemon at the same
    /// address is not taken for it, or that of the embedded backend.
    pub async fn keeper(&self) -> Result<Keeper, BackendError> {
        if !self.network {
            return Ok(Keeper(EMBEDDED.to_owned()));
        }
        Ok(Keeper(self.pubsub.identity().await?.to_string()))
    }
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backend")
            .field("name", &self.name)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}
