//! Records the messages that a daemon accepted: a daemon sends each accepted message to its subscribers.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use dim_ipfs::Backend;
use dim_ipfs::kubo::{Settings, backend};
use futures::StreamExt as _;
use tokio::task::JoinHandle;

use crate::Kubo;

/// Returns a backend that calls the daemon directly, without the retries of a host.
pub fn directly(kubo: &Kubo) -> Backend {
    let settings = Settings { address: kubo.api().parse().expect("an address"), authorization: None };
    backend(&settings).expect("a client")
}

/// A subscription at a healthy daemon, which ends on drop.
pub struct Witness {
    seen: Arc<Mutex<Vec<Bytes>>>,
    listening: JoinHandle<()>,
}

impl Witness {
    /// Subscribes to a topic. Returns when the subscription is active.
    pub async fn of(kubo: &Kubo, topic: &str) -> Self {
        let topic = topic.parse().expect("a topic");
        let mut messages = directly(kubo).pubsub.subscribe(&topic).await.expect("the daemon is well");
        let seen = Arc::<Mutex<Vec<Bytes>>>::default();
        let noted = seen.clone();
        let listening = tokio::spawn(async move {
            while let Some(Ok(message)) = messages.next().await {
                noted.lock().expect("no panic").push(message.data);
            }
        });
        Self { seen, listening }
    }

    /// Returns the messages that the daemon accepted, in order. Panics if the subscription ended.
    pub fn seen(&self) -> Vec<Bytes> {
        assert!(!self.listening.is_finished(), "the daemon was well all the while");
        self.seen.lock().expect("no panic").clone()
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.listening.abort();
    }
}
