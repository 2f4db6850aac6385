//! Owns the delivery of an event or a command to the plugin, and its outcome: success, retry or dead letter.

use std::time::{Duration, Instant};

use dim_model::entry::{Entry, Event, Offset};
use dim_model::time::Timestamp;
use dim_store::StoreError;
use dim_store::batch::ReplyError;
use dim_store::effect::{DeadLetter, Retry};
use sha2::{Digest as _, Sha256};

use super::Actor;
use crate::bindings::v0_2::Failure;
use crate::event_conversion::{reply_error, said};
use crate::instance::{CallError, Trap, thread_cpu};
use crate::session::Mode;

/// The shortest interval of log lines about dead letters; those in between are counted.
const WARN_EVERY: Duration = Duration::from_secs(1);

/// Number of attempts for an event that traps.
const TRIES: u32 = 2;

/// An event on its way to a plugin.
pub struct Delivery {
    /// The event.
    pub event: Event,
    /// The number of retries so far.
    pub attempt: u32,
    /// The offset of the entry that contained the event first.
    pub first: Offset,
    /// The key of the timer, if the event is a timer.
    pub timer: Option<String>,
}

/// The attempts at an event that is still to be handled. A failed start does not reset them; otherwise the
/// event could block the following entries forever.
#[derive(Debug, Default)]
pub struct Tried {
    offset: Offset,
    part: u64,
    times: u32,
    trap: Trap,
    lines: Vec<String>,
}

/// The outcome of a delivery.
pub enum Outcome {
    /// The event is handled, waits for a retry, or is a dead letter.
    Done,
    /// A timer that was due before the entry is done; the entry is still to be handled.
    Fired,
    /// The instance did not start, or its code has failed on probation. The event is still to be handled.
    Stopped,
}

impl Actor {
    /// Delivers a timer that was due before `entry`.
    pub(super) fn fire(&mut self, entry: &Entry, key: String, due: Timestamp) -> Result<Outcome, StoreError> {
        let part = part_of(&key, due);
        let event = Event::Timer { key: key.clone(), due };
        let delivery = Delivery { event, attempt: 0, first: entry.offset, timer: Some(key) };
        Ok(match self.deliver(entry, part, delivery)? {
            Outcome::Done => Outcome::Fired,
            other => other,
        })
    }

    /// Calls `handle` until the event is handled, waits for a retry, or is a dead letter.
    pub(super) fn deliver(
        &mut self,
        entry: &Entry,
        part: u64,
        delivery: Delivery,
    ) -> Result<Outcome, StoreError> {
        self.attempts.called = true;
        let before = self.attempts.tried.take().filter(|it| (it.offset, it.part) == (entry.offset, part));
        let mut tried = before.unwrap_or(Tried { offset: entry.offset, part, ..Tried::default() });
        for again in tried.times..TRIES {
            let tries = delivery.attempt + again + 1;
            if !self.make_ready()? {
                self.attempts.tried = Some(tried);
                return Ok(Outcome::Stopped);
            }
            tried.times += 1;
            let Tried { trap, lines, .. } = &mut tried;
            self.begin(Mode::Entry, entry, part, again);
            self.clear_fired(&delivery);
            if let Some((limit, log)) = self.struck_then(entry, part, again) {
                self.fail(true);
                lines.extend(log);
                *trap = Trap::of_reason(limit);
                continue;
            }
            let begun = thread_cpu();
            let called = self.instance().handle(&delivery.event);
            self.note_outbox(entry, part, again);
            let failure = match called {
                Ok(Ok(())) => {
                    self.note_end(begun);
                    self.counters.handled += 1;
                    self.count(false);
                    self.session_mut().effects.batch.entries += 1;
                    return Ok(Outcome::Done);
                }
                Ok(Err(failure)) => failure,
                Err(error) => {
                    let log;
                    (*trap, log) = self.trapped(error, begun, entry, part, again)?;
                    if self.watch.failed.is_some() {
                        return Ok(Outcome::Stopped);
                    }
                    lines.extend(log);
                    continue;
                }
            };
            self.note_end(begun);
            self.counters.failures += 1;
            lines.extend(self.fail(false));
            self.begin(Mode::Entry, entry, part, again);
            self.clear_fired(&delivery);
            match failure {
                Failure::Retry(after) if delivery.attempt < self.session().limits().retries => {
                    self.put_off(delivery, entry, Duration::from_nanos(after));
                }
                Failure::Retry(_) => {
                    let reason = format!("still not handled after {tries} tries");
                    self.set_aside(delivery, entry, tries, Trap::of_reason(reason), tried.lines);
                }
                Failure::Reject(why) => {
                    self.set_aside(delivery, entry, tries, Trap::of_reason(said(why)), tried.lines);
                }
            }
            return Ok(Outcome::Done);
        }
        self.session_mut().begin(Mode::Entry, entry.time);
        self.clear_fired(&delivery);
        let tries = delivery.attempt + TRIES;
        self.set_aside(delivery, entry, tries, tried.trap, tried.lines);
        Ok(Outcome::Done)
    }

    /// Records a call that did not trap. `begun` is the thread's CPU time at its beginning.
    pub(super) fn note_end(&mut self, begun: Duration) {
        if self.session().has_met() {
            self.failing.note_bad(begun, self.monotonic())
        } else {
            self.failing.note_success()
        }
    }

    fn clear_fired(&mut self, delivery: &Delivery) {
        if let Some(key) = &delivery.timer {
            self.session_mut().effects.set_timer(key.clone(), None);
        }
    }

    fn put_off(&mut self, delivery: Delivery, entry: &Entry, after: Duration) {
        let bytes = delivery.event.payload_len();
        let retry = Retry {
            at: entry.time.after(after.max(Duration::from_millis(100)).min(Duration::from_secs(86_400))),
            attempt: delivery.attempt + 1,
            first: delivery.first,
            event: delivery.event,
        };
        self.count(false);
        let batch = &mut self.session_mut().effects.batch;
        batch.bytes += bytes;
        batch.requested.retries.push(retry);
        batch.entries += 1;
    }

    fn set_aside(&mut self, delivery: Delivery, entry: &Entry, tries: u32, why: Trap, log: Vec<String>) {
        let Trap { reason, stack, .. } = why;
        // A peer that may publish on a topic can cause dead letters. The log must not grow with them.
        if self.pace.warned_at.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            let before = std::mem::take(&mut self.pace.unwarned);
            tracing::warn!(plugin = %self.plugin, offset = %entry.offset, before, "event became a dead letter: {reason}");
            self.pace.warned_at = Some(Instant::now());
        } else {
            self.pace.unwarned += 1;
        }
        self.counters.dead_letters += 1;
        self.count(true);
        let letter = DeadLetter {
            plugin: self.plugin.clone(),
            version: self.run.version().to_owned(),
            by: self.generation(),
            offset: delivery.first.0,
            time: if self.attempts.recorded.is_some() { entry.time.0 } else { self.host.log.now().0 },
            attempts: tries,
            reason,
            stack,
            log,
            event: delivery.event,
        };
        let batch = &mut self.session_mut().effects.batch;
        batch.bytes += letter.event.payload_len()
            + letter.reason.len()
            + letter.log.iter().chain(&letter.stack).map(String::len).sum::<usize>();
        batch.requested.dead.push(letter);
        batch.entries += 1;
    }

    pub(super) fn command(&mut self, entry: &Entry, method: &str, body: &str) -> Result<Outcome, StoreError> {
        self.attempts.called = true;
        if !self.make_ready()? {
            return Ok(Outcome::Stopped);
        }
        self.begin(Mode::Entry, entry, 0, 0);
        if self.struck_then(entry, 0, 0).is_some() {
            self.fail(true);
            return Ok(Outcome::Done);
        }
        let begun = thread_cpu();
        let called = self.instance().command(method, body);
        self.note_outbox(entry, 0, 0);
        let reply = match called {
            Ok(Ok(reply)) => {
                self.note_end(begun);
                Ok(reply)
            }
            Ok(Err(refusal)) => {
                self.note_end(begun);
                self.fail(false);
                Err(reply_error(refusal, method))
            }
            Err(error) => {
                let (trap, log) = self.trapped(error, begun, entry, 0, 0)?;
                self.session_mut().log.lines = log;
                Err(ReplyError::Failed(trap.reason))
            }
        };
        if self.watch.failed.is_some() {
            return Ok(Outcome::Stopped);
        }
        self.counters.handled += 1;
        self.count(false);
        let to = self.inbox.take_waiting(entry.offset);
        let batch = &mut self.session_mut().effects.batch;
        batch.entries += 1;
        if let Some(to) = to {
            batch.reply(to, entry.offset, reply);
        }
        Ok(Outcome::Done)
    }

    /// Records a call that trapped. `begun` is the thread's CPU time at its beginning. Returns the trap and the
    /// plugin's log lines, or a fault of the host as the error.
    fn trapped(
        &mut self,
        error: CallError,
        begun: Duration,
        entry: &Entry,
        part: u64,
        again: u32,
    ) -> Result<(Trap, Vec<String>), StoreError> {
        self.meet(&error);
        let (trap, is_limit) = match error {
            CallError::Host(error) => return Err(error),
            CallError::Trap(trap) => (trap, false),
            CallError::Limit(trap) => (trap, true),
        };
        self.failing.note_bad(begun, self.monotonic());
        self.counters.failures += 1;
        let log = self.fail(true);
        self.note_failure(&trap.reason);
        if is_limit {
            self.note_limit(entry, part, again, &trap.reason, &log);
        }
        Ok((trap, log))
    }

    /// Reverts the effects of the call. If it trapped or had effects, also drops the instance, whose memory may
    /// depend on them. Returns the plugin's log lines.
    pub(super) fn fail(&mut self, trapped: bool) -> Vec<String> {
        let session = self.session_mut();
        let had_effects = session.effects.count() > 0;
        session.roll_back();
        let lines = session.take_lines();
        if trapped || had_effects {
            self.drop_instance();
        }
        lines
    }
}

/// The part of an entry for a timer before it. It is the same at each handling, independent of the timers that
/// were committed before.
fn part_of(key: &str, due: Timestamp) -> u64 {
    let mut hash = Sha256::new();
    hash.update(due.0.to_be_bytes());
    hash.update(key);
    let digest: [u8; 32] = hash.finalize().into();
    let number = u64::from_be_bytes(digest[..8].try_into().expect("8 of 32 bytes"));
    // Part 0 is the entry itself, and the highest number is for calls without an entry.
    number.clamp(1, u64::MAX - 1)
}
