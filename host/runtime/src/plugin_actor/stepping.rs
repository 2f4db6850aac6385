//! Owns the stepping of an actor: its creator drives it entry by entry on one thread, for tests in virtual time
//! and for a replay of a recorded log.

use std::time::Duration;

use dim_model::entry::{Entry, Offset};
use dim_model::time::Timestamp;
use dim_store::StoreError;
use dim_store::batch::{Batch, Reply, Timers};
use dim_store::effect::{Asked, DeadLetter, Retry};
use dim_store::entry_context::EntryContext;
use dim_store::probation::Verdict;

use super::limit_records::LimitRecords;
use super::{Actor, InstanceSlot, Outcome};
use crate::instance::thread_cpu;

/// The progress of a step.
#[derive(Debug)]
pub enum Step {
    /// The entry is handled.
    Entry(Done),
    /// A timer that was due before the entry is handled; the entry is still to be handled.
    Timer(String, Done),
    /// The plugin does not start, with the reason.
    Stopped(String),
}

/// The results of a step.
#[derive(Debug)]
pub struct Done {
    /// Whether the plugin was called.
    pub was_called: bool,
    /// The effects.
    pub asked: Asked,
    /// The new dead letters.
    pub dead: Vec<DeadLetter>,
    /// The new retries.
    pub retries: Vec<Retry>,
    /// The plugin's log lines, if the entry succeeded; otherwise the dead letter contains them.
    pub lines: Vec<String>,
    /// The CPU time of the thread.
    pub cpu: Duration,
}

/// The results of a start.
#[derive(Debug)]
pub struct Started {
    /// The effects.
    pub asked: Asked,
    /// The log lines.
    pub lines: Vec<String>,
}

/// The point of a record up to which a plugin handled it.
#[derive(Debug)]
pub struct Reached {
    /// The first entry that the plugin has not handled.
    pub cursor: Offset,
    /// The timers that are set. A timer that is due before that entry and is not among them has fired.
    pub timers: Timers,
}

impl Actor {
    /// Handles the recorded entries of `log` without committing, up to where the plugin got when they were recorded.
    /// Returns all effects. A plugin that does not start has none. `log` is the whole record: the record of an
    /// exceeded limit follows its entry, possibly after the last entry that is handled.
    pub fn replay(mut self, log: &[Entry], reached: &Reached) -> Result<Batch, StoreError> {
        self.attempts.recorded = Some(LimitRecords::new(&self.plugin, log));
        self.make_ready()?;
        let handled = log.partition_point(|entry| entry.offset < reached.cursor);
        for entry in &log[..handled] {
            loop {
                match self.step(entry)? {
                    Step::Entry(_) => break,
                    Step::Timer(..) => {}
                    Step::Stopped(_) => return Ok(self.session_mut().discard()),
                }
            }
        }
        // The plugin may have stopped between two timers that were due before the next entry.
        while let Some(next) = log.get(handled)
            && self.had_fired_before(next, reached)
        {
            if let Step::Stopped(_) = self.step(next)? {
                break;
            }
        }
        Ok(self.session_mut().discard())
    }

    /// Whether the timer that is due first had fired before the entry when the plugin stopped there.
    fn had_fired_before(&self, entry: &Entry, reached: &Reached) -> bool {
        let first = self.session().effects.timers.first();
        first.is_some_and(|(due, key)| due <= entry.time && reached.timers.get(key) != Some(due))
    }

    /// Ensures that an instance has started. Returns the effects and log lines of its start if it is new, or
    /// the reason why it does not start.
    pub fn ready(&mut self) -> Result<Result<Option<Started>, String>, StoreError> {
        if matches!(self.running.body, InstanceSlot::Live(_)) {
            return Ok(Ok(None));
        }
        if !self.make_ready()? {
            return Ok(Err(self.why_not()));
        }
        let session = self.session_mut();
        Ok(Ok(Some(Started { asked: session.effects.of_entry(), lines: session.take_lines() })))
    }

    /// Handles an entry, or one timer that was due before it.
    pub fn step(&mut self, entry: &Entry) -> Result<Step, StoreError> {
        let timer = self.session().effects.timers.first().filter(|(due, _)| *due <= entry.time);
        let timer = timer.map(|(_, key)| key.to_owned());
        let batch = &self.session().effects.batch;
        let (dead, retries) = (batch.requested.dead.len(), batch.requested.retries.len());
        let calls = |actor: &Self| actor.counters.handled + actor.counters.failures;
        let (called, begun) = (calls(self), thread_cpu());
        // The current values belong to an earlier entry.
        self.session_mut().begin_nothing();
        let outcome = self.handle(entry)?;
        if matches!(outcome, Outcome::Stopped) {
            return Ok(Step::Stopped(self.why_not()));
        }
        let cpu = thread_cpu().saturating_sub(begun);
        let was_called = calls(self) > called;
        let session = self.session_mut();
        let batch = &session.effects.batch;
        let (dead, retries) =
            (batch.requested.dead[dead..].to_vec(), batch.requested.retries[retries..].to_vec());
        let asked = session.effects.of_entry();
        let done = Done { was_called, asked, dead, retries, lines: session.take_lines(), cpu };
        Ok(match timer {
            Some(key) => Step::Timer(key, done),
            None => {
                self.pass(entry.offset);
                Step::Entry(done)
            }
        })
    }

    fn why_not(&self) -> String {
        self.counters.reason.clone().unwrap_or_else(|| "it does not start".to_owned())
    }

    /// Sends a query to the plugin.
    pub fn ask(&mut self, method: &str, body: &str) -> Result<Reply, StoreError> {
        self.make_ready()?;
        self.answer(method, body)
    }

    /// The time of the next timer.
    pub fn first_timer(&self) -> Option<Timestamp> {
        self.session().effects.timers.first().map(|(due, _)| due)
    }

    /// The offset of the next entry to read.
    pub fn next(&self) -> Offset {
        self.cursor()
    }

    /// The context of the plugin.
    pub fn context(&self) -> &EntryContext {
        &self.session().context
    }

    /// The memory of its instance in bytes.
    pub fn memory(&self) -> usize {
        match &self.running.body {
            InstanceSlot::Live(instance) => instance.memory(),
            _ => 0,
        }
    }

    /// Whether the current batch affects more than the plugin's own state and timers.
    pub fn reaches_out(&self) -> bool {
        let batch = &self.session().effects.batch;
        let is_own = batch.requested.publishes.is_empty()
            && batch.requested.names.is_empty()
            && batch.requested.subscriptions.is_empty()
            && batch.requested.follows.is_empty()
            && batch.requested.retries.is_empty()
            && batch.requested.struck.is_empty()
            && batch.code.started.is_none();
        !is_own || self.batch_is_too_large()
    }

    /// Submits the batch to the commit.
    pub fn submit(&mut self) {
        self.hand_over();
    }

    /// Drops batches that are durable by now, and takes a newer snapshot.
    pub fn take_in(&mut self) -> Result<(), StoreError> {
        let committed = self.host.progress.committed();
        self.session_mut().settle(committed)
    }

    /// Ends the probation with a confirmation.
    pub fn confirm(&mut self) {
        if self.watch.probation.take().is_some() {
            self.watch.fallback = None;
            self.session_mut().effects.batch.code.verdict = Some(Verdict::Confirmed);
        }
    }
}
