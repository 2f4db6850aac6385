//! Owns what surrounds an entry: the time, what was listened to, peers, subscriptions and followed
//! names as of that entry. It changes only by entries of the log, so that handling an entry again
//! starts from the same world.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::entry::Resolution;
use crate::entry::{Entry, Event, Generation, Hearing, Kind, Offset, Origin};
use crate::ident::{ContentPath, IpnsName, KeyName, PeerName, PluginName, Topic};
use crate::store::{Snapshot, StoreError, names};
use crate::time::Timestamp;

/// How many spans of listening are kept for a topic. Older ones are forgotten, which can only make
/// the plugin count less listening than there was.
const SPANS: usize = 64;

/// The world of one plugin as of its cursor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct World {
    /// Nanoseconds since 1970: the time of the last entry before the cursor.
    time: u64,
    subscriptions: BTreeSet<Topic>,
    /// Topics of the manifest to which the plugin was subscribed at any time and may still be: it may have ended a
    /// subscription, which is not to begin again.
    #[serde(default)]
    once: BTreeSet<Topic>,
    /// Subscriptions (true) and their ends that were asked for and are not in the log yet.
    #[serde(default)]
    asked: BTreeMap<Topic, bool>,
    follows: BTreeMap<IpnsName, Option<Resolution>>,
    /// The names of the plugin's own keys.
    #[serde(default)]
    own: BTreeMap<IpnsName, OwnName>,
    peers: BTreeMap<Topic, Vec<PeerName>>,
    /// For each topic the spans that were listened to, in order.
    heard: BTreeMap<Topic, Vec<(u64, u64)>>,
    /// The codes whose work was taken back: what they caused in the log has not happened.
    #[serde(default, skip_serializing_if = "Void::is_empty")]
    void: Void,
    /// Changes of own names before this entry are of that time, and settled.
    #[serde(default)]
    own_settled: u64,
}

/// Codes whose work was taken back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Void(BTreeSet<Generation>);

impl Void {
    /// The codes of `plugin` whose work was taken back, by a whole log.
    pub fn of(plugin: &PluginName, entries: &[Entry]) -> Self {
        let mut void = Self::default();
        for entry in entries {
            if let Kind::Code { plugin: whose, generation, voids: Some(first), .. } = &entry.kind
                && whose == plugin
            {
                void.add(*first, *generation);
            }
        }
        void
    }

    /// Adds those from `first` to the one before `end`.
    fn add(&mut self, first: Generation, end: Generation) {
        self.0.extend((first.0..end.0).map(Generation));
    }

    /// Whether the work of a code was taken back.
    pub fn contains(&self, code: Generation) -> bool {
        self.0.contains(&code)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// An own name: what the log says of it, and what the plugin has asked for since.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OwnName {
    known: Option<Resolution>,
    asked: Option<Asked>,
}

/// A value that was asked for and is not in the log yet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    path: ContentPath,
    valid_until: Timestamp,
}

impl OwnName {
    fn changed(&mut self, resolution: &Resolution) {
        self.asked.take_if(|asked| asked.path == resolution.path);
        self.known = Some(resolution.clone());
    }

    /// The backend has a value; an older one than is known says nothing new.
    fn confirmed(&mut self, resolution: &Resolution) {
        if let Some(known) = self.known.as_mut().filter(|known| known.path == resolution.path) {
            known.valid_until = resolution.valid_until;
            known.confirmed_at = resolution.confirmed_at;
        }
    }

    fn resolution(&self, name: &IpnsName) -> Option<Resolution> {
        let Some(asked) = &self.asked else { return self.known.clone() };
        Some(Resolution {
            name: name.clone(),
            path: asked.path.clone(),
            sequence: self.known.as_ref().map_or(1, |known| known.sequence + 1),
            valid_until: asked.valid_until,
            confirmed_at: self.known.as_ref().map_or(Timestamp(0), |known| known.confirmed_at),
        })
    }
}

/// Whether an entry changed the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// As it was, but for the time.
    None,
    /// Something that must be stored.
    Some,
}

impl World {
    /// The time of the entry.
    pub fn time(&self) -> Timestamp {
        Timestamp(self.time)
    }

    /// Lets the time of `entry` be now.
    pub fn set_time(&mut self, time: Timestamp) {
        self.time = self.time.max(time.0);
    }

    /// Takes in what `entry` says of the world of `plugin`.
    pub fn observe(&mut self, plugin: &PluginName, entry: &Entry) -> Change {
        match &entry.kind {
            Kind::Heard(topics) => {
                let mut change = Change::None;
                for hearing in topics {
                    if self.subscriptions.contains(&hearing.topic) {
                        self.hear(hearing);
                        change = Change::Some;
                    }
                }
                change
            }
            Kind::Peers { topic, peers } if self.subscriptions.contains(topic) => {
                self.peers.insert(topic.clone(), peers.clone());
                Change::Some
            }
            Kind::Subscription { plugin: whose, topic, subscribed, by }
                if whose == plugin && !self.void.contains(*by) =>
            {
                if self.asked.get(topic) == Some(subscribed) {
                    self.asked.remove(topic);
                }
                if *subscribed {
                    self.once.insert(topic.clone());
                    self.subscriptions.insert(topic.clone());
                } else {
                    self.unsubscribe(topic);
                }
                Change::Some
            }
            Kind::Event(Event::NameChanged(resolution)) => {
                let is_news = entry.offset.0 >= self.own_settled;
                let own = self.own.get_mut(&resolution.name).filter(|_| is_news);
                let own = own.map(|own| own.changed(resolution));
                let followed =
                    self.follows.get_mut(&resolution.name).map(|known| *known = Some(resolution.clone()));
                if own.is_some() || followed.is_some() { Change::Some } else { Change::None }
            }
            Kind::NameConfirmed(resolution) => {
                let is_news = entry.offset.0 >= self.own_settled;
                let own = self.own.get_mut(&resolution.name).filter(|_| is_news);
                let own = own.map(|own| own.confirmed(resolution));
                let known = self.follows.get_mut(&resolution.name).and_then(Option::as_mut);
                let followed = known
                    .filter(|known| known.path == resolution.path)
                    .map(|known| *known = resolution.clone());
                if own.is_some() || followed.is_some() { Change::Some } else { Change::None }
            }
            _ => Change::None,
        }
    }

    /// Notes that a subscription or its end was asked for; returns what stood there before.
    pub fn ask_subscription(&mut self, topic: Topic, subscribed: bool) -> Option<bool> {
        self.asked.insert(topic, subscribed)
    }

    /// Takes back what [`World::ask_subscription`] did.
    pub fn restore_subscription(&mut self, topic: Topic, before: Option<bool>) {
        match before {
            Some(before) => self.asked.insert(topic, before),
            None => self.asked.remove(&topic),
        };
    }

    /// Whether the plugin was never subscribed to a topic of its manifest, and has not asked for it.
    pub fn is_new(&self, topic: &Topic) -> bool {
        let is_known = self.once.contains(topic) || self.subscriptions.contains(topic);
        !is_known && !self.asked.contains_key(topic)
    }

    /// Forgets the ended subscriptions to other topics than those of the manifest: they count for nothing, and a plugin
    /// may subscribe to ever new topics.
    pub fn forget_ended_but(&mut self, manifest: &[Topic]) -> Change {
        let before = self.once.len();
        let kept: BTreeSet<&Topic> = manifest.iter().chain(&self.subscriptions).collect();
        self.once.retain(|topic| kept.contains(topic));
        if self.once.len() < before { Change::Some } else { Change::None }
    }

    /// How many subscriptions and ends of them would wait for the log with one that concerns `topic`.
    pub fn count_asked_with(&self, topic: &Topic) -> usize {
        self.asked.len() + usize::from(!self.asked.contains_key(topic))
    }

    /// Ends a subscription that is not granted any more; granted again, it is a new one.
    pub fn revoke(&mut self, topic: &Topic) {
        self.once.remove(topic);
        self.unsubscribe(topic);
    }

    /// Whether the plugin will be subscribed once all that it asked for is in the log.
    pub fn will_hear(&self, topic: &Topic) -> bool {
        self.asked.get(topic).copied().unwrap_or_else(|| self.subscriptions.contains(topic))
    }

    /// The subscriptions, and their ends, that were asked for and are not in the log yet.
    pub fn asked(&self) -> impl Iterator<Item = (&Topic, bool)> {
        self.asked.iter().map(|(topic, subscribed)| (topic, *subscribed))
    }

    /// The topics that the plugin will be subscribed to once all that it asked for is in the log.
    pub fn topics_to_hear(&self) -> BTreeSet<&Topic> {
        let mut topics: BTreeSet<&Topic> = self.subscriptions.iter().collect();
        for (topic, subscribed) in &self.asked {
            if *subscribed {
                topics.insert(topic)
            } else {
                topics.remove(topic)
            };
        }
        topics
    }

    /// Ends a subscription, and forgets what was heard on it.
    pub fn unsubscribe(&mut self, topic: &Topic) {
        self.subscriptions.remove(topic);
        self.heard.remove(topic);
        self.peers.remove(topic);
    }

    fn hear(&mut self, hearing: &Hearing) {
        let spans = self.heard.entry(hearing.topic.clone()).or_default();
        match spans.last_mut() {
            Some((_, until)) if hearing.since.0 <= *until => *until = (*until).max(hearing.until.0),
            _ => spans.push((hearing.since.0, hearing.until.0)),
        }
        if spans.len() > SPANS {
            spans.remove(0);
        }
    }

    /// For how long `topic` was listened to since `since`, and until when that is proven.
    pub fn heard(&self, topic: &Topic, since: Timestamp) -> (Duration, Timestamp) {
        let spans = self.heard.get(topic).map_or(&[][..], Vec::as_slice);
        let listened = spans.iter().map(|(from, until)| until.saturating_sub(*from.max(&since.0))).sum();
        let confirmed = spans.last().map_or(0, |(_, until)| *until);
        (Duration::from_nanos(listened), Timestamp(confirmed))
    }

    /// Until when each topic is proven to have been listened to.
    pub fn last_heard(&self) -> impl Iterator<Item = (&Topic, Timestamp)> {
        self.heard.iter().filter_map(|(topic, spans)| Some((topic, Timestamp(spans.last()?.1))))
    }

    /// The peers that were known on `topic`.
    pub fn peers(&self, topic: &Topic) -> &[PeerName] {
        self.peers.get(topic).map_or(&[], Vec::as_slice)
    }

    /// The topics that the plugin is subscribed to.
    pub fn subscriptions(&self) -> &BTreeSet<Topic> {
        &self.subscriptions
    }

    /// The followed names with what is known of each.
    pub fn follows(&self) -> &BTreeMap<IpnsName, Option<Resolution>> {
        &self.follows
    }

    /// Whether the plugin may read what a name points to: it is followed, or its own.
    pub fn knows(&self, name: &IpnsName) -> bool {
        self.follows.contains_key(name) || self.own.contains_key(name)
    }

    /// Follows a name; what was known of it stays known.
    pub fn follow(&mut self, name: IpnsName) {
        self.follows.entry(name).or_insert(None);
    }

    /// Follows a name with what is known of it, or takes back what [`World::unfollow`] took.
    pub fn follow_known(&mut self, name: IpnsName, known: Option<Resolution>) {
        self.follows.insert(name, known);
    }

    /// Stops following a name and returns what was known of it.
    pub fn unfollow(&mut self, name: &IpnsName) -> Option<Option<Resolution>> {
        self.follows.remove(name)
    }

    /// Takes note of an own name, with what was known of it before the plugin was there.
    pub fn add_own(&mut self, name: IpnsName, known: Option<Resolution>) {
        self.own.entry(name).or_insert(OwnName { known, asked: None });
    }

    /// Takes note of the names of own keys, with what was published under them before the plugin was there.
    pub fn add_own_names(
        &mut self,
        snapshot: &Snapshot,
        own: impl IntoIterator<Item = (KeyName, IpnsName)>,
    ) -> Result<(), StoreError> {
        for (name, known) in known_of(snapshot, own)? {
            self.add_own(name, known);
        }
        Ok(())
    }

    /// Takes note of what the names of own keys are by now: the entries that say so are gone.
    pub fn renew_own_names(
        &mut self,
        snapshot: &Snapshot,
        own: impl IntoIterator<Item = (KeyName, IpnsName)>,
    ) -> Result<(), StoreError> {
        let own = known_of(snapshot, own)?.into_iter();
        self.own.extend(own.map(|(name, known)| (name, OwnName { known, asked: None })));
        Ok(())
    }

    /// What is known of an own name, what was asked for included.
    pub fn own(&self, name: &IpnsName) -> Option<Resolution> {
        self.own.get(name)?.resolution(name)
    }

    /// Notes that a value was asked for; returns what stood there before.
    pub fn ask_own(&mut self, name: &IpnsName, path: ContentPath, valid_until: Timestamp) -> OwnName {
        let own = self.own.entry(name.clone()).or_default();
        let before = own.clone();
        let is_known = own.known.as_ref().is_some_and(|known| known.path == path);
        own.asked = (!is_known).then_some(Asked { path, valid_until });
        before
    }

    /// Goes on from here in place of the codes from `first` to the one before `end`: what they caused in the
    /// log has not happened. `own` is what the own names are, as of the entry at `head`.
    pub fn void(
        &mut self,
        (first, end): (Generation, Generation),
        own: BTreeMap<IpnsName, Option<Resolution>>,
        head: Offset,
    ) {
        self.void.add(first, end);
        self.own = own.into_iter().map(|(name, known)| (name, OwnName { known, asked: None })).collect();
        self.own_settled = head.0;
    }

    /// Reads the stored form.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StoreError> {
        serde_json::from_slice(bytes).map_err(|error| StoreError::corrupt("worlds", error))
    }

    /// The stored form.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a world is plain data")
    }

    /// Knows from the beginning which codes' work was taken back in the end.
    pub fn set_void(&mut self, void: Void) {
        self.void = void;
    }

    /// Takes back what [`World::ask_own`] did.
    pub fn restore_own(&mut self, name: IpnsName, before: OwnName) {
        self.own.insert(name, before);
    }

    /// The event that `entry` is for `plugin`, if it is one. A plugin does not hear itself.
    pub fn event_for(&self, plugin: &PluginName, entry: &Entry) -> Option<Event> {
        match &entry.kind {
            Kind::Event(event) if self.concerns(plugin, event) => Some(event.clone()),
            Kind::Again { plugin: whose, event, by, .. } if whose == plugin && !self.void.contains(*by) => {
                Some(event.clone())
            }
            _ => None,
        }
    }

    fn concerns(&self, plugin: &PluginName, event: &Event) -> bool {
        match event {
            Event::Message { topic, origin, .. } => {
                !matches!(origin, Origin::Plugin(sender) if sender == plugin)
                    && self.subscriptions.contains(topic)
            }
            Event::Gap { topic, .. } => self.subscriptions.contains(topic),
            Event::NameChanged(resolution) => self.follows.contains_key(&resolution.name),
            Event::Timer { .. } => false,
        }
    }
}

/// The names of own keys, each with what is published under it.
fn known_of(
    snapshot: &Snapshot,
    own: impl IntoIterator<Item = (KeyName, IpnsName)>,
) -> Result<Vec<(IpnsName, Option<Resolution>)>, StoreError> {
    let known = own.into_iter().map(|(key, name)| {
        let known = names::known(snapshot, &key)?.map(|known| known.resolution(name.clone()));
        Ok((name, known))
    });
    known.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(topic: &Topic, since: u64, until: u64) -> Entry {
        let hearing = Hearing { topic: topic.clone(), since: Timestamp(since), until: Timestamp(until) };
        Entry { offset: Offset(0), time: Timestamp(until), kind: Kind::Heard(vec![hearing]) }
    }

    #[test]
    fn a_world_does_not_grow_with_the_topics_that_were_ended() {
        let plugin: PluginName = "probe".parse().unwrap();
        let topic = |number: usize| format!("probe.{number}").parse::<Topic>().unwrap();
        let manifest = [topic(0), topic(1)];
        let mut world = World::default();
        let tell = |world: &mut World, topic: Topic, subscribed: bool| {
            let kind = Kind::Subscription { plugin: plugin.clone(), topic, subscribed, by: Generation(0) };
            world.observe(&plugin, &Entry { offset: Offset(0), time: Timestamp(0), kind });
        };
        for number in 0..1_000 {
            tell(&mut world, topic(number), true);
            if number != 7 {
                tell(&mut world, topic(number), false);
            }
        }
        // As a host has stored it that did not forget.
        let stored = world.to_bytes();
        assert!(stored.len() > 10_000);
        let mut world = World::from_bytes(&stored).unwrap();
        assert_eq!(world.forget_ended_but(&manifest), Change::Some);
        assert_eq!(world.forget_ended_but(&manifest), Change::None);
        assert!(world.to_bytes().len() < 1_000);
        assert!(!world.is_new(&topic(0)), "it has ended a subscription of the manifest");
        assert!(!world.is_new(&topic(7)), "it is subscribed");
        assert!(world.is_new(&topic(8)));
    }

    #[test]
    fn time_that_was_not_listened_does_not_count() {
        let (plugin, topic) = ("watchdog".parse().unwrap(), "beats".parse::<Topic>().unwrap());
        let mut world = World::default();
        let subscription = Kind::Subscription {
            plugin: "watchdog".parse().unwrap(),
            topic: topic.clone(),
            subscribed: true,
            by: Generation(0),
        };
        world.observe(&plugin, &Entry { offset: Offset(0), time: Timestamp(0), kind: subscription });
        for (since, until) in [(10, 20), (20, 30), (100, 130)] {
            world.observe(&plugin, &heard(&topic, since, until));
        }
        assert_eq!(world.heard(&topic, Timestamp(0)), (Duration::from_nanos(50), Timestamp(130)));
        assert_eq!(world.heard(&topic, Timestamp(25)), (Duration::from_nanos(35), Timestamp(130)));
        assert_eq!(world.heard(&topic, Timestamp(200)), (Duration::ZERO, Timestamp(130)));
    }
}
