//! Owns what becomes of one event or command: handled, put off, or set aside.

use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use super::Actor;
use crate::effect::{DeadLetter, Retry};
use crate::entry::{Entry, Event, Offset};
use crate::plugin::ReplyError;
use crate::plugin::bindings::dim::coordination::event as wit;
use crate::plugin::event::{reply_error, said, wit_event};
use crate::plugin::instance::{CallError, Trap, thread_cpu};
use crate::plugin::session::Mode;
use crate::store::StoreError;
use crate::time::Timestamp;

/// How often an event that is set aside is told in the operator's log; the others are counted.
const WARN_EVERY: Duration = Duration::from_secs(1);

/// How often a trapping event is tried.
const TRIES: u32 = 2;

/// An event on its way to a plugin.
pub struct Delivery {
    /// What the plugin is called with.
    pub event: Event,
    /// How often it was put off.
    pub attempt: u32,
    /// The entry that it came from.
    pub first: Offset,
    /// The timer that fired, if it is one.
    pub timer: Option<String>,
}

/// How often an event was tried that is still to be handled: a start that has failed meanwhile does not begin its
/// tries anew, or it would hold up the line for ever.
#[derive(Debug, Default)]
pub struct Tried {
    offset: Offset,
    part: u64,
    times: u32,
    trap: Trap,
    lines: Vec<String>,
}

/// How an event went.
pub enum Outcome {
    /// Handled, put off or set aside.
    Done,
    /// A timer that fell due before the entry is done; the entry is still to be handled.
    Fired,
    /// The instance did not start, or its code has failed on probation; the event is still to be handled.
    Stopped,
}

impl Actor {
    /// Calls the plugin for a timer that fell due before `entry`.
    pub(super) fn fire(&mut self, entry: &Entry, key: String, due: Timestamp) -> Result<Outcome, StoreError> {
        let part = part_of(&key, due);
        let event = Event::Timer { key: key.clone(), due };
        let delivery = Delivery { event, attempt: 0, first: entry.offset, timer: Some(key) };
        Ok(match self.deliver(entry, part, delivery)? {
            Outcome::Done => Outcome::Fired,
            other => other,
        })
    }

    /// Calls `handle` until the event is handled, put off or set aside.
    pub(super) fn deliver(
        &mut self,
        entry: &Entry,
        part: u64,
        delivery: Delivery,
    ) -> Result<Outcome, StoreError> {
        let event = wit_event(&delivery.event);
        let before = self.tried.take().filter(|it| (it.offset, it.part) == (entry.offset, part));
        let mut tried = before.unwrap_or(Tried { offset: entry.offset, part, ..Tried::default() });
        for again in tried.times..TRIES {
            let tries = delivery.attempt + again + 1;
            if !self.make_ready()? {
                self.tried = Some(tried);
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
            let called = self.instance().handle(&event);
            self.note_outbox(entry, part, again);
            let failure = match called {
                Ok(Ok(())) => {
                    self.note_end(begun);
                    self.tally.handled += 1;
                    self.count(false);
                    self.session_mut().effects.batch.entries += 1;
                    return Ok(Outcome::Done);
                }
                Ok(Err(failure)) => failure,
                Err(error) => {
                    let log;
                    (*trap, log) = self.trapped(error, begun, entry, part, again)?;
                    if self.failed.is_some() {
                        return Ok(Outcome::Stopped);
                    }
                    lines.extend(log);
                    continue;
                }
            };
            self.note_end(begun);
            self.tally.failures += 1;
            lines.extend(self.fail(false));
            self.begin(Mode::Entry, entry, part, again);
            self.clear_fired(&delivery);
            match failure {
                wit::Failure::Retry(after) if delivery.attempt < self.session().limits().retries => {
                    self.put_off(delivery, entry, Duration::from_nanos(after));
                }
                wit::Failure::Retry(_) => {
                    let reason = format!("still not handled after {tries} tries");
                    self.set_aside(delivery, entry, tries, Trap::of_reason(reason), tried.lines);
                }
                wit::Failure::Reject(why) => {
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

    /// Takes in that a call has come to its end which began when the thread had used `begun`.
    pub(super) fn note_end(&mut self, begun: Duration) {
        if self.session().has_met() { self.failing.note_bad(begun) } else { self.failing.note_success() }
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
        batch.retries.push(retry);
        batch.entries += 1;
    }

    fn set_aside(&mut self, delivery: Delivery, entry: &Entry, tries: u32, why: Trap, log: Vec<String>) {
        let Trap { reason, stack, .. } = why;
        // Whoever may publish on a topic can have events set aside: the log must not grow with them.
        if self.warned_at.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            let before = std::mem::take(&mut self.unwarned);
            tracing::warn!(plugin = %self.plugin, offset = %entry.offset, before, "event set aside: {reason}");
            self.warned_at = Some(Instant::now());
        } else {
            self.unwarned += 1;
        }
        self.tally.dead_letters += 1;
        self.count(true);
        let letter = DeadLetter {
            plugin: self.plugin.clone(),
            version: self.run.version().to_owned(),
            by: self.generation(),
            offset: delivery.first.0,
            time: if self.recorded.is_some() { entry.time.0 } else { self.log.now().0 },
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
        batch.dead.push(letter);
        batch.entries += 1;
    }

    pub(super) fn command(&mut self, entry: &Entry, method: &str, body: &str) -> Result<Outcome, StoreError> {
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
                self.session_mut().lines = log;
                Err(ReplyError::Failed(trap.reason))
            }
        };
        if self.failed.is_some() {
            return Ok(Outcome::Stopped);
        }
        self.tally.handled += 1;
        self.count(false);
        let to = self.inbox.take_waiting(entry.offset);
        let batch = &mut self.session_mut().effects.batch;
        batch.entries += 1;
        if let Some(to) = to {
            batch.reply(to, entry.offset, reply);
        }
        Ok(Outcome::Done)
    }

    /// Takes in that a call trapped which began when the thread had used `begun`; returns why and what the
    /// plugin logged. A fault of the host is the caller's.
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
        self.failing.note_bad(begun);
        self.tally.failures += 1;
        let log = self.fail(true);
        self.note_failure(&trap.reason);
        if is_limit {
            self.note_limit(entry, part, again, &trap.reason, &log);
        }
        Ok((trap, log))
    }

    /// Drops the effects of the call. If it trapped or had any, its instance goes too: the
    /// instance's memory may have seen them. Returns what the plugin logged.
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

/// The part of an entry that a timer before it is: the same whenever it is handled, and however many
/// timers before it were committed by then.
fn part_of(key: &str, due: Timestamp) -> u64 {
    let mut hash = Sha256::new();
    hash.update(due.0.to_be_bytes());
    hash.update(key);
    let digest: [u8; 32] = hash.finalize().into();
    let number = u64::from_be_bytes(digest[..8].try_into().expect("8 of 32 bytes"));
    // The entry itself is 0, and what is no entry the highest.
    number.clamp(1, u64::MAX - 1)
}
