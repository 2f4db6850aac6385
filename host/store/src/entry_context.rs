//! Owns the context of an entry: the time, the listening spans, peers, subscriptions and followed names as of
//! that entry. Only entries of the log change it, so a second handling of an entry starts from the same
//! context.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use dim_model::beginning::Beginning;
use dim_model::entry::Resolution;
use dim_model::entry::{Entry, Event, Generation, Hearing, Kind, Offset, Origin};
use dim_model::ident::{ContentPath, IpnsName, KeyName, PeerName, PluginName, Topic};
use dim_model::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{Snapshot, StoreError, names};

/// Most listening spans that are kept for a topic. Older ones are dropped, which only shortens the listening
/// time that the plugin sees.
const SPANS: usize = 64;

/// The entry context of one plugin as of its cursor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EntryContext {
    /// The time of the last entry before the cursor, in nanoseconds since 1970.
    time: u64,
    subscriptions: BTreeSet<Topic>,
    /// Topics of the manifest to which the plugin is or was subscribed. If the plugin has ended such a
    /// subscription, the host must not begin it again.
    #[serde(default)]
    once: BTreeSet<Topic>,
    /// Requested subscriptions and unsubscriptions that are not in the log yet.
    #[serde(default)]
    asked: BTreeMap<Topic, SubscriptionRequest>,
    /// The topics of which the plugin still receives earlier events, with the entries of the subscriptions. The events
    /// of members that come to all plugins are not for it yet.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    catching_up: BTreeMap<Topic, u64>,
    /// Those of them of which the messages of this host come with the earlier events, too.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    own_too: BTreeSet<Topic>,
    follows: BTreeMap<IpnsName, Option<Resolution>>,
    /// The names of the plugin's own keys.
    #[serde(default)]
    own: BTreeMap<IpnsName, OwnName>,
    peers: BTreeMap<Topic, Vec<PeerName>>,
    /// For each topic the listening spans, in order, in nanoseconds since 1970.
    heard: BTreeMap<Topic, Vec<(u64, u64)>>,
    /// The generations whose work was reverted: the plugin ignores their entries in the log.
    #[serde(default, skip_serializing_if = "Void::is_empty")]
    void: Void,
    /// Changes of own names before this offset are already part of `own`.
    #[serde(default)]
    own_settled: u64,
}

/// A requested change of a subscription: the beginning of a new one, or `None` to end it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "StoredRequest", into = "StoredRequest")]
pub struct SubscriptionRequest(pub Option<Beginning>);

/// The stored form: `true`, `false`, or the beginning if it is not the head.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum StoredRequest {
    Subscribed(bool),
    Time { from: Timestamp },
    Earliest { from_earliest: bool },
}

impl From<StoredRequest> for SubscriptionRequest {
    fn from(stored: StoredRequest) -> Self {
        Self(match stored {
            StoredRequest::Subscribed(false) => None,
            StoredRequest::Subscribed(true) | StoredRequest::Earliest { from_earliest: false } => {
                Some(Beginning::Head)
            }
            StoredRequest::Earliest { from_earliest: true } => Some(Beginning::Earliest),
            StoredRequest::Time { from } => Some(Beginning::Time(from)),
        })
    }
}

impl From<SubscriptionRequest> for StoredRequest {
    fn from(SubscriptionRequest(requested): SubscriptionRequest) -> Self {
        match requested {
            None => Self::Subscribed(false),
            Some(Beginning::Head) => Self::Subscribed(true),
            Some(Beginning::Time(from)) => Self::Time { from },
            Some(Beginning::Earliest) => Self::Earliest { from_earliest: true },
        }
    }
}

/// Generations of code whose work was reverted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Void(BTreeSet<Generation>);

impl Void {
    /// Collects the reverted generations of `plugin` from a whole log.
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

    /// Adds the generations from `first` to the one before `end`.
    fn add(&mut self, first: Generation, end: Generation) {
        self.0.extend((first.0..end.0).map(Generation));
    }

    /// Whether the work of a generation was reverted.
    pub fn contains(&self, code: Generation) -> bool {
        self.0.contains(&code)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// An own name: its value in the log, and the value that the plugin has requested since.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OwnName {
    known: Option<Resolution>,
    asked: Option<Asked>,
}

/// A requested value that is not in the log yet.
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

    /// Updates the times of the value after the backend has accepted it; ignores an older value.
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

/// Whether an entry changed the context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContextChange {
    /// Nothing changed but the time.
    None,
    /// The context changed and must be stored.
    Some,
}

impl EntryContext {
    /// The time of the entry.
    pub fn time(&self) -> Timestamp {
        Timestamp(self.time)
    }

    /// Sets the time to that of an entry. It never decreases.
    pub fn set_time(&mut self, time: Timestamp) {
        self.time = self.time.max(time.0);
    }

    /// Applies the changes that `entry` makes to the context of `plugin`.
    pub fn observe(&mut self, plugin: &PluginName, entry: &Entry) -> ContextChange {
        match &entry.kind {
            Kind::Heard(topics) => {
                let mut change = ContextChange::None;
                for hearing in topics {
                    if self.subscriptions.contains(&hearing.topic) {
                        self.hear(hearing);
                        change = ContextChange::Some;
                    }
                }
                change
            }
            Kind::Peers { topic, peers } if self.subscriptions.contains(topic) => {
                self.peers.insert(topic.clone(), peers.clone());
                ContextChange::Some
            }
            Kind::Subscription { plugin: whose, topic, subscribed, beginning, own_too, by }
                if whose == plugin && !self.void.contains(*by) =>
            {
                if self.asked.get(topic).is_some_and(|it| it.0.is_some() == *subscribed) {
                    self.asked.remove(topic);
                }
                if *subscribed {
                    self.once.insert(topic.clone());
                    if self.subscriptions.insert(topic.clone()) && *beginning != Beginning::Head {
                        self.catching_up.insert(topic.clone(), entry.offset.0);
                        self.own_too.extend(own_too.then(|| topic.clone()));
                    }
                } else {
                    self.unsubscribe(topic);
                }
                ContextChange::Some
            }
            Kind::CaughtUp { plugin: whose, subscription, topic }
                if whose == plugin && self.catches_up(topic) == Some(*subscription) =>
            {
                self.stop_catching_up(topic);
                ContextChange::Some
            }
            Kind::Event(Event::NameChanged(resolution)) => {
                let is_news = entry.offset.0 >= self.own_settled;
                let own = self.own.get_mut(&resolution.name).filter(|_| is_news);
                let own = own.map(|own| own.changed(resolution));
                let followed =
                    self.follows.get_mut(&resolution.name).map(|known| *known = Some(resolution.clone()));
                if own.is_some() || followed.is_some() { ContextChange::Some } else { ContextChange::None }
            }
            Kind::NameConfirmed(resolution) => {
                let is_news = entry.offset.0 >= self.own_settled;
                let own = self.own.get_mut(&resolution.name).filter(|_| is_news);
                let own = own.map(|own| own.confirmed(resolution));
                let known = self.follows.get_mut(&resolution.name).and_then(Option::as_mut);
                let followed = known
                    .filter(|known| known.path == resolution.path)
                    .map(|known| *known = resolution.clone());
                if own.is_some() || followed.is_some() { ContextChange::Some } else { ContextChange::None }
            }
            _ => ContextChange::None,
        }
    }

    /// The entry of the subscription of which the plugin still receives the earlier events of a topic, if it does.
    pub fn catches_up(&self, topic: &Topic) -> Option<Offset> {
        self.catching_up.get(topic).copied().map(Offset)
    }

    /// The topics of which the plugin still receives earlier events, with the entries of the subscriptions.
    pub fn catching_up(&self) -> impl Iterator<Item = (&Topic, Offset)> {
        self.catching_up.iter().map(|(topic, offset)| (topic, Offset(*offset)))
    }

    /// Ends the receipt of earlier events of a topic.
    pub fn stop_catching_up(&mut self, topic: &Topic) {
        self.catching_up.remove(topic);
        self.own_too.remove(topic);
    }

    /// Records a requested subscription or its end; returns the earlier request for the topic.
    pub fn ask_subscription(
        &mut self,
        topic: Topic,
        requested: SubscriptionRequest,
    ) -> Option<SubscriptionRequest> {
        self.asked.insert(topic, requested)
    }

    /// Reverts [`EntryContext::ask_subscription`].
    pub fn restore_subscription(&mut self, topic: Topic, before: Option<SubscriptionRequest>) {
        match before {
            Some(before) => self.asked.insert(topic, before),
            None => self.asked.remove(&topic),
        };
    }

    /// Whether the plugin was never subscribed to a topic of its manifest, and has not requested it.
    pub fn is_new(&self, topic: &Topic) -> bool {
        let is_known = self.once.contains(topic) || self.subscriptions.contains(topic);
        !is_known && !self.asked.contains_key(topic)
    }

    /// Drops the ended subscriptions to topics outside the manifest. They have no effect, and a plugin may
    /// subscribe to an unbounded number of topics over time.
    pub fn forget_ended_but(&mut self, manifest: &[Topic]) -> ContextChange {
        let before = self.once.len();
        let kept: BTreeSet<&Topic> = manifest.iter().chain(&self.subscriptions).collect();
        self.once.retain(|topic| kept.contains(topic));
        if self.once.len() < before { ContextChange::Some } else { ContextChange::None }
    }

    /// The number of requests that would wait for the log after one more that concerns `topic`.
    pub fn count_asked_with(&self, topic: &Topic) -> usize {
        self.asked.len() + usize::from(!self.asked.contains_key(topic))
    }

    /// Ends a subscription whose grant was revoked. After a new grant it is a new subscription.
    pub fn revoke(&mut self, topic: &Topic) {
        self.once.remove(topic);
        self.unsubscribe(topic);
    }

    /// Whether the plugin will be subscribed once all its requests are in the log.
    pub fn will_hear(&self, topic: &Topic) -> bool {
        let asked = self.asked.get(topic).map(|it| it.0.is_some());
        asked.unwrap_or_else(|| self.subscriptions.contains(topic))
    }

    /// The requested subscriptions and unsubscriptions that are not in the log yet.
    pub fn asked(&self) -> impl Iterator<Item = (&Topic, SubscriptionRequest)> {
        self.asked.iter().map(|(topic, requested)| (topic, *requested))
    }

    /// The topics of the plugin's subscriptions once all its requests are in the log.
    pub fn topics_to_hear(&self) -> BTreeSet<&Topic> {
        let mut topics: BTreeSet<&Topic> = self.subscriptions.iter().collect();
        for (topic, requested) in &self.asked {
            if requested.0.is_some() {
                topics.insert(topic)
            } else {
                topics.remove(topic)
            };
        }
        topics
    }

    /// Ends a subscription, and drops the listening spans and the peers of the topic.
    pub fn unsubscribe(&mut self, topic: &Topic) {
        self.subscriptions.remove(topic);
        self.stop_catching_up(topic);
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

    /// The time for which the host listened on `topic` since `since`, and the time until which listening is proven.
    pub fn heard(&self, topic: &Topic, since: Timestamp) -> (Duration, Timestamp) {
        let spans = self.heard.get(topic).map_or(&[][..], Vec::as_slice);
        let listened = spans.iter().map(|(from, until)| until.saturating_sub(*from.max(&since.0))).sum();
        let confirmed = spans.last().map_or(0, |(_, until)| *until);
        (Duration::from_nanos(listened), Timestamp(confirmed))
    }

    /// The time until which listening is proven, for each topic.
    pub fn last_heard(&self) -> impl Iterator<Item = (&Topic, Timestamp)> {
        self.heard.iter().filter_map(|(topic, spans)| Some((topic, Timestamp(spans.last()?.1))))
    }

    /// The known peers on `topic`.
    pub fn peers(&self, topic: &Topic) -> &[PeerName] {
        self.peers.get(topic).map_or(&[], Vec::as_slice)
    }

    /// The topics of the plugin's subscriptions.
    pub fn subscriptions(&self) -> &BTreeSet<Topic> {
        &self.subscriptions
    }

    /// The followed names with their last known resolution.
    pub fn follows(&self) -> &BTreeMap<IpnsName, Option<Resolution>> {
        &self.follows
    }

    /// Whether the plugin may read the content behind a name: a followed name or an own name.
    pub fn knows(&self, name: &IpnsName) -> bool {
        self.follows.contains_key(name) || self.own.contains_key(name)
    }

    /// Follows a name; a known resolution stays.
    pub fn follow(&mut self, name: IpnsName) {
        self.follows.entry(name).or_insert(None);
    }

    /// Follows a name with a known resolution; reverts [`EntryContext::unfollow`].
    pub fn follow_known(&mut self, name: IpnsName, known: Option<Resolution>) {
        self.follows.insert(name, known);
    }

    /// Stops following a name; returns its last known resolution.
    pub fn unfollow(&mut self, name: &IpnsName) -> Option<Option<Resolution>> {
        self.follows.remove(name)
    }

    /// Adds an own name, with its resolution from before the plugin existed.
    pub fn add_own(&mut self, name: IpnsName, known: Option<Resolution>) {
        self.own.entry(name).or_insert(OwnName { known, asked: None });
    }

    /// Adds the names of own keys, with their published values from before the plugin existed.
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

    /// Replaces the values of own names by the stored ones, after the log has lost the entries about them.
    pub fn renew_own_names(
        &mut self,
        snapshot: &Snapshot,
        own: impl IntoIterator<Item = (KeyName, IpnsName)>,
    ) -> Result<(), StoreError> {
        let own = known_of(snapshot, own)?.into_iter();
        self.own.extend(own.map(|(name, known)| (name, OwnName { known, asked: None })));
        Ok(())
    }

    /// The resolution of an own name, including a requested value.
    pub fn own(&self, name: &IpnsName) -> Option<Resolution> {
        self.own.get(name)?.resolution(name)
    }

    /// Records a requested value of an own name; returns the earlier state.
    pub fn ask_own(&mut self, name: &IpnsName, path: ContentPath, valid_until: Timestamp) -> OwnName {
        let own = self.own.entry(name.clone()).or_default();
        let before = own.clone();
        let is_known = own.known.as_ref().is_some_and(|known| known.path == path);
        own.asked = (!is_known).then_some(Asked { path, valid_until });
        before
    }

    /// Continues in place of the reverted generations from `first` to the one before `end`, and ignores their
    /// entries in the log. `own` contains the values of the own names as of the entry at `head`.
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

    /// Decodes the stored form.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StoreError> {
        serde_json::from_slice(bytes).map_err(|error| StoreError::corrupt("worlds", error))
    }

    /// Encodes the stored form.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("an entry context is plain data")
    }

    /// Sets the reverted generations before the first entry, from the end of a whole log.
    pub fn set_void(&mut self, void: Void) {
        self.void = void;
    }

    /// Reverts [`EntryContext::ask_own`].
    pub fn restore_own(&mut self, name: IpnsName, before: OwnName) {
        self.own.insert(name, before);
    }

    /// The event that `entry` is for `plugin`, if it is one. A plugin does not receive its own messages.
    pub fn event_for(&self, plugin: &PluginName, entry: &Entry) -> Option<Event> {
        match &entry.kind {
            Kind::Event(event) if self.concerns(plugin, event) => Some(event.clone()),
            Kind::Earlier { plugin: whose, subscription, event } if whose == plugin => {
                let current = self.catches_up(event.topic()?)?;
                (current == *subscription).then(|| event.clone())
            }
            Kind::Again { plugin: whose, event, by, .. } if whose == plugin && !self.void.contains(*by) => {
                Some(event.clone())
            }
            _ => None,
        }
    }

    fn concerns(&self, plugin: &PluginName, event: &Event) -> bool {
        match event {
            Event::Message { topic, origin, .. } => {
                let is_later = match origin {
                    Origin::Member(_) => self.catching_up.contains_key(topic),
                    Origin::Plugin(_) | Origin::Host => self.own_too.contains(topic),
                    Origin::Peer(_) => false,
                };
                !matches!(origin, Origin::Plugin(sender) if sender == plugin)
                    && self.subscriptions.contains(topic)
                    && !is_later
            }
            Event::Gap { topic, missing, .. } => {
                let is_later = missing.is_some() && self.catching_up.contains_key(topic);
                self.subscriptions.contains(topic) && !is_later
            }
            Event::NameChanged(resolution) => self.follows.contains_key(&resolution.name),
            Event::Timer { .. } => false,
        }
    }
}

/// The names of own keys, each with its published value.
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

    fn subscription(plugin: &PluginName, topic: &Topic, beginning: Option<Beginning>) -> Kind {
        Kind::Subscription {
            plugin: plugin.clone(),
            topic: topic.clone(),
            subscribed: beginning.is_some(),
            beginning: beginning.unwrap_or_default(),
            own_too: beginning.is_some(),
            by: Generation(0),
        }
    }

    fn heard(topic: &Topic, since: u64, until: u64) -> Entry {
        let hearing = Hearing { topic: topic.clone(), since: Timestamp(since), until: Timestamp(until) };
        Entry { offset: Offset(0), time: Timestamp(until), kind: Kind::Heard(vec![hearing]) }
    }

    #[test]
    fn a_world_does_not_grow_with_the_topics_that_were_ended() {
        let plugin: PluginName = "probe".parse().unwrap();
        let topic = |number: usize| format!("probe.{number}").parse::<Topic>().unwrap();
        let manifest = [topic(0), topic(1)];
        let mut context = EntryContext::default();
        let tell = |context: &mut EntryContext, topic: Topic, subscribed: bool| {
            let kind = subscription(&plugin, &topic, subscribed.then_some(Beginning::Head));
            context.observe(&plugin, &Entry { offset: Offset(0), time: Timestamp(0), kind });
        };
        for number in 0..1_000 {
            tell(&mut context, topic(number), true);
            if number != 7 {
                tell(&mut context, topic(number), false);
            }
        }
        // As stored by a host that did not drop ended subscriptions.
        let stored = context.to_bytes();
        assert!(stored.len() > 10_000);
        let mut context = EntryContext::from_bytes(&stored).unwrap();
        assert_eq!(context.forget_ended_but(&manifest), ContextChange::Some);
        assert_eq!(context.forget_ended_but(&manifest), ContextChange::None);
        assert!(context.to_bytes().len() < 1_000);
        assert!(!context.is_new(&topic(0)), "it has ended a subscription of the manifest");
        assert!(!context.is_new(&topic(7)), "it is subscribed");
        assert!(context.is_new(&topic(8)));
    }

    #[test]
    fn time_that_was_not_listened_does_not_count() {
        let (plugin, topic) = ("watchdog".parse().unwrap(), "beats".parse::<Topic>().unwrap());
        let mut context = EntryContext::default();
        let kind = subscription(&plugin, &topic, Some(Beginning::Head));
        context.observe(&plugin, &Entry { offset: Offset(0), time: Timestamp(0), kind });
        for (since, until) in [(10, 20), (20, 30), (100, 130)] {
            context.observe(&plugin, &heard(&topic, since, until));
        }
        assert_eq!(context.heard(&topic, Timestamp(0)), (Duration::from_nanos(50), Timestamp(130)));
        assert_eq!(context.heard(&topic, Timestamp(25)), (Duration::from_nanos(35), Timestamp(130)));
        assert_eq!(context.heard(&topic, Timestamp(200)), (Duration::ZERO, Timestamp(130)));
    }

    #[test]
    fn a_plugin_that_catches_up_receives_the_events_of_members_once_and_in_order() {
        let (plugin, other): (PluginName, PluginName) = ("late".parse().unwrap(), "early".parse().unwrap());
        let topic = "jobs".parse::<Topic>().unwrap();
        let event = |sequence| Event::Message {
            topic: topic.clone(),
            data: bytes::Bytes::new(),
            origin: Origin::Member(dim_model::entry::MemberEvent {
                writer: "k51qzi5uqu5dlmit2tuwdvnx4sbnyqgmvbxftl0eo3f33wwtb9gr7yozae9kpw".parse().unwrap(),
                incarnation: [1; 16],
                sequence,
                time: Timestamp(0),
            }),
        };
        let earlier = |plugin: &PluginName, of, event| {
            let (plugin, subscription) = (plugin.clone(), Offset(of));
            Kind::Earlier { plugin, subscription, event }
        };
        let caught_up = |plugin: &PluginName, of| {
            let (plugin, topic, subscription) = (plugin.clone(), topic.clone(), Offset(of));
            Kind::CaughtUp { plugin, subscription, topic }
        };
        let own = || {
            let (topic, data, origin) = (topic.clone(), bytes::Bytes::new(), Origin::Host);
            Kind::Event(Event::Message { topic, data, origin })
        };
        let mut context = EntryContext::default();
        let mut received = Vec::new();
        let kinds = [
            earlier(&plugin, 1, event(0)),
            subscription(&plugin, &topic, Some(Beginning::Earliest)),
            Kind::Event(event(2)),
            // A message of the host comes as an earlier one, too.
            own(),
            earlier(&other, 1, event(0)),
            // It belongs to an earlier subscription.
            earlier(&plugin, 0, event(0)),
            earlier(&plugin, 1, event(1)),
            // A second subscription changes nothing.
            subscription(&plugin, &topic, Some(Beginning::Earliest)),
            earlier(&plugin, 1, event(2)),
            caught_up(&other, 1),
            caught_up(&plugin, 0),
            Kind::Event(event(3)),
            earlier(&plugin, 1, event(3)),
            caught_up(&plugin, 1),
            earlier(&plugin, 1, event(4)),
            Kind::Event(event(4)),
            subscription(&plugin, &topic, Some(Beginning::Earliest)),
            Kind::Event(event(5)),
            own(),
        ];
        for (offset, kind) in (0..).zip(kinds) {
            let entry = Entry { offset: Offset(offset), time: Timestamp(0), kind };
            context.observe(&plugin, &entry);
            context = EntryContext::from_bytes(&context.to_bytes()).unwrap();
            received.extend(context.event_for(&plugin, &entry));
        }
        let Kind::Event(last) = own() else { unreachable!() };
        assert_eq!(received, (1..=5).map(event).chain([last]).collect::<Vec<_>>());
    }

    #[test]
    fn requested_subscriptions_are_stored_in_the_form_of_earlier_versions_unless_they_begin_elsewhere() {
        for (requested, stored) in [
            (Some(Beginning::Head), "true"),
            (None, "false"),
            (Some(Beginning::Earliest), r#"{"from_earliest":true}"#),
            (Some(Beginning::Time(Timestamp(0))), r#"{"from":"1970-01-01T00:00:00Z"}"#),
        ] {
            assert_eq!(serde_json::to_string(&SubscriptionRequest(requested)).unwrap(), stored);
            assert_eq!(
                serde_json::from_str::<SubscriptionRequest>(stored).unwrap(),
                SubscriptionRequest(requested)
            );
        }
    }
}
