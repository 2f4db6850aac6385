//! Owns the embedded backend: documents in the store, IPNS records signed here, and a message bus in the process. It
//! has no network. It produces the same CIDs as Kubo and, for the same key, the same names.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use cid::Cid;
use dim_model::connectivity::Connectivity;
use dim_model::ident::{ContentPath, Domain, IpnsName, KeyName, PeerName, Topic};
use dim_model::time::Timestamp;
use libp2p_identity::Keypair;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::ipns_record::Record;
use crate::keys::{Key, Keyring};
use crate::{
    Backend, BackendError, Blocks, Content, Current, Daemon, Incoming, Messages, Names, Prepared,
    Publication, Published, Pubsub, Swarm,
};

/// The maximum number of messages that wait for one subscriber. At the maximum the publisher waits; no message is
/// dropped.
const WAITING: usize = 1_024;

/// Makes the embedded backend of a host, and its bus.
pub fn backend(committed: Arc<dyn Committed>, keys: Arc<Keyring>) -> (Backend, Arc<Bus>) {
    let bus = Arc::new(Bus::new());
    let files = Arc::new(Files { committed, keys });
    let backend = Backend {
        name: "embedded",
        address: "in this process".to_owned(),
        content: files.clone(),
        names: files,
        pubsub: bus.clone(),
        swarm: bus.clone(),
        network: false,
        connectivity: Arc::new(Connectivity::new("calls of the embedded backend")),
    };
    (backend, bus)
}

/// The committed documents and IPNS records of the host. The embedded backend reads them from here, because the
/// commit stores them before the host calls `publish`. A call may block for a read of the disk.
pub trait Committed: fmt::Debug + Send + Sync {
    /// Returns the file at `path`, or `None` if the host has no such file.
    fn document(&self, path: &ContentPath) -> Result<Option<Vec<u8>>, CommittedError>;

    /// Returns the newest record of `key`, or `None` if nothing was published under it.
    fn record(&self, key: &KeyName) -> Result<Option<Vec<u8>>, CommittedError>;
}

/// The error of reading committed data.
pub type CommittedError = Box<dyn std::error::Error + Send + Sync>;

/// The documents and names in the host's own store.
#[derive(Debug)]
struct Files {
    committed: Arc<dyn Committed>,
    keys: Arc<Keyring>,
}

fn failed(error: CommittedError) -> BackendError {
    BackendError::Store(error.to_string())
}

#[async_trait]
impl Content for Files {
    /// Does nothing, because the commit stored the file already.
    async fn put(&self, _: &Cid, _: Bytes) -> Result<(), BackendError> {
        Ok(())
    }

    async fn file(&self, path: &ContentPath, limit: usize) -> Result<(Cid, Bytes), BackendError> {
        let missing = || BackendError::NotFound(path.to_string());
        let (cid, _) = path.ipfs().ok_or_else(missing)?;
        let data = self.committed.document(path).map_err(failed)?.ok_or_else(missing)?;
        if data.len() > limit {
            return Err(BackendError::TooLarge { what: path.to_string(), limit });
        }
        Ok((cid, data.into()))
    }

    async fn is_pinned(&self, _: &Cid) -> Result<bool, BackendError> {
        Ok(false)
    }

    /// Does nothing, because the commit deletes files that are not used.
    async fn unpin(&self, _: &Cid) -> Result<(), BackendError> {
        Ok(())
    }

    /// Does nothing, because nobody can fetch the block.
    async fn put_block(&self, _: &Cid, _: Bytes) -> Result<(), BackendError> {
        Ok(())
    }

    async fn pin_graph(&self, _: &Cid, _: Option<&Cid>, _: Duration) -> Result<(), BackendError> {
        Ok(())
    }

    async fn import_graph(&self, _: &Cid, _: Blocks, _: Duration) -> Result<(), BackendError> {
        Ok(())
    }

    /// Finds nothing, because there is no network.
    async fn block(&self, cid: &Cid, _: usize, _: Duration) -> Result<Bytes, BackendError> {
        Err(BackendError::NotFound(cid.to_string()))
    }
}

#[async_trait]
impl Names for Files {
    async fn prepare(&self, _: &KeyName, key: &Key) -> Result<Prepared, BackendError> {
        Ok(match key {
            Key::Own(_) => Prepared::Ready,
            Key::Adopted(_) => Prepared::Gone,
        })
    }

    async fn publish(&self, publication: &Publication) -> Result<Published, BackendError> {
        let Key::Own(pair) = &publication.key else {
            let message = format!("the private half of key {} is in a Kubo daemon", publication.key_name);
            return Err(BackendError::Refused { call: "signing a record", message });
        };
        let validity = Timestamp::wall().after(publication.lifetime);
        let Publication { path, sequence, ttl, .. } = publication;
        let record = Record::sign(pair, path, *sequence, validity, *ttl);
        Ok(Published { sequence: *sequence, record: Some(record.bytes) })
    }

    /// Does nothing, because nobody can find the record.
    async fn put(&self, _: &IpnsName, _: Bytes) -> Result<(), BackendError> {
        Ok(())
    }

    async fn record(&self, name: &IpnsName) -> Result<Vec<u8>, BackendError> {
        let missing = || BackendError::NotFound(format!("/ipns/{name}"));
        let keys = self.keys.all();
        let (key, _) = keys.iter().find(|(_, key)| key.name() == *name).ok_or_else(missing)?;
        self.committed.record(key).map_err(failed)?.ok_or_else(missing)
    }

    /// Returns `None`, because only the host publishes here.
    async fn current(&self, _: &IpnsName) -> Result<Option<Current>, BackendError> {
        Ok(None)
    }

    async fn dnslink(&self, domain: &Domain) -> Result<ContentPath, BackendError> {
        let message = format!("the embedded backend has no network to look up {domain} (DNSLink)");
        Err(BackendError::Refused { call: "DNSLink", message })
    }

    async fn keys(&self) -> Result<Vec<(KeyName, IpnsName)>, BackendError> {
        Ok(Vec::new())
    }
}

/// A message bus in the process. Demos and tests can publish on it as peers.
#[derive(Debug)]
pub struct Bus {
    identity: PeerName,
    sequence: AtomicU64,
    subscribers: Mutex<HashMap<Topic, Vec<mpsc::Sender<Incoming>>>>,
}

impl Bus {
    fn new() -> Self {
        Self { identity: new_peer(), sequence: AtomicU64::new(0), subscribers: Mutex::default() }
    }

    /// Publishes as `from`. It waits while the queue of a subscriber is full.
    pub async fn publish_as(&self, from: &PeerName, topic: &Topic, data: Bytes) {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let sequence = Bytes::copy_from_slice(&sequence.to_be_bytes());
        self.deliver(topic, Incoming { data, from: from.clone(), sequence }).await;
    }

    /// Delivers a message with the given sender and sequence number.
    pub async fn deliver(&self, topic: &Topic, message: Incoming) {
        let subscribers = self.lock().get(topic).cloned().unwrap_or_default();
        for subscriber in subscribers {
            if subscriber.send(message.clone()).await.is_err() {
                self.lock()
                    .entry(topic.clone())
                    .or_default()
                    .retain(|other| !other.same_channel(&subscriber));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Topic, Vec<mpsc::Sender<Incoming>>>> {
        self.subscribers.lock().expect("no one panics while holding the subscribers")
    }
}

/// Makes a new random peer id.
pub fn new_peer() -> PeerName {
    let peer = Keypair::generate_ed25519().public().to_peer_id();
    peer.to_base58().parse().expect("a peer id is base58")
}

#[async_trait]
impl Pubsub for Bus {
    async fn publish(&self, topic: &Topic, data: Bytes) -> Result<(), BackendError> {
        self.publish_as(&self.identity, topic, data).await;
        Ok(())
    }

    async fn subscribe(&self, topic: &Topic) -> Result<Messages, BackendError> {
        let (sender, receiver) = mpsc::channel(WAITING);
        self.lock().entry(topic.clone()).or_default().push(sender);
        Ok(Box::pin(futures::StreamExt::map(ReceiverStream::new(receiver), Ok)))
    }

    async fn peers(&self, _: &Topic) -> Result<Vec<PeerName>, BackendError> {
        Ok(Vec::new())
    }

    async fn topics(&self) -> Result<Vec<Topic>, BackendError> {
        let subscribers = self.lock();
        let heard = |listeners: &Vec<mpsc::Sender<Incoming>>| listeners.iter().any(|one| !one.is_closed());
        Ok(subscribers.iter().filter(|(_, all)| heard(all)).map(|(topic, _)| topic.clone()).collect())
    }
}

/// There are no other daemons.
#[async_trait]
impl Swarm for Bus {
    async fn identity(&self) -> Result<PeerName, BackendError> {
        Ok(self.identity.clone())
    }

    async fn daemon(&self) -> Result<Daemon, BackendError> {
        Ok(Daemon { peer: self.identity.clone(), addresses: Vec::new() })
    }

    async fn is_connected(&self) -> Result<bool, BackendError> {
        Ok(false)
    }

    async fn connect(&self, other: &Daemon) -> Result<(), BackendError> {
        Err(BackendError::NotFound(other.peer.to_string()))
    }

    async fn keep_connected(&self, _: &Daemon) -> Result<(), BackendError> {
        Ok(())
    }

    async fn release(&self, _: &PeerName) -> Result<(), BackendError> {
        Ok(())
    }
}
