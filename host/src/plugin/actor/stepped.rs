//! Owns an actor that whoever made it drives entry by entry, on one thread: what is tried in virtual time, and a
//! recorded log that is handled again.

use std::time::Duration;

use super::recorded::Recorded;
use super::{Actor, Body, Outcome};
use crate::effect::{Asked, DeadLetter, Retry};
use crate::entry::{Entry, Offset};
use crate::plugin::instance::thread_cpu;
use crate::plugin::probation::Verdict;
use crate::plugin::{Batch, Reply, World};
use crate::store::StoreError;
use crate::time::Timestamp;

/// How far a step has come.
#[derive(Debug)]
pub enum Step {
    /// The entry is handled.
    Entry(Done),
    /// A timer that fell due before the entry is; the entry is still to be handled.
    Timer(String, Done),
    /// The plugin does not start, and why.
    Stopped(String),
}

/// What a step has done.
#[derive(Debug)]
pub struct Done {
    /// Whether the plugin was called.
    pub was_called: bool,
    /// What it asked for.
    pub asked: Asked,
    /// What was set aside.
    pub dead: Vec<DeadLetter>,
    /// What is to be handled again.
    pub retries: Vec<Retry>,
    /// What the plugin logged, if the entry went well; else that is with the dead letter.
    pub lines: Vec<String>,
    /// CPU time of the thread.
    pub cpu: Duration,
}

/// What a start has done.
#[derive(Debug)]
pub struct Started {
    /// What it asked for.
    pub asked: Asked,
    /// What it logged.
    pub lines: Vec<String>,
}

impl Actor {
    /// Handles recorded entries, one after the other, and commits nothing; returns all that the
    /// plugin has done. A plugin that does not start has done nothing.
    /// `log` is the whole record: a limit that struck stands in it behind the entry, perhaps beyond
    /// the last one that is handled.
    pub fn replay(mut self, entries: &[Entry], log: &[Entry]) -> Result<Batch, StoreError> {
        self.recorded = Some(Recorded::new(&self.plugin, log));
        self.make_ready()?;
        for entry in entries {
            loop {
                match self.step(entry)? {
                    Step::Entry(_) => break,
                    Step::Timer(..) => {}
                    Step::Stopped(_) => return Ok(self.session_mut().discard()),
                }
            }
        }
        Ok(self.session_mut().discard())
    }

    /// Makes sure that there is an instance that has started; returns what its start has asked for and logged if it
    /// is a new one, or why it does not start.
    pub fn ready(&mut self) -> Result<Result<Option<Started>, String>, StoreError> {
        if matches!(self.body, Body::Live(_)) {
            return Ok(Ok(None));
        }
        if !self.make_ready()? {
            return Ok(Err(self.why_not()));
        }
        let session = self.session_mut();
        Ok(Ok(Some(Started { asked: session.effects.of_entry(), lines: session.take_lines() })))
    }

    /// Handles an entry, or a timer that fell due before it.
    pub fn step(&mut self, entry: &Entry) -> Result<Step, StoreError> {
        let timer = self.session().effects.timers.first().filter(|(due, _)| *due <= entry.time);
        let timer = timer.map(|(_, key)| key.to_owned());
        let batch = &self.session().effects.batch;
        let (dead, retries) = (batch.dead.len(), batch.retries.len());
        let calls = |actor: &Self| actor.tally.handled + actor.tally.failures;
        let (called, begun) = (calls(self), thread_cpu());
        // What stands there is of another entry.
        self.session_mut().begin_nothing();
        let outcome = self.handle(entry)?;
        if matches!(outcome, Outcome::Stopped) {
            return Ok(Step::Stopped(self.why_not()));
        }
        let cpu = thread_cpu().saturating_sub(begun);
        let was_called = calls(self) > called;
        let session = self.session_mut();
        let batch = &session.effects.batch;
        let (dead, retries) = (batch.dead[dead..].to_vec(), batch.retries[retries..].to_vec());
        let asked = session.effects.of_entry();
        let done = Done { was_called, asked, dead, retries, lines: session.take_lines(), cpu };
        Ok(match timer {
            Some(key) => Step::Timer(key, done),
            None => {
                session.effects.batch.cursor = Offset(entry.offset.0 + 1);
                Step::Entry(done)
            }
        })
    }

    fn why_not(&self) -> String {
        self.tally.reason.clone().unwrap_or_else(|| "it does not start".to_owned())
    }

    /// Asks a question.
    pub fn ask(&mut self, method: &str, body: &str) -> Result<Reply, StoreError> {
        self.make_ready()?;
        self.answer(method, body)
    }

    /// When the timer falls due that is the first to.
    pub fn first_timer(&self) -> Option<Timestamp> {
        self.session().effects.timers.first().map(|(due, _)| due)
    }

    /// The next entry that it will read.
    pub fn next(&self) -> Offset {
        self.cursor()
    }

    /// What surrounds it.
    pub fn world(&self) -> &World {
        &self.session().world
    }

    /// Bytes of memory of its instance.
    pub fn memory(&self) -> usize {
        match &self.body {
            Body::Live(instance) => instance.memory(),
            _ => 0,
        }
    }

    /// Whether what it has done since it last handed over concerns more than its own state and timers.
    pub fn reaches_out(&self) -> bool {
        let batch = &self.session().effects.batch;
        let is_own = batch.publishes.is_empty()
            && batch.names.is_empty()
            && batch.subscriptions.is_empty()
            && batch.follows.is_empty()
            && batch.retries.is_empty()
            && batch.struck.is_empty()
            && batch.started.is_none();
        !is_own || self.batch_is_too_large()
    }

    /// Hands over to the commit what it has done.
    pub fn submit(&mut self) {
        self.hand_over();
    }

    /// Takes in what is committed by now.
    pub fn take_in(&mut self) -> Result<(), StoreError> {
        let committed = self.progress.committed();
        self.session_mut().settle(committed)
    }

    /// Ends the probation of code that is watched.
    pub fn confirm(&mut self) {
        if self.probation.take().is_some() {
            self.fallback = None;
            self.session_mut().effects.batch.verdict = Some(Verdict::Confirmed);
        }
    }
}
