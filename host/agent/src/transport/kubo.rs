//! Owns the transport through a Kubo daemon, without a host. It receives notices and heartbeats and publishes them on
//! topics.
//!
//! Receivers do not acknowledge, and a daemon that accepts a message does not prove that anyone receives it. For half
//! a minute a daemon counts peers whose connection is lost, and a busy receiver drops messages that arrive out of
//! order. So a notice is sent only while its topic has a subscriber, and four times within 100 s. It starts again if
//! there was no subscriber meanwhile.

use std::time::Duration;

use async_trait::async_trait;
use dim_ipfs::{Backend, BackendError};
use dim_model::ident::{NodeId, Topic};
use dim_server::config::Topics;

use super::{Answer, Transport, Undelivered};
use crate::notice::{Notice, Word};

/// The pauses between repetitions: the time for a burst to end, and for a daemon to notice a lost connection. On a
/// busy machine the first of 180 sends lost 9 notices and the second lost 2 others.
const REPEATS: &[Duration] = &[Duration::from_secs(10), Duration::from_secs(30), Duration::from_secs(60)];

/// The pause between two messages. A daemon drops messages that its peers and subscribers do not accept at once. With
/// 5 ms, a busy machine lost up to one of thirty.
const PACE: Duration = Duration::from_millis(50);

/// The transport through a daemon.
#[derive(Debug)]
pub struct Kubo {
    /// The daemon.
    pub backend: Backend,
    /// The node that sends.
    pub node: NodeId,
    /// The topics of notices and heartbeats.
    pub topics: Topics,
}

#[async_trait]
impl Transport for Kubo {
    fn address(&self) -> String {
        format!("the Kubo daemon at {}", self.backend.address)
    }

    async fn tell(&self, notice: &Notice) -> Result<Answer, Undelivered> {
        let topic = match &notice.word {
            Word::Event(_) => &self.topics.job_updates,
            Word::Result(_) => &self.topics.results_ready,
        };
        self.publish(topic, notice.message(&self.node)).await?;
        tokio::time::sleep(PACE).await;
        Ok(Answer::Taken)
    }

    async fn beat(&self, heartbeat: String) -> Result<(), Undelivered> {
        self.publish(&self.topics.node_heartbeat, heartbeat).await
    }

    fn repeats(&self) -> &'static [Duration] {
        REPEATS
    }

    async fn audience(&self) -> Result<(), Undelivered> {
        for topic in [&self.topics.job_updates, &self.topics.results_ready] {
            self.audience_of(topic).await?;
        }
        Ok(())
    }
}

impl Kubo {
    async fn publish(&self, topic: &Topic, message: String) -> Result<(), Undelivered> {
        self.audience_of(topic).await?;
        self.backend.pubsub.publish(topic, message.into()).await.map_err(|error| match error {
            // Another program published through this daemon at the same moment.
            BackendError::Refused { .. } => Undelivered::NotNow(error.to_string()),
            error => away(&error),
        })
    }

    /// Checks that the topic has peers, or a subscriber at this daemon.
    async fn audience_of(&self, topic: &Topic) -> Result<(), Undelivered> {
        let pubsub = &self.backend.pubsub;
        let peers = pubsub.peers(topic).await.map_err(|error| away(&error))?;
        if peers.is_empty() && !pubsub.topics().await.map_err(|error| away(&error))?.contains(topic) {
            return Err(Undelivered::Away(format!("nobody listens on {topic}")));
        }
        Ok(())
    }
}

fn away(error: &BackendError) -> Undelivered {
    Undelivered::Away(error.to_string())
}
