//! What `wit/pubsub.wit` asks of a session: publishes and subscriptions.

use bytes::Bytes;

use super::{Answer, Refusal, Session, allowed, word};
use crate::effect::Publish;
use crate::ident::Topic;

/// How many changes of subscriptions may wait for the log, in terms of the topics that a plugin may be subscribed to: a
/// plugin that is far behind does not see its own for long.
const CHANGES: usize = 4;

/// So many may wait at any rate.
const FEW_CHANGES: usize = 256;

impl Session {
    /// Publishes on a topic.
    pub fn publish(&mut self, topic: &str, data: Bytes) -> Answer<()> {
        let topic = allowed!(word::<Topic>(topic));
        if !self.reach.may_publish(&topic) {
            return Ok(Err(Refusal::NotGranted(topic.to_string())));
        }
        if data.len() > self.limits.message_bytes {
            return Ok(Err(Refusal::TooLarge("message-bytes", self.limits.message_bytes as u64)));
        }
        allowed!(self.may_effect(topic.as_str().len() + data.len()));
        if self.outgoing.used >= self.limits.publishes {
            return Ok(Err(Refusal::Limit("publishes")));
        }
        if data.len() > self.limits.publish_bytes.saturating_sub(self.outgoing.used_bytes) {
            return Ok(Err(Refusal::Limit("publish-bytes")));
        }
        if let Err(limit) = self.outgoing.take(data.len()) {
            return Ok(Err(Refusal::Limit(limit)));
        }
        self.effects.publish(Publish { topic, data });
        Ok(Ok(()))
    }

    /// Subscribes to a topic, or unsubscribes. What an entry asks for and takes back again is nothing; the rest becomes
    /// entries of the log, and is limited by the rate of publishes.
    pub fn subscribe(&mut self, topic: &str, subscribed: bool) -> Answer<()> {
        let topic = allowed!(word::<Topic>(topic));
        if subscribed && !self.reach.may_subscribe(&topic) {
            return Ok(Err(Refusal::NotGranted(topic.to_string())));
        }
        allowed!(self.may_effect(topic.as_str().len()));
        if self.world.will_hear(&topic) == subscribed {
            return Ok(Ok(()));
        }
        if subscribed && self.world.topics_to_hear().len() >= self.limits.topics {
            return Ok(Err(Refusal::Limit("topics")));
        }
        if self.effects.unsays(&topic) {
            self.outgoing.give_back_change();
        } else if self.world.count_asked_with(&topic)
            > self.limits.topics.saturating_mul(CHANGES).max(FEW_CHANGES)
        {
            return Ok(Err(Refusal::Limit("topics")));
        } else if let Err(limit) = self.outgoing.take_change() {
            return Ok(Err(Refusal::Limit(limit)));
        }
        self.effects.subscribe(&mut self.world, topic, subscribed);
        Ok(Ok(()))
    }

    /// The topic, if the plugin may subscribe to it.
    pub fn heard_topic(&self, topic: &str) -> Result<Topic, Refusal> {
        let topic = word::<Topic>(topic)?;
        if self.reach.may_subscribe(&topic) { Ok(topic) } else { Err(Refusal::NotGranted(topic.to_string())) }
    }
}
