//! Owns the way of an entry through a trial: appended, handled with what is in the log, noted, committed.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt as _;

use super::{Cause, Happened, Listening, Trial};
use crate::commit::NameChange;
use crate::effect::Asked;
use crate::entry::{Entry, Event, Hearing, Kind};
use crate::host::Loader;
use crate::ident::IpnsName;
use crate::plugin::{Done, Started, Step};
use crate::retries;
use crate::store::followed::Followed;
use crate::test::TestError;
use crate::test::wiring::Wiring;

/// Entries that are handled before they are committed, if they concern the plugin's state and timers alone.
const TOGETHER: usize = 256;

impl Trial {
    /// Appends what comes from outside, and handles it.
    pub(super) fn append(&mut self, kind: Kind) -> Result<(), TestError> {
        if matches!(kind, Kind::Heard(_) | Kind::Peers { .. }) {
            self.append_quietly(kind)?;
        } else {
            self.with_interruption(|trial| trial.append_quietly(kind))?;
        }
        self.tell_names()
    }

    pub(super) fn append_quietly(&mut self, kind: Kind) -> Result<(), TestError> {
        let is_command = matches!(kind, Kind::Command { .. });
        // Time that passes, and listening, come from no one; versions may differ in the timers that they set, and in
        // what they put off or follow.
        let is_from_outside = !matches!(kind, Kind::Tick(_) | Kind::Heard(_));
        let Loader { commit, log, .. } = &*self.wiring.loader;
        if !log.has_room() {
            // Nobody else commits here. What the plugin made of the entries stays as it is.
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

    /// Proves that the topics of the plugin were listened to until now.
    pub(super) fn hear(&mut self) -> Result<(), TestError> {
        let now = self.now();
        let topics = self.wiring.actor.world().subscriptions().clone();
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

    /// Tells what was missed, and listens again from now on.
    pub(super) fn tell_gaps(&mut self) -> Result<(), TestError> {
        let now = self.now();
        let missed: Vec<_> = self.heard.iter().filter(|(_, until)| **until < now).collect();
        let missed: Vec<_> = missed.into_iter().map(|(topic, until)| (topic.clone(), *until)).collect();
        for (topic, since) in missed {
            self.heard.insert(topic.clone(), now);
            self.append(Kind::Event(Event::Gap { topic, since, until: now }))?;
        }
        Ok(())
    }

    /// Makes entries of what was put off.
    pub(super) fn release(&mut self, due: Vec<((u64, u64), Kind)>) -> Result<(), TestError> {
        let (keys, kinds): (Vec<_>, Vec<_>) = due.into_iter().unzip();
        self.commit()?;
        let commit = self.wiring.loader.commit.clone();
        let mut write = pin!(commit.append_and_write(kinds, move |write| retries::forget(write, &keys)));
        debug_assert!((&mut write).now_or_never().is_none(), "it waits for the commit");
        self.wiring.loader.commit.run_once(&self.ground.store, &self.wiring.loader.log)?;
        write.now_or_never().expect("it was committed")?;
        self.go_on()
    }

    /// Handles everything that is in the log.
    pub(super) fn go_on(&mut self) -> Result<(), TestError> {
        loop {
            let mut entries = VecDeque::new();
            self.wiring.loader.log.read(self.wiring.actor.next(), 512, &mut entries)?;
            if entries.is_empty() {
                return Ok(());
            }
            for entry in entries {
                self.handle(&entry)?;
            }
        }
    }

    fn handle(&mut self, entry: &Arc<Entry>) -> Result<(), TestError> {
        loop {
            self.make_ready()?;
            let (cause, done, is_over) = match self.wiring.actor.step(entry)? {
                Step::Entry(done) => (Cause::Entry(entry.kind.clone()), done, true),
                Step::Timer(key, done) => (Cause::Timer(key), done, false),
                Step::Stopped(reason) => return Err(TestError::DoesNotStart(reason)),
            };
            self.note(entry, cause, done);
            self.uncommitted += 1;
            let must_be_real = self.wiring.actor.reaches_out() || matches!(entry.kind, Kind::Command { .. });
            if !self.holds && (must_be_real || self.uncommitted >= TOGETHER) {
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

    pub(super) fn make_ready(&mut self) -> Result<(), TestError> {
        match self.wiring.actor.ready()? {
            Ok(Some(started)) => {
                self.note_started(started);
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(reason) => Err(TestError::DoesNotStart(reason)),
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

    /// Makes real what was done.
    pub(super) fn commit(&mut self) -> Result<(), TestError> {
        let Wiring { loader, actor, .. } = &mut self.wiring;
        actor.submit();
        loader.commit.run_once(&self.ground.store, &loader.log)?;
        actor.take_in()?;
        // All of it is sent at once.
        loader.backlog.length(Some(&self.ground.plugin)).store(0, Ordering::Relaxed);
        self.uncommitted = 0;
        self.take_replies();
        self.committed = self.happened.len();
        self.ground.trim()
    }

    fn take_replies(&mut self) {
        for happened in &mut self.happened[self.committed..] {
            if matches!(happened.cause, Cause::Entry(Kind::Command { .. })) {
                let reply = self.replies.remove(&happened.offset.0);
                happened.reply = reply.and_then(|mut reply| reply.try_recv().ok());
            }
        }
    }

    /// Tells the plugin of the names that it follows and was not told of yet.
    pub(super) fn tell_names(&mut self) -> Result<(), TestError> {
        loop {
            let follows = self.wiring.actor.world().follows();
            self.told.retain(|name| follows.contains_key(name));
            let is_news = |name: &&IpnsName| self.names.contains_key(*name) && !self.told.contains(*name);
            let Some(name) = follows.keys().find(is_news).cloned() else { return Ok(()) };
            self.told.insert(name.clone());
            self.with_interruption(|trial| trial.tell(name))?;
        }
    }

    fn tell(&mut self, name: IpnsName) -> Result<(), TestError> {
        let (resolution, data) = self.names[&name].clone();
        let (cid, _) = resolution.path.ipfs().expect("only a file is set");
        self.commit()?;
        let target = resolution.path.clone();
        let known = Followed { resolution, target, record: Vec::new() };
        let commit = self.wiring.loader.commit.clone();
        let mut change = pin!(commit.change_name(NameChange::Followed { known, cid, data }));
        debug_assert!((&mut change).now_or_never().is_none(), "it waits for the commit");
        commit.run_once(&self.ground.store, &self.wiring.loader.log)?;
        change.now_or_never().expect("it was committed")?;
        self.go_on()
    }
}
