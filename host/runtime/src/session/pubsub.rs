//! Owns the meaning of `wit/pubsub.wit` for a session: publishes and subscriptions.

use bytes::Bytes;
use dim_model::ident::Topic;
use dim_store::effect::Publish;
use dim_store::entry_context::SubscriptionRequest;
use dim_store::plugin_limits::LimitName;

use super::{Answer, Refusal, Session, allowed, word};

/// Most changes of subscriptions that may wait for the log, as a multiple of the limit on topics. A plugin that
/// is far behind does not see its own changes for a long time.
const CHANGES: usize = 4;

/// The number of changes that may wait in any case.
const FEW_CHANGES: usize = 256;

impl Session {
    /// Publishes on a topic.
    pub fn publish(&mut self, topic: &str, data: Bytes) -> Answer<()> {
        let topic = allowed!(word::<Topic>(topic));
        if !self.code.reach.may_publish(&topic) {
            return Ok(Err(Refusal::NotGranted(topic.to_string())));
        }
        if data.len() > self.code.limits.message_bytes {
            return Ok(Err(Refusal::TooLarge(
                LimitName::MESSAGE_BYTES,
                self.code.limits.message_bytes as u64,
            )));
        }
        allowed!(self.may_effect(topic.as_str().len() + data.len()));
        if self.publishing.outgoing.used >= self.code.limits.publishes {
            return Ok(Err(Refusal::Limit(LimitName::PUBLISHES)));
        }
        if data.len() > self.code.limits.publish_bytes.saturating_sub(self.publishing.outgoing.used_bytes) {
            return Ok(Err(Refusal::Limit(LimitName::PUBLISH_BYTES)));
        }
        if let Err(limit) = self.publishing.outgoing.take(data.len()) {
            return Ok(Err(Refusal::Limit(limit)));
        }
        self.effects.publish(Publish { topic, data });
        Ok(Ok(()))
    }

    /// Subscribes to a topic or unsubscribes from it. Two opposite changes in one entry cancel each other. The
    /// others become entries of the log and count for the rate of publishes.
    pub fn subscribe(&mut self, topic: &str, requested: SubscriptionRequest) -> Answer<()> {
        let topic = allowed!(word::<Topic>(topic));
        let subscribed = requested.0.is_some();
        if subscribed && !self.code.reach.may_subscribe(&topic) {
            return Ok(Err(Refusal::NotGranted(topic.to_string())));
        }
        allowed!(self.may_effect(topic.as_str().len()));
        if self.context.will_hear(&topic) == subscribed {
            return Ok(Ok(()));
        }
        if subscribed && self.context.topics_to_hear().len() >= self.code.limits.topics {
            return Ok(Err(Refusal::Limit(LimitName::TOPICS)));
        }
        if self.effects.unsays(&topic) {
            self.publishing.outgoing.give_back_change();
        } else if self.context.count_asked_with(&topic)
            > self.code.limits.topics.saturating_mul(CHANGES).max(FEW_CHANGES)
        {
            return Ok(Err(Refusal::Limit(LimitName::TOPICS)));
        } else if let Err(limit) = self.publishing.outgoing.take_change() {
            return Ok(Err(Refusal::Limit(limit)));
        }
        self.request_subscription(topic, requested);
        Ok(Ok(()))
    }

    /// Requests a change of a subscription, contrary to the current state.
    pub fn request_subscription(
        &mut self,
        topic: Topic,
        SubscriptionRequest(beginning): SubscriptionRequest,
    ) {
        let beginning = beginning.map(|it| self.reads.kept_topics.beginning(&topic, it));
        self.effects.subscribe(&mut self.context, topic, SubscriptionRequest(beginning));
    }

    /// The topic, if the plugin may subscribe to it.
    pub fn heard_topic(&self, topic: &str) -> Result<Topic, Refusal> {
        let topic = word::<Topic>(topic)?;
        if self.code.reach.may_subscribe(&topic) {
            Ok(topic)
        } else {
            Err(Refusal::NotGranted(topic.to_string()))
        }
    }
}
