//! Owns the transport through a Kubo daemon, without a host. It receives notices and heartbeats and publishes them on
//! topics.
//!
//! On a plain topic receivers do not acknowledge, and a daemon that accepts a message does not prove that anyone receives it. For half
//! a minute a daemon counts peers whose connection is lost, and a busy receiver drops messages that arrive out of
//! order. So a notice is sent only while its topic has a subscriber, and four times within 100 s. It starts again if
//! there was no subscriber meanwhile.
//!
//! On a reliable topic the agent is a writer of its own. It publishes a notice once, and another member acknowledges it.

use std::time::Duration;

use async_trait::async_trait;
use dim_ipfs::{Backend, BackendError};
use dim_model::ident::{NodeId, Topic};
use dim_network::lone_writer::{LoneWriter, Progress, PublishError};
use dim_server::config::Topics;

use super::{Answer, Receipt, Transport, Undelivered};
use crate::notice::{Notice, Word};

/// The pauses between repetitions: the time for a burst to end, and for a daemon to notice a lost connection. On a
/// busy machine the first of 180 sends lost 9 notices and the second lost 2 others.
const REPEATS: &[Duration] = &[Duration::from_secs(10), Duration::from_secs(30), Duration::from_secs(60)];

/// The pause between two messages. A daemon drops messages that its peers and subscribers do not accept at once. With
/// 5 ms, a busy machine lost up to one of thirty.
const PACE: Duration = Duration::from_millis(50);

/// The number of events that wait for the daemon up to which heartbeats are published on a reliable topic.
const MAX_WAITING: usize = 1_000;

/// The transport through a daemon.
#[derive(Debug)]
pub struct Kubo {
    /// The daemon.
    pub backend: Backend,
    /// The node that sends.
    pub node: NodeId,
    /// The topics of notices and heartbeats.
    pub topics: Topics,
    /// The writer of the topics that are reliable.
    pub writer: Option<LoneWriter>,
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
        let message = notice.message(&self.node);
        if let Some(writer) = self.writer_of(topic) {
            let number = writer.publish(topic, message.into()).await.map_err(|error| not_now(&error))?;
            let again = writer.again(topic);
            return Ok(Answer::Published(Receipt { topic: topic.clone(), number, again }));
        }
        self.publish(topic, message).await?;
        tokio::time::sleep(PACE).await;
        Ok(Answer::Taken)
    }

    async fn beat(&self, heartbeat: String) -> Result<(), Undelivered> {
        let topic = &self.topics.node_heartbeat;
        let Some(writer) = self.writer_of(topic) else { return self.publish(topic, heartbeat).await };
        // The hosts of a fleet may still be plain.
        if let Err(nobody) = self.audience_of(&writer.channel(topic)).await
            && (!writer.is_both(topic) || self.audience_of(topic).await.is_err())
        {
            return Err(nobody);
        }
        // Heartbeats do not pile up for a daemon that accepts nothing.
        if writer.waiting() > MAX_WAITING {
            return Err(Undelivered::NotNow("earlier events wait for the daemon".to_owned()));
        }
        writer.publish(topic, heartbeat.into()).await.map_err(|error| not_now(&error))?;
        Ok(())
    }

    fn repeats(&self) -> &'static [Duration] {
        REPEATS
    }

    async fn progress(&self, topic: &Topic) -> Progress {
        match &self.writer {
            Some(writer) => writer.progress(topic).await,
            None => Progress::default(),
        }
    }

    async fn acknowledged_within(&self) -> Duration {
        match &self.writer {
            Some(writer) => writer.acknowledged_within().await,
            None => Duration::ZERO,
        }
    }

    async fn audience(&self) -> Result<(), Undelivered> {
        let topics = [&self.topics.job_updates, &self.topics.results_ready].into_iter();
        for topic in topics.filter(|topic| self.writer_of(topic).is_none()) {
            self.audience_of(topic).await?;
        }
        Ok(())
    }
}

impl Kubo {
    /// The topics on which the agent publishes.
    pub fn used_topics(&self) -> [&Topic; 3] {
        let Topics { job_updates, results_ready, node_heartbeat, .. } = &self.topics;
        [job_updates, results_ready, node_heartbeat]
    }

    /// The writer of a topic, if it is reliable.
    fn writer_of(&self, topic: &Topic) -> Option<&LoneWriter> {
        self.writer.as_ref().filter(|writer| writer.writes(topic))
    }

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

fn not_now(error: &PublishError) -> Undelivered {
    Undelivered::NotNow(dim_model::error_chain::chain(error))
}
