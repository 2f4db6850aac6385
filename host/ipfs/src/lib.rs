//! Content, IPNS names and pubsub over one of two backends: a Kubo daemon, or an embedded backend in the process.
//!
//! The crate receives typed requests (publish a record, fetch a file, subscribe to a topic) and returns verified
//! results: it checks records against their name and files against their CID. It knows no plugins, no WebAssembly and
//! no database of the host, so other programs can use it too.

pub mod embedded;
pub mod keys;
pub mod kubo;
pub mod ipns_record;
pub mod unixfs;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use cid::Cid;
use dim_model::connectivity::Connectivity;
use dim_model::ident::{ContentPath, Domain, InvalidWord, IpnsName, KeyName, PeerName, Root, Topic};
use dim_model::time::Timestamp;
use futures::Stream;
use multiaddr::Multiaddr;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::keys::Key;
use ipns_record::Record;

/// The error of a call of a backend.
#[derive(Debug, Error)]
pub enum BackendError {
    /// The backend cannot be reached now. A later call may succeed.
    #[error("{what} cannot be reached: {why}")]
    Unreachable {
        /// The name and place of the service.
        what: String,
        /// The reason.
        why: String,
    },
    /// The answer ended early. The request may have been executed.
    #[error("the answer of {call} ended early: {why}")]
    Interrupted {
        /// The call.
        call: &'static str,
        /// The reason.
        why: String,
    },
    /// There was no answer in time. The request may have been executed.
    #[error("{0} did not answer in time")]
    Timeout(&'static str),
    /// The backend refused.
    #[error("{call} was refused: {message}")]
    Refused {
        /// The call.
        call: &'static str,
        /// The message of the backend.
        message: String,
    },
    /// The answer cannot be parsed, or a check of its content failed.
    #[error("{call} returned an invalid answer: {why}")]
    Unbelievable {
        /// The call.
        call: &'static str,
        /// The problem.
        why: String,
    },
    /// The requested item does not exist.
    #[error("{0} was not found")]
    NotFound(String),
    /// The answer has more bytes than the limit.
    #[error("{what} is larger than {limit} bytes")]
    TooLarge {
        /// The item that is too large.
        what: String,
        /// The limit in bytes.
        limit: usize,
    },
    /// The host's own store failed.
    #[error("the store failed: {0}")]
    Store(String),
}

impl BackendError {
    /// Returns whether the request was certainly not executed.
    pub fn certainly_not_sent(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Refused { .. })
    }

    /// Returns whether the daemon gave up after its own timeout: it searched and found nothing.
    pub fn is_deadline_of_daemon(&self) -> bool {
        matches!(self, Self::Refused { message, .. } if message.contains("deadline exceeded"))
    }
}

/// Blocks that are read while they are stored. Reading the next one may block the thread.
pub type Blocks = Box<dyn Iterator<Item = Result<(Cid, Bytes), BackendError>> + Send>;

/// Files by their CID. A call may take as long as the network needs.
#[async_trait]
pub trait Content: Send + Sync + 'static {
    /// Stores a file with the CID `cid`, so that peers can read it.
    async fn put(&self, cid: &Cid, data: Bytes) -> Result<(), BackendError>;

    /// Reads the file at a path, checks it against its CID and returns both.
    ///
    /// # Errors
    /// The file does not exist, is larger than `limit` bytes, or does not match its CID.
    async fn file(&self, path: &ContentPath, limit: usize) -> Result<(Cid, Bytes), BackendError>;

    /// Returns whether a file is pinned already.
    async fn is_pinned(&self, cid: &Cid) -> Result<bool, BackendError>;

    /// Unpins a file that a newer one replaced.
    async fn unpin(&self, cid: &Cid) -> Result<(), BackendError>;

    /// Stores a block with the CID `cid`, so that peers can fetch it. The block is not pinned.
    async fn put_block(&self, cid: &Cid, block: Bytes) -> Result<(), BackendError>;

    /// Pins a block and all blocks that it leads to, in place of `before`. The backend has all of them.
    ///
    /// # Errors
    /// The backend misses a block, so that the pin takes longer than `timeout`.
    async fn pin_graph(&self, cid: &Cid, before: Option<&Cid>, timeout: Duration)
    -> Result<(), BackendError>;

    /// Stores blocks and pins the graph of `root`, of which they are all that the backend may miss. Garbage collection
    /// does not come between. `timeout` is the time limit of both.
    async fn import_graph(&self, root: &Cid, blocks: Blocks, timeout: Duration) -> Result<(), BackendError>;

    /// Fetches a block of at most `limit` bytes, and checks it against its CID.
    ///
    /// # Errors
    /// No peer provides the block within `timeout`, it is larger than `limit` bytes, or it does not match its CID.
    async fn block(&self, cid: &Cid, limit: usize, timeout: Duration) -> Result<Bytes, BackendError>;
}

/// IPNS names. A call may take as long as the network needs.
#[async_trait]
pub trait Names: Send + Sync + 'static {
    /// Makes sure that the backend can publish under `key`. The result says which key has the name otherwise.
    async fn prepare(&self, name: &KeyName, key: &Key) -> Result<Prepared, BackendError>;

    /// Publishes a record. The host publishes one name at a time, and calls again with the newest value until a call
    /// succeeds.
    async fn publish(&self, publication: &Publication) -> Result<Published, BackendError>;

    /// Hands over a record that another key signed, in its stored form, so that others can find it. The backend renews no
    /// such record. A record that is not newer than one that the backend finds changes nothing.
    async fn put(&self, name: &IpnsName, record: Bytes) -> Result<(), BackendError>;

    /// Returns the newest record that the backend finds, in its stored form and unverified.
    async fn record(&self, name: &IpnsName) -> Result<Vec<u8>, BackendError>;

    /// Returns the current target of a name of the host as the backend knows it, or `None` if it knows no record.
    /// Unlike [`Names::record`] it also succeeds while the backend has no network.
    async fn current(&self, name: &IpnsName) -> Result<Option<Current>, BackendError>;

    /// Returns the target in the DNSLink record of a domain. See <https://dnslink.org>.
    async fn dnslink(&self, domain: &Domain) -> Result<ContentPath, BackendError>;

    /// Returns the names of the keys that the backend has without the host.
    async fn keys(&self) -> Result<Vec<(KeyName, IpnsName)>, BackendError>;
}

/// The result of preparing a key.
#[derive(Debug, PartialEq, Eq)]
pub enum Prepared {
    /// The backend can publish under the key.
    Ready,
    /// The backend has another key with this key name.
    Taken(IpnsName),
    /// The backend has no such key, and the host has no private key to give it, because the key was adopted.
    Gone,
}

/// The published value of a name as the backend knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Current {
    /// The path in the record.
    pub path: ContentPath,
    /// The sequence number of the record, or `None` if the backend does not return the record itself.
    pub sequence: Option<u64>,
}

/// A value to publish under a name.
#[derive(Clone, Debug)]
pub struct Publication {
    /// The name of the key.
    pub key_name: KeyName,
    /// The key.
    pub key: Key,
    /// The path to which the name will point.
    pub path: ContentPath,
    /// The sequence number that the record should have. The backend may know a higher one.
    pub sequence: u64,
    /// The value that the backend knew immediately before.
    pub current: Option<Current>,
    /// The duration for which the record is valid.
    pub lifetime: Duration,
    /// The duration for which readers may cache the record.
    pub ttl: Duration,
}

/// The result of a publication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// The sequence number of the record.
    pub sequence: u64,
    /// The signed record, if the host signed it.
    pub record: Option<Vec<u8>>,
}

/// A received message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// The data, as sent.
    pub data: Bytes,
    /// The peer that signed it.
    pub from: PeerName,
    /// The sequence number of the sender, as bytes.
    pub sequence: Bytes,
}

/// The messages of a topic. The stream ends after its first error.
pub type Messages = Pin<Box<dyn Stream<Item = Result<Incoming, BackendError>> + Send>>;

/// Topics. A call may take as long as the network needs.
#[async_trait]
pub trait Pubsub: Send + Sync + 'static {
    /// Publishes a message. The host publishes one message at a time.
    async fn publish(&self, topic: &Topic, data: Bytes) -> Result<(), BackendError>;

    /// Subscribes to a topic. It returns once messages will be received.
    async fn subscribe(&self, topic: &Topic) -> Result<Messages, BackendError>;

    /// Returns the known peers of a topic.
    async fn peers(&self, topic: &Topic) -> Result<Vec<PeerName>, BackendError>;

    /// Returns the topics to which any program subscribes through this backend.
    async fn topics(&self) -> Result<Vec<Topic>, BackendError>;
}

/// A daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Daemon {
    /// Its peer id.
    pub peer: PeerName,
    /// The multiaddresses at which it may be reached, without the peer id at their end.
    pub addresses: Vec<Multiaddr>,
}

/// The connections of the daemon to others.
#[async_trait]
pub trait Swarm: Send + Sync + 'static {
    /// Returns the peer that signs publishes of this backend now. It changes when another daemon runs at the same
    /// address.
    async fn identity(&self) -> Result<PeerName, BackendError>;

    /// Returns the daemon with the addresses at which others may reach it.
    async fn daemon(&self) -> Result<Daemon, BackendError>;

    /// Returns whether the backend has a peer, on any topic. Without a peer it may have no network.
    async fn is_connected(&self) -> Result<bool, BackendError>;

    /// Connects to another daemon now.
    async fn connect(&self, other: &Daemon) -> Result<(), BackendError>;

    /// Keeps connected to another daemon until the own daemon ends, or until [`Swarm::release`]. The own daemon asks
    /// such a peer for each block that it lacks.
    async fn keep_connected(&self, other: &Daemon) -> Result<(), BackendError>;

    /// Ends [`Swarm::keep_connected`].
    async fn release(&self, other: &PeerName) -> Result<(), BackendError>;
}

/// The backend of a host.
#[derive(Clone)]
pub struct Backend {
    /// The kind: `kubo` or `embedded`.
    pub name: &'static str,
    /// The address, for the operator.
    pub address: String,
    /// Files.
    pub content: Arc<dyn Content>,
    /// Names.
    pub names: Arc<dyn Names>,
    /// Topics.
    pub pubsub: Arc<dyn Pubsub>,
    /// Connections to other daemons.
    pub swarm: Arc<dyn Swarm>,
    /// Whether there is a network behind it. With a network, hearing must be proven from outside.
    pub network: bool,
    /// Whether the last call succeeded. A running host makes a call at least every 2 s.
    pub connectivity: Arc<Connectivity>,
}

/// The keeper of everything that the embedded backend accepted.
const EMBEDDED: &str = "embedded";

/// The daemon or backend that accepted a record, a key or a document. Another keeper does not have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Keeper(String);

/// The maximum number of names in a chain of names.
const MAX_HOPS: usize = 4;

impl Backend {
    /// Returns the newest record of a name that the backend finds, verified.
    pub async fn record(&self, name: &IpnsName) -> Result<Record, BackendError> {
        let bytes = self.names.record(name).await?;
        Record::verify(&bytes, name, Timestamp::wall())
            .map_err(|error| BackendError::Unbelievable { call: "name/get", why: error.to_string() })
    }

    /// Resolves a path to one under `/ipfs/`. It replaces the name or domain at the root with its target and keeps
    /// the segments below it.
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

    /// Returns the keeper of publishes through this backend: the peer id of the daemon, or a constant for the
    /// embedded backend. The peer id distinguishes two daemons at the same address.
    pub async fn keeper(&self) -> Result<Keeper, BackendError> {
        if !self.network {
            return Ok(Keeper(EMBEDDED.to_owned()));
        }
        Ok(Keeper(self.swarm.identity().await?.to_string()))
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
