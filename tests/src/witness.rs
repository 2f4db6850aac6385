//! What a daemon has accepted, by its own word: it sends each message to all that listen there.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use dim::backend::Backend;
use dim::backend::kubo::{Settings, backend};
use futures::StreamExt as _;
use tokio::task::JoinHandle;

use crate::Kubo;

/// A daemon without a host's patience: what it says is what it has.
pub fn directly(kubo: &Kubo) -> Backend {
    let settings = Settings { address: kubo.api().parse().expect("an address"), authorization: None };
    backend(&settings).expect("a client")
}

/// Listens at a daemon that is well; it ends with the value.
pub struct Witness {
    seen: Arc<Mutex<Vec<Bytes>>>,
    listening: JoinHandle<()>,
}

impl Witness {
    /// Listens to a topic; returns once it does.
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

    /// The messages that the daemon has accepted, in order.
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
