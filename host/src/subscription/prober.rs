//! Owns the task that proves listening.
//!
//! A stream that is silent proves nothing, for a frozen daemon keeps its sockets open. So the host
//! publishes a probe on a topic of its own and waits for the echo.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;

use super::Hearings;
use crate::backend::{Backend, BackendError};
use crate::backoff::Backoff;
use crate::ident::Topic;
use crate::interest::Interest;
use crate::log::EventLog;
use crate::room::Room;
use crate::time::Timestamp;

/// How often listening is proven.
const EVERY: Duration = Duration::from_secs(1);

/// How long a probe may take until its echo is there. A daemon that was frozen meanwhile answers later,
/// and was perhaps frozen already when the probe was sent.
const ECHO: Duration = Duration::from_secs(3);

/// How often the peers of topics are asked for.
const PEERS_EVERY: Duration = Duration::from_secs(2);

/// Topics whose peers are asked for at once.
const AT_ONCE: usize = 8;

/// The task that proves listening.
#[derive(Debug)]
pub struct Prober {
    /// What is probed.
    pub backend: Backend,
    /// Where the proof goes.
    pub log: Arc<EventLog>,
    /// Which topics are wanted.
    pub interest: Arc<Interest>,
    /// What is listened to.
    pub hearings: Arc<Hearings>,
    /// Whether messages are taken in.
    pub room: Arc<Room>,
    /// The topic of the probes: this host's own.
    pub topic: Topic,
}

impl Prober {
    /// Proves until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let work = async {
            if self.backend.network {
                tokio::join!(self.probe_for_ever(), self.ask_for_peers());
            } else {
                self.tick_for_ever().await;
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// Without a network the host hears for as long as it runs.
    async fn tick_for_ever(&self) {
        loop {
            self.proven(self.log.now());
            tokio::time::sleep(EVERY).await;
        }
    }

    fn proven(&self, time: Timestamp) {
        // While the log has no room the streams are not read, and the daemon drops messages.
        if self.log.has_room() && self.room.check().is_ok() {
            self.log.append_now(self.hearings.prove(time));
        }
    }

    async fn probe_for_ever(&self) {
        let mut backoff = Backoff::new();
        loop {
            let error = self.probe(&mut backoff).await;
            self.hearings.doubt(&error);
            tracing::debug!("listening is not proven: {error}");
            tokio::time::sleep(backoff.next()).await;
        }
    }

    /// Probes until an echo stays away.
    async fn probe(&self, backoff: &mut Backoff) -> BackendError {
        let mut echoes = match self.backend.pubsub.subscribe(&self.topic).await {
            Ok(echoes) => echoes,
            Err(error) => return error,
        };
        for number in 0_u64.. {
            let sent_at = self.log.now();
            let probe = Bytes::from(format!("{{\"probe\":{number},\"at\":\"{sent_at}\"}}"));
            let echo = async {
                self.backend.pubsub.publish(&self.topic, probe.clone()).await?;
                while let Some(message) = echoes.next().await {
                    if message?.data == probe {
                        return Ok(());
                    }
                }
                Err(BackendError::Unreachable {
                    what: "the probe".to_owned(),
                    why: "the stream was closed".to_owned(),
                })
            };
            match tokio::time::timeout(ECHO, echo).await {
                Ok(Ok(())) => self.proven(sent_at),
                Ok(Err(error)) => return error,
                Err(_) => return BackendError::Timeout("the echo of a probe"),
            }
            backoff.reset();
            tokio::time::sleep(EVERY).await;
        }
        unreachable!("64 bits of probes last for ever")
    }

    async fn ask_for_peers(&self) {
        loop {
            // A few at a time: a daemon that is slow would answer the last one too late.
            match self.backend.pubsub.is_connected().await {
                Ok(is_connected) => {
                    let topics = futures::stream::iter(self.interest.topics());
                    let ask = async |topic: Topic| self.ask_for_peers_of(&topic, is_connected).await;
                    topics.for_each_concurrent(AT_ONCE, ask).await;
                }
                Err(error) => tracing::debug!("cannot ask for the peers: {error}"),
            }
            tokio::time::sleep(PEERS_EVERY).await;
        }
    }

    async fn ask_for_peers_of(&self, topic: &Topic, is_connected: bool) {
        let asked_at = self.log.now();
        match self.backend.pubsub.peers(topic).await {
            Ok(mut peers) => {
                // A change that cannot be told is seen again later.
                if self.room.check().is_err() {
                    return;
                }
                peers.sort();
                self.log.append_now(self.hearings.set_peers(topic, peers, is_connected, asked_at));
            }
            Err(error) => tracing::debug!(%topic, "cannot ask for the peers: {error}"),
        }
    }
}
