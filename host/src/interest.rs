//! Owns who wants what from outside: the topics that are subscribed to and the names that are
//! followed, by any plugin of this host or by the API.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard};

use tokio::sync::Notify;

use crate::ident::{IpnsName, PluginName, Topic};
use crate::plugin::{Batch, World};

/// Whoever wants something: a plugin, or a caller of the API by a running number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Party {
    /// A plugin.
    Plugin(PluginName),
    /// What ran before a plugin's code that is on probation: if it goes on, it must have missed nothing.
    Fallback(PluginName),
    /// A caller of the API, for as long as it listens.
    Caller(u64),
}

/// What is wanted from outside.
#[derive(Debug, Default)]
pub struct Interest {
    wanted: Mutex<Wanted>,
    topics_changed: Notify,
    names_changed: Notify,
}

#[derive(Debug, Default)]
struct Wanted {
    topics: BTreeMap<Topic, BTreeSet<Party>>,
    names: BTreeMap<IpnsName, BTreeSet<Party>>,
    /// Names that someone new follows: what is known of them is said again.
    fresh: BTreeSet<IpnsName>,
}

impl Interest {
    /// Takes in what a plugin wants in the world `world`, and nothing else.
    pub fn restore(&self, plugin: &PluginName, world: &World) {
        self.set(Party::Plugin(plugin.clone()), world);
    }

    /// Goes on with what a plugin wanted, in the world `world`, before its code was replaced.
    pub fn go_back(&self, plugin: &PluginName, world: &World) {
        self.set(Party::Plugin(plugin.clone()), world);
        self.forget(&Party::Fallback(plugin.clone()));
    }

    /// Keeps what a plugin wants, or wanted in the world `world`, while its new code is on probation.
    pub fn keep(&self, plugin: &PluginName, world: &World) {
        self.set(Party::Fallback(plugin.clone()), world);
    }

    /// Forgets all that a party wants.
    pub fn forget(&self, party: &Party) {
        let mut wanted = self.lock();
        wanted.leave(party);
        drop(wanted);
        self.topics_changed.notify_one();
        self.names_changed.notify_one();
    }

    fn set(&self, party: Party, world: &World) {
        let mut wanted = self.lock();
        wanted.leave(&party);
        for topic in world.topics_to_hear() {
            wanted.topics.entry(topic.clone()).or_default().insert(party.clone());
        }
        for (name, known) in world.follows() {
            wanted.names.entry(name.clone()).or_default().insert(party.clone());
            if known.is_none() {
                wanted.fresh.insert(name.clone());
            }
        }
        drop(wanted);
        self.topics_changed.notify_one();
        self.names_changed.notify_one();
    }

    /// Takes in what a batch changed, once it is durable.
    pub fn update(&self, batch: &Batch) {
        let party = Party::Plugin(batch.plugin.clone());
        if batch.handover.is_some() {
            self.keep_all(&party, &Party::Fallback(batch.plugin.clone()));
        }
        if batch.verdict.is_some() {
            self.forget(&Party::Fallback(batch.plugin.clone()));
        }
        for (topic, subscribed) in &batch.subscriptions {
            self.want_topic(topic, party.clone(), *subscribed);
        }
        for (name, followed) in &batch.follows {
            let mut wanted = self.lock();
            change(&mut wanted.names, name, party.clone(), *followed);
            if *followed {
                wanted.fresh.insert(name.clone());
            }
            drop(wanted);
            self.names_changed.notify_one();
        }
    }

    /// Lets `to` want all that `from` wants.
    fn keep_all(&self, from: &Party, to: &Party) {
        let mut wanted = self.lock();
        let Wanted { topics, names, .. } = &mut *wanted;
        for parties in topics.values_mut().chain(names.values_mut()).filter(|parties| parties.contains(from))
        {
            parties.insert(to.clone());
        }
    }

    /// Says that a party wants a topic, or does not any more.
    pub fn want_topic(&self, topic: &Topic, party: Party, wants: bool) {
        change(&mut self.lock().topics, topic, party, wants);
        self.topics_changed.notify_one();
    }

    /// The topics that anyone wants.
    pub fn topics(&self) -> BTreeSet<Topic> {
        self.lock().topics.keys().cloned().collect()
    }

    /// The names that anyone follows.
    pub fn names(&self) -> BTreeSet<IpnsName> {
        self.lock().names.keys().cloned().collect()
    }

    /// The names that anyone follows, and who.
    pub fn followers(&self) -> BTreeMap<IpnsName, BTreeSet<Party>> {
        self.lock().names.clone()
    }

    /// The names that someone new follows since this was last asked.
    pub fn take_fresh(&self) -> BTreeSet<IpnsName> {
        std::mem::take(&mut self.lock().fresh)
    }

    /// Puts names back among those that someone new follows.
    pub fn stay_fresh(&self, names: BTreeSet<IpnsName>) {
        self.lock().fresh.extend(names);
    }

    /// Waits until other topics may be wanted.
    pub async fn topics_changed(&self) {
        self.topics_changed.notified().await;
    }

    /// Waits until other names may be followed.
    pub async fn names_changed(&self) {
        self.names_changed.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().expect("no one panics while holding the interest")
    }
}

impl Wanted {
    /// Forgets all that a party wants.
    fn leave(&mut self, party: &Party) {
        fn leave<K: Ord>(all: &mut BTreeMap<K, BTreeSet<Party>>, party: &Party) {
            all.retain(|_, parties| {
                parties.remove(party);
                !parties.is_empty()
            });
        }
        leave(&mut self.topics, party);
        leave(&mut self.names, party);
    }
}

fn change<K: Ord + Clone>(wanted: &mut BTreeMap<K, BTreeSet<Party>>, key: &K, party: Party, wants: bool) {
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

    #[test]
    fn a_subscription_that_is_not_in_the_log_yet_is_restored_too() {
        let (asked, ended): (Topic, Topic) = ("asked".parse().unwrap(), "ended".parse().unwrap());
        let mut world = World::default();
        world.ask_subscription(asked.clone(), true);
        world.ask_subscription(ended, false);
        let interest = Interest::default();
        interest.restore(&"probe".parse().unwrap(), &world);
        assert_eq!(interest.topics(), BTreeSet::from([asked]));
    }
}
