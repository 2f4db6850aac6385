//! The way through a Kubo daemon, without a host. Nobody acknowledges: that a daemon takes a message
//! does not say that anyone hears it. For half a minute it still counts peers whose link is gone, and
//! a busy receiver drops for good what overtakes itself on the way. So a notice is told only while someone
//! listens on its topic, and four times within a hundred seconds; and anew if meanwhile nobody listened.

use std::time::Duration;

use async_trait::async_trait;

use super::{Answer, Untold, Way};
use crate::agent::notice::{Notice, Word};
use crate::backend::{Backend, BackendError};
use crate::config::Topics;
use crate::ident::{NodeId, Topic};

/// Time for a burst to be over, and for a daemon to notice that a link is gone. Seen on a busy machine: of
/// 180 notices the first telling lost 9, and the second 2 others.
const REPEATS: &[Duration] = &[Duration::from_secs(10), Duration::from_secs(30), Duration::from_secs(60)];

/// Time between two messages. A daemon drops what its peers and its subscribers do not take at once: at
/// 5 ms a busy machine lost up to one in thirty.
const PACE: Duration = Duration::from_millis(50);

/// A daemon.
#[derive(Debug)]
pub struct Kubo {
    /// The daemon.
    pub backend: Backend,
    /// Who speaks.
    pub node: NodeId,
    /// Where it is said.
    pub topics: Topics,
}

#[async_trait]
impl Way for Kubo {
    fn address(&self) -> String {
        format!("the Kubo daemon at {}", self.backend.address)
    }

    async fn tell(&self, notice: &Notice) -> Result<Answer, Untold> {
        let topic = match &notice.word {
            Word::Event(_) => &self.topics.job_updates,
            Word::Result(_) => &self.topics.results_ready,
        };
        self.publish(topic, notice.message(&self.node)).await?;
        tokio::time::sleep(PACE).await;
        Ok(Answer::Taken)
    }

    async fn beat(&self, heartbeat: String) -> Result<(), Untold> {
        self.publish(&self.topics.node_heartbeat, heartbeat).await
    }

    fn repeats(&self) -> &'static [Duration] {
        REPEATS
    }

    async fn audience(&self) -> Result<(), Untold> {
        for topic in [&self.topics.job_updates, &self.topics.results_ready] {
            self.audience_of(topic).await?;
        }
        Ok(())
    }
}

impl Kubo {
    async fn publish(&self, topic: &Topic, message: String) -> Result<(), Untold> {
        self.audience_of(topic).await?;
        self.backend.pubsub.publish(topic, message.into()).await.map_err(|error| match error {
            // Another program of this daemon published in the same moment.
            BackendError::Refused { .. } => Untold::NotNow(error.to_string()),
            error => away(&error),
        })
    }

    /// Peers on the topic, or a host at this daemon.
    async fn audience_of(&self, topic: &Topic) -> Result<(), Untold> {
        let pubsub = &self.backend.pubsub;
        let peers = pubsub.peers(topic).await.map_err(|error| away(&error))?;
        if peers.is_empty() && !pubsub.topics().await.map_err(|error| away(&error))?.contains(topic) {
            return Err(Untold::Away(format!("nobody listens on {topic}")));
        }
        Ok(())
    }
}

fn away(error: &BackendError) -> Untold {
    Untold::Away(error.to_string())
}
