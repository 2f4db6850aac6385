//! Owns the handling of entries in a trial: append, call, record, commit. Receives entries from outside; adds the calls
//! and their effects to the trial.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dim_model::beginning::Beginning;
use dim_model::entry::{Entry, Event, Hearing, Kind, Origin};
use dim_model::ident::{IpnsName, Topic};
use dim_model::time::Timestamp;
use dim_runtime::{Done, Started, Step};
use dim_server::host::Storage;
use dim_store::commit::NameChange;
use dim_store::effect::Asked;
use dim_store::followed_names::Followed;
use dim_store::retry_scheduler;
use futures::FutureExt as _;

use super::{Cause, Happened, Listening, Trial};
use crate::TrialError;
use crate::wiring::Wiring;

/// Maximum number of entries in one commit. Entries with other effects than state and timers are committed immediately.
const TOGETHER: usize = 256;

impl Trial {
    /// Appends an entry from outside and handles it. There may be an interruption, except for listening records and
    /// lists of peers.
    pub(super) fn append(&mut self, kind: Kind) -> Result<(), TrialError> {
        if let Kind::Event(event) = &kind
            && self.comes_earlier(event)
            && !self.kept.is_recorded
        {
            self.kept.events.push((self.now(), event.clone()));
        }
        let kind = self.of_this_trial(kind);
        if matches!(kind, Kind::Heard(_) | Kind::Peers { .. }) {
            self.append_quietly(kind)?;
        } else {
            self.with_interruption(|trial| trial.append_quietly(kind))?;
        }
        self.catch_up()?;
        self.tell_names()
    }

    /// Replaces the subscription of a recorded earlier event by that of this trial.
    fn of_this_trial(&self, kind: Kind) -> Kind {
        let context = self.wiring.actor.context();
        let current = |topic: Option<&Topic>, recorded| {
            topic.and_then(|topic| context.catches_up(topic)).unwrap_or(recorded)
        };
        match kind {
            Kind::Earlier { plugin, subscription, event } => {
                Kind::Earlier { plugin, subscription: current(event.topic(), subscription), event }
            }
            Kind::CaughtUp { plugin, subscription, topic } => {
                Kind::CaughtUp { plugin, subscription: current(Some(&topic), subscription), topic }
            }
            other => other,
        }
    }

    /// Whether an event is one of those that a plugin which subscribes late receives as earlier events: of a member, on a
    /// reliable topic, or of the host or another plugin.
    fn comes_earlier(&self, event: &Event) -> bool {
        match event {
            Event::Message { origin: Origin::Plugin(sender), .. } => *sender != self.ground.plugin,
            Event::Message { origin: Origin::Peer(_), .. } => false,
            Event::Message { origin: Origin::Host | Origin::Member(_), .. } => true,
            Event::Gap { missing, .. } => missing.is_some(),
            Event::NameChanged(_) | Event::Timer { .. } => false,
        }
    }

    /// Returns a recorded message of the host as an earlier one, if the plugin catches up and the recorded host has not
    /// deferred such messages: there was no catch-up, or its version did not do so.
    pub(super) fn undeferred(&self, kind: Kind) -> Kind {
        let Kind::Event(event) = &kind else { return kind };
        let is_own = matches!(event, Event::Message { origin: Origin::Host | Origin::Plugin(_), .. });
        let topic = event.topic().filter(|topic| is_own && self.kept.recorded.get(*topic) != Some(&true));
        let subscription = topic.and_then(|topic| self.wiring.actor.context().catches_up(topic));
        match subscription {
            Some(subscription) => {
                let (plugin, event) = (self.ground.plugin.clone(), event.clone());
                Kind::Earlier { plugin, subscription, event }
            }
            None => kind,
        }
    }

    /// Ends the receipt of earlier events before the event of a member that comes to all plugins, if the recorded host
    /// had none for the plugin.
    pub(super) fn end_unrecorded_catch_up(&mut self, event: &Event) -> Result<(), TrialError> {
        let Some(topic) =
            event.topic().filter(|topic| is_of_member(event) && !self.kept.recorded.contains_key(*topic))
        else {
            return Ok(());
        };
        let Some(subscription) = self.wiring.actor.context().catches_up(topic) else { return Ok(()) };
        let plugin = self.ground.plugin.clone();
        self.feed(Kind::CaughtUp { plugin, subscription, topic: topic.clone() })
    }

    /// Delivers the earlier events of new subscriptions, as the members have kept them.
    pub(super) fn catch_up(&mut self) -> Result<(), TrialError> {
        loop {
            let next = self.wiring.actor.context().catching_up().next();
            let next = next.map(|(topic, subscription)| (topic.clone(), subscription));
            let Some((topic, subscription)) = next.filter(|_| !self.kept.is_recorded) else { return Ok(()) };
            let mut entries = VecDeque::new();
            self.wiring.loader.storage.log.read(subscription, 1, &mut entries)?;
            let from = match entries.front().map(|entry| &entry.kind) {
                Some(Kind::Subscription { beginning: Beginning::Time(time), .. }) => *time,
                _ => Timestamp(0),
            };
            let plugin = &self.ground.plugin;
            let is_wanted =
                |(time, event): &&(Timestamp, Event)| *time >= from && event.topic() == Some(&topic);
            let earlier = self.kept.events.iter().filter(is_wanted).map(|(_, event)| Kind::Earlier {
                plugin: plugin.clone(),
                subscription,
                event: event.clone(),
            });
            let end = Kind::CaughtUp { plugin: plugin.clone(), subscription, topic: topic.clone() };
            let kinds: Vec<Kind> = earlier.chain([end]).collect();
            // All in one commit, so that a crash loses all or nothing.
            for kind in kinds {
                let entry = self.wiring.loader.storage.log.append(kind);
                self.ground.numbers.add(entry.offset.0);
            }
            self.go_on()?;
        }
    }

    pub(super) fn append_quietly(&mut self, kind: Kind) -> Result<(), TrialError> {
        let is_command = matches!(kind, Kind::Command { .. });
        // Timers and listening records do not come from outside. Two versions of a plugin may differ in their timers,
        // retries and followed names, and random numbers must not depend on these.
        let is_from_outside = !matches!(kind, Kind::Tick(_) | Kind::Heard(_));
        let Storage { commit, log, .. } = &self.wiring.loader.storage;
        if !log.has_room() {
            // No writer thread commits in a trial. This commits the log entries only, without the effects of the
            // plugin.
            commit.run_once(&self.ground.store, log)?;
        }
        let entry = log.append(kind);
        if is_from_outside {
            self.ground.numbers.add(entry.offset.0);
        }
        if is_command {
            self.replies.insert(entry.offset.0, self.wiring.handle.reply_of(entry.offset));
        }
        self.go_on()
    }

    /// Appends a listening record for the topics that the host has listened to until now.
    pub(super) fn hear(&mut self) -> Result<(), TrialError> {
        let now = self.now();
        let topics = self.wiring.actor.context().subscriptions().clone();
        self.heard.retain(|topic, _| topics.contains(topic));
        let mut heard = Vec::new();
        for topic in topics {
            let is_heard = match &self.listening {
                Listening::Yes => true,
                Listening::NotTo(other) => *other != topic,
                Listening::No | Listening::AsRecorded => false,
            };
            let since = *self.heard.entry(topic.clone()).or_insert(now);
            if is_heard && since < now {
                self.heard.insert(topic.clone(), now);
                heard.push(Hearing { topic, since, until: now });
            }
        }
        if heard.is_empty() { Ok(()) } else { self.append(Kind::Heard(heard)) }
    }

    /// Appends a `gap` event for each topic that the host has not listened to. From now on it listens again.
    pub(super) fn tell_gaps(&mut self) -> Result<(), TrialError> {
        let now = self.now();
        let missed: Vec<_> = self.heard.iter().filter(|(_, until)| **until < now).collect();
        let missed: Vec<_> = missed.into_iter().map(|(topic, until)| (topic.clone(), *until)).collect();
        for (topic, since) in missed {
            self.heard.insert(topic.clone(), now);
            self.append(Kind::Event(Event::Gap { topic, since, until: now, missing: None }))?;
        }
        Ok(())
    }

    /// Appends due retries to the log and removes them from the store in the same commit.
    pub(super) fn release(&mut self, due: Vec<((u64, u64), Kind)>) -> Result<(), TrialError> {
        let (keys, kinds): (Vec<_>, Vec<_>) = due.into_iter().unzip();
        self.commit()?;
        let commit = self.wiring.loader.storage.commit.clone();
        let mut write =
            pin!(commit.append_and_write(kinds, move |write| retry_scheduler::forget(write, &keys)));
        debug_assert!((&mut write).now_or_never().is_none(), "it waits for the commit");
        self.wiring.loader.storage.commit.run_once(&self.ground.store, &self.wiring.loader.storage.log)?;
        write.now_or_never().expect("it was committed")?;
        self.go_on()
    }

    /// Handles all entries of the log that the plugin has not handled yet.
    pub(super) fn go_on(&mut self) -> Result<(), TrialError> {
        loop {
            let mut entries = VecDeque::new();
            self.wiring.loader.storage.log.read(self.wiring.actor.next(), 512, &mut entries)?;
            if entries.is_empty() {
                return Ok(());
            }
            for entry in entries {
                self.handle(&entry)?;
            }
        }
    }

    fn handle(&mut self, entry: &Arc<Entry>) -> Result<(), TrialError> {
        loop {
            self.make_ready()?;
            let (cause, done, is_over) = match self.wiring.actor.step(entry)? {
                Step::Entry(done) => (Cause::Entry(entry.kind.clone()), done, true),
                Step::Timer(key, done) => (Cause::Timer(key), done, false),
                Step::Stopped(reason) => return Err(TrialError::DoesNotStart(reason)),
            };
            self.note(entry, cause, done);
            self.commits.uncommitted += 1;
            let must_be_real = self.wiring.actor.reaches_out() || matches!(entry.kind, Kind::Command { .. });
            if !self.commits.holds && (must_be_real || self.commits.uncommitted >= TOGETHER) {
                self.commit()?;
            }
            if is_over {
                return Ok(());
            }
        }
    }

    fn note(&mut self, entry: &Entry, cause: Cause, done: Done) {
        let Done { was_called, asked, dead, retries, lines, cpu } = done;
        if !was_called && dead.is_empty() && asked == Asked::default() {
            return;
        }
        let (offset, time, reply) = (entry.offset, entry.time, None);
        self.happened.push(Happened { offset, time, cause, asked, dead, retries, reply, lines, cpu });
    }

    pub(super) fn make_ready(&mut self) -> Result<(), TrialError> {
        match self.wiring.actor.ready()? {
            Ok(Some(started)) => {
                self.note_started(started);
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(reason) => Err(TrialError::DoesNotStart(reason)),
        }
    }

    fn note_started(&mut self, Started { asked, lines }: Started) {
        if asked == Asked::default() && lines.is_empty() {
            return;
        }
        self.happened.push(Happened {
            offset: self.wiring.actor.next(),
            time: self.now(),
            cause: Cause::Start,
            asked,
            dead: Vec::new(),
            retries: Vec::new(),
            reply: None,
            lines,
            cpu: Duration::ZERO,
        });
    }

    /// Commits the batch of the plugin and all log entries.
    pub(super) fn commit(&mut self) -> Result<(), TrialError> {
        let Wiring { loader, actor, .. } = &mut self.wiring;
        actor.submit();
        loader.storage.commit.run_once(&self.ground.store, &loader.storage.log)?;
        actor.take_in()?;
        // In a trial all publishes count as sent immediately.
        loader.links.backlog.length(Some(&self.ground.plugin)).store(0, Ordering::Relaxed);
        self.commits.uncommitted = 0;
        self.take_replies();
        self.commits.committed = self.happened.len();
        self.ground.trim()
    }

    fn take_replies(&mut self) {
        for happened in &mut self.happened[self.commits.committed..] {
            if matches!(happened.cause, Cause::Entry(Kind::Command { .. })) {
                let reply = self.replies.remove(&happened.offset.0);
                happened.reply = reply.and_then(|mut reply| reply.try_recv().ok());
            }
        }
    }

    /// Delivers the values of followed names that the plugin has not received yet.
    pub(super) fn tell_names(&mut self) -> Result<(), TrialError> {
        loop {
            let follows = self.wiring.actor.context().follows();
            self.followed.told.retain(|name| follows.contains_key(name));
            let is_news = |name: &&IpnsName| {
                self.followed.names.contains_key(*name) && !self.followed.told.contains(*name)
            };
            let Some(name) = follows.keys().find(is_news).cloned() else { return Ok(()) };
            self.followed.told.insert(name.clone());
            self.with_interruption(|trial| trial.tell(name))?;
        }
    }

    fn tell(&mut self, name: IpnsName) -> Result<(), TrialError> {
        let (resolution, data) = self.followed.names[&name].clone();
        let (cid, _) = resolution.path.ipfs().expect("only a file is set");
        self.commit()?;
        let target = resolution.path.clone();
        let known = Followed { resolution, target, record: Vec::new(), encrypted: None };
        let commit = self.wiring.loader.storage.commit.clone();
        let mut change = pin!(commit.change_name(NameChange::Followed { known, cid, data }));
        debug_assert!((&mut change).now_or_never().is_none(), "it waits for the commit");
        commit.run_once(&self.ground.store, &self.wiring.loader.storage.log)?;
        change.now_or_never().expect("it was committed")?;
        self.go_on()
    }
}

/// Whether an event is of a member, on a reliable topic.
fn is_of_member(event: &Event) -> bool {
    matches!(event, Event::Message { origin: Origin::Member(_), .. } | Event::Gap { missing: Some(_), .. })
}
