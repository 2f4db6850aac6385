//! Owns the task that proves listening. It sends probes, receives their echoes and the peers of topics, and appends
//! proofs to the log.
//!
//! A silent stream proves nothing, because a frozen daemon keeps its sockets open. So the host publishes a probe on
//! its own topic and waits for the echo.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dim_ipfs::{Backend, BackendError};
use dim_model::backoff::Backoff;
use dim_model::ident::Topic;
use dim_model::time::Timestamp;
use dim_store::disk_monitor::DiskMonitor;
use dim_store::event_log::EventLog;
use dim_store::interest::Interest;
use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;

use super::ListeningRecords;
use crate::reliable_topics::Reliable;

/// The time between two probes.
const EVERY: Duration = Duration::from_secs(1);

/// The time limit of a probe until its echo. If a daemon was frozen meanwhile, it answers later, and it may have been
/// frozen already when the probe was sent.
const ECHO: Duration = Duration::from_secs(3);

/// The time between two requests for the peers of topics.
const PEERS_EVERY: Duration = Duration::from_secs(2);

/// The number of topics whose peers are requested at the same time.
const AT_ONCE: usize = 8;

/// The task that proves listening.
#[derive(Debug)]
pub struct Prober {
    /// The backend that is probed.
    pub backend: Backend,
    /// The log that receives the proofs.
    pub log: Arc<EventLog>,
    /// The wanted topics.
    pub interest: Arc<Interest>,
    /// The listening record of each topic.
    pub listening_records: Arc<ListeningRecords>,
    /// The state of the intake.
    pub disk: Arc<DiskMonitor>,
    /// The reliable topics.
    pub reliable: Reliable,
    /// The topic of the probes. Only this host uses it.
    pub topic: Topic,
}

impl Prober {
    /// Proves listening until `stop` is cancelled.
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

    /// Without a network, the host hears everything while it runs.
    async fn tick_for_ever(&self) {
        loop {
            self.proven(self.log.now());
            self.log.clock().sleep(EVERY).await;
        }
    }

    fn proven(&self, time: Timestamp) {
        // While the log is full the streams are not read, and the daemon drops messages.
        if self.log.has_room() && self.disk.check().is_ok() {
            self.log.append_now(self.listening_records.prove(time));
        }
    }

    async fn probe_for_ever(&self) {
        let mut backoff = Backoff::new();
        loop {
            let error = self.probe(&mut backoff).await;
            self.listening_records.doubt(&error);
            tracing::debug!("listening is not proven: {error}");
            self.log.clock().sleep(backoff.next_pause()).await;
        }
    }

    /// Sends probes until an echo is missing.
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
            self.log.clock().sleep(EVERY).await;
        }
        unreachable!("64 bits of probes last for ever")
    }

    async fn ask_for_peers(&self) {
        loop {
            // Only a few requests run at the same time, because a slow daemon would answer the last ones too late.
            match self.backend.swarm.is_connected().await {
                Ok(is_connected) => {
                    let topics = futures::stream::iter(self.interest.topics());
                    let ask = async |topic: Topic| self.ask_for_peers_of(&topic, is_connected).await;
                    topics.for_each_concurrent(AT_ONCE, ask).await;
                }
                Err(error) => tracing::debug!("cannot ask for the peers: {error}"),
            }
            self.log.clock().sleep(PEERS_EVERY).await;
        }
    }

    async fn ask_for_peers_of(&self, topic: &Topic, is_connected: bool) {
        let asked_at = self.log.now();
        match self.backend.pubsub.peers(&self.reliable.channel(topic)).await {
            Ok(mut peers) => {
                // A change that cannot be appended now is found again later.
                if self.disk.check().is_err() {
                    return;
                }
                peers.sort();
                self.log.append_now(self.listening_records.set_peers(topic, peers, is_connected, asked_at));
            }
            Err(error) => tracing::debug!(%topic, "cannot ask for the peers: {error}"),
        }
    }
}
