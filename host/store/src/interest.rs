//! Owns the host's interest in the network: the topics and the followed names that any plugin of this host or
//! any caller of the API wants.
//!
//! It receives contexts and batches of plugins and requests of API callers, and returns the sets that the
//! network subscribes to and follows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard};

use dim_model::beginning::Beginning;
use dim_model::ident::{IpnsName, PluginName, Topic};
use tokio::sync::Notify;

use crate::batch::Batch;
use crate::entry_context::EntryContext;

/// A party with an interest: a plugin, or a caller of the API by a running number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subscriber {
    /// A plugin.
    Plugin(PluginName),
    /// The previous code of a plugin whose new code is on probation. After a rollback it must have missed nothing.
    Fallback(PluginName),
    /// A caller of the API, while it listens.
    Caller(u64),
}

/// The topics and names that parties want.
#[derive(Debug, Default)]
pub struct Interest {
    wanted: Mutex<Wanted>,
    topics_changed: Notify,
    names_changed: Notify,
}

#[derive(Debug, Default)]
struct Wanted {
    topics: BTreeMap<Topic, BTreeSet<Subscriber>>,
    /// The beginnings that callers want for their topics, other than the head.
    beginnings: BTreeMap<Subscriber, (Topic, Beginning)>,
    names: BTreeMap<IpnsName, BTreeSet<Subscriber>>,
    /// Names with a new follower, which needs the last known value once more.
    fresh: BTreeSet<IpnsName>,
}

impl Interest {
    /// Replaces the interest of a plugin by the interest in `context`.
    pub fn restore(&self, plugin: &PluginName, context: &EntryContext) {
        self.set(Subscriber::Plugin(plugin.clone()), context);
    }

    /// Restores the interest that a plugin had in `context`, before its code was replaced, and ends the fallback's.
    pub fn go_back(&self, plugin: &PluginName, context: &EntryContext) {
        self.set(Subscriber::Plugin(plugin.clone()), context);
        self.forget(&Subscriber::Fallback(plugin.clone()));
    }

    /// Sets the interest in `context` as that of the fallback, while the plugin's new code is on probation.
    pub fn keep(&self, plugin: &PluginName, context: &EntryContext) {
        self.set(Subscriber::Fallback(plugin.clone()), context);
    }

    /// Removes the whole interest of a party.
    pub fn forget(&self, party: &Subscriber) {
        let mut wanted = self.lock();
        wanted.leave(party);
        drop(wanted);
        self.topics_changed.notify_one();
        self.names_changed.notify_one();
    }

    fn set(&self, party: Subscriber, context: &EntryContext) {
        let mut wanted = self.lock();
        wanted.leave(&party);
        for topic in context.topics_to_hear() {
            wanted.topics.entry(topic.clone()).or_default().insert(party.clone());
        }
        for (name, known) in context.follows() {
            wanted.names.entry(name.clone()).or_default().insert(party.clone());
            if known.is_none() {
                wanted.fresh.insert(name.clone());
            }
        }
        drop(wanted);
        self.topics_changed.notify_one();
        self.names_changed.notify_one();
    }

    /// Applies the changes of a durable batch.
    pub fn update(&self, batch: &Batch) {
        let party = Subscriber::Plugin(batch.plugin.clone());
        if batch.code.handover.is_some() {
            self.keep_all(&party, &Subscriber::Fallback(batch.plugin.clone()));
        }
        if batch.code.verdict.is_some() {
            self.forget(&Subscriber::Fallback(batch.plugin.clone()));
        }
        for (topic, requested) in &batch.requested.subscriptions {
            self.want_topic(topic, party.clone(), requested.0.is_some());
        }
        for (name, followed) in &batch.requested.follows {
            let mut wanted = self.lock();
            change(&mut wanted.names, name, party.clone(), *followed);
            if *followed {
                wanted.fresh.insert(name.clone());
            }
            drop(wanted);
            self.names_changed.notify_one();
        }
    }

    /// Adds the whole interest of `from` to that of `to`.
    fn keep_all(&self, from: &Subscriber, to: &Subscriber) {
        let mut wanted = self.lock();
        let Wanted { topics, names, .. } = &mut *wanted;
        for parties in topics.values_mut().chain(names.values_mut()).filter(|parties| parties.contains(from))
        {
            parties.insert(to.clone());
        }
    }

    /// Adds a topic to the interest of a party, or removes it.
    pub fn want_topic(&self, topic: &Topic, party: Subscriber, wants: bool) {
        let mut wanted = self.lock();
        if !wants {
            wanted.beginnings.remove(&party);
        }
        change(&mut wanted.topics, topic, party, wants);
        drop(wanted);
        self.topics_changed.notify_one();
    }

    /// Adds a topic to the interest of a caller, from `beginning` on if nobody else wants the topic.
    pub fn want_topic_from(&self, topic: &Topic, caller: Subscriber, beginning: Beginning) {
        if beginning != Beginning::Head {
            self.lock().beginnings.insert(caller.clone(), (topic.clone(), beginning));
        }
        self.want_topic(topic, caller, true);
    }

    /// The earliest beginning that a caller wants for a topic.
    pub fn beginning(&self, topic: &Topic) -> Beginning {
        let wanted = self.lock();
        let of_topic = wanted.beginnings.values().filter(|(of, _)| of == topic);
        of_topic.map(|(_, beginning)| *beginning).reduce(Beginning::min).unwrap_or_default()
    }

    /// The topics that any party wants.
    pub fn topics(&self) -> BTreeSet<Topic> {
        self.lock().topics.keys().cloned().collect()
    }

    /// The names that any party follows.
    pub fn names(&self) -> BTreeSet<IpnsName> {
        self.lock().names.keys().cloned().collect()
    }

    /// The followed names with their followers.
    pub fn followers(&self) -> BTreeMap<IpnsName, BTreeSet<Subscriber>> {
        self.lock().names.clone()
    }

    /// Takes the names that have a new follower since the last call.
    pub fn take_fresh(&self) -> BTreeSet<IpnsName> {
        std::mem::take(&mut self.lock().fresh)
    }

    /// Returns names to the set of those with a new follower.
    pub fn stay_fresh(&self, names: BTreeSet<IpnsName>) {
        self.lock().fresh.extend(names);
    }

    /// Waits until the set of wanted topics may have changed.
    pub async fn topics_changed(&self) {
        self.topics_changed.notified().await;
    }

    /// Waits until the set of followed names may have changed.
    pub async fn names_changed(&self) {
        self.names_changed.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().expect("no one panics while holding the interest")
    }
}

impl Wanted {
    /// Removes the whole interest of a party.
    fn leave(&mut self, party: &Subscriber) {
        fn leave<K: Ord>(all: &mut BTreeMap<K, BTreeSet<Subscriber>>, party: &Subscriber) {
            all.retain(|_, parties| {
                parties.remove(party);
                !parties.is_empty()
            });
        }
        leave(&mut self.topics, party);
        leave(&mut self.names, party);
    }
}

fn change<K: Ord + Clone>(
    wanted: &mut BTreeMap<K, BTreeSet<Subscriber>>,
    key: &K,
    party: Subscriber,
    wants: bool,
) {
    if wants {
        wanted.entry(key.clone()).or_default().insert(party);
    } else if let Some(parties) = wanted.get_mut(key) {
        parties.remove(&party);
        if parties.is_empty() {
            wanted.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry_context::SubscriptionRequest;

    #[test]
    fn a_subscription_that_is_not_in_the_log_yet_is_restored_too() {
        let (asked, ended): (Topic, Topic) = ("asked".parse().unwrap(), "ended".parse().unwrap());
        let mut context = EntryContext::default();
        context.ask_subscription(asked.clone(), SubscriptionRequest(Some(Beginning::Head)));
        context.ask_subscription(ended, SubscriptionRequest(None));
        let interest = Interest::default();
        interest.restore(&"probe".parse().unwrap(), &context);
        assert_eq!(interest.topics(), BTreeSet::from([asked]));
    }
}
