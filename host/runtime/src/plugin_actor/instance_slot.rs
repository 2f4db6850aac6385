//! Owns the instance of an actor: made on demand, started, and dropped after a failure.

use std::time::Instant;

use dim_model::time::nanoseconds;
use dim_store::StoreError;
use dim_store::plugin_limits::LimitName;

use super::Actor;
use super::restarts::FailedStart;
use crate::event_conversion::said;
use crate::instance::{CallError, Instance, Trap};
use crate::session::Session;

/// The session, with or without an instance around it.
pub enum InstanceSlot {
    Bare(Box<Session>),
    Live(Box<Instance>),
    /// A placeholder while one of the other two is made.
    Between,
}

impl std::fmt::Debug for InstanceSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            InstanceSlot::Bare(_) => "Bare",
            InstanceSlot::Live(_) => "Live",
            InstanceSlot::Between => "Between",
        })
    }
}

impl Actor {
    /// Ensures that an instance has started; returns false if it does not start.
    pub(super) fn make_ready(&mut self) -> Result<bool, StoreError> {
        if matches!(self.running.body, InstanceSlot::Live(_)) {
            return Ok(true);
        }
        if self.is_quarantined() || self.failing.must_wait(self.monotonic()) {
            return Ok(false);
        }
        match self.start()? {
            Ok(()) => {
                self.failing.has_started();
                self.show_running();
                Ok(true)
            }
            Err(failed) => {
                if self.can_go_back() && failed.is_own_fault {
                    self.note_failure(&format!("it does not start any more: {}", failed.reason));
                    return Ok(false);
                }
                self.note_failed_start(failed);
                Ok(false)
            }
        }
    }

    /// Makes an instance and calls `start`, whose effects join the batch.
    pub(super) fn start(&mut self) -> Result<Result<(), FailedStart>, StoreError> {
        let started = self.try_start()?;
        let may_have_room = self.session_mut().end_start();
        // The code is the cause if it traps, or requests more than is ever allowed.
        let had_no_room = |trap: &Trap| may_have_room && trap.stack.is_empty() && trap.limit.is_none();
        Ok(started.map_err(|trap| FailedStart {
            is_own_fault: !had_no_room(&trap) && trap.limit != Some(LimitName::INSTANCES),
            reason: trap.reason,
        }))
    }

    fn try_start(&mut self) -> Result<Result<(), Trap>, StoreError> {
        let InstanceSlot::Bare(mut session) =
            std::mem::replace(&mut self.running.body, InstanceSlot::Between)
        else {
            unreachable!("an instance is made only when there is none");
        };
        let time = session.context.time();
        session.begin_start(time);
        if let Some(recorded) = &self.attempts.recorded {
            session.publishing.outgoing = recorded
                .room_of_start(self.attempts.starts.next(self.attempts.after), session.effects.batch.cursor);
        }
        self.running.setting.random.begin(session.effects.batch.cursor.0, u64::MAX);
        self.counters.instances += 1;
        let making = Instant::now();
        let made = Instance::new(&self.run.prepared, *session, &self.running.setting);
        let made_in = nanoseconds(making.elapsed());
        match made {
            Ok(instance) => self.running.body = InstanceSlot::Live(Box::new(instance)),
            Err(failed) => {
                let (session, error) = *failed;
                self.running.body = InstanceSlot::Bare(Box::new(session));
                self.meet(&error);
                return refused(error);
            }
        }
        let (config, from) = (self.run.config.clone(), self.running.state_version);
        let starting = Instant::now();
        let started = self.instance().start(&config, from);
        self.running.start_took = (made_in, nanoseconds(starting.elapsed()));
        match started {
            Ok(Ok(())) => {
                self.note_start();
                let version = self.run.prepared.inspection.manifest.state_version;
                if self.running.state_version != Some(version) {
                    self.session_mut().effects.batch.code.started = Some(version);
                    self.running.state_version = Some(version);
                }
                Ok(Ok(()))
            }
            Ok(Err(reason)) => {
                self.fail(true);
                Ok(Err(Trap::of_reason(said(reason))))
            }
            Err(error) => {
                self.fail(true);
                self.meet(&error);
                refused(error)
            }
        }
    }

    /// Counts the limit that ended a call, if one did.
    pub(super) fn meet(&mut self, error: &CallError) {
        if let CallError::Trap(trap) | CallError::Limit(trap) = error
            && let Some(limit) = trap.limit
        {
            self.session_mut().meets(limit);
        }
    }

    pub(super) fn instance(&mut self) -> &mut Instance {
        match &mut self.running.body {
            InstanceSlot::Live(instance) => instance,
            _ => unreachable!("made ready before"),
        }
    }

    /// Whether an epoch ended during a call since the last call of this function. A dropped instance counts as
    /// slow, because it cannot tell.
    pub(super) fn take_slow(&mut self) -> bool {
        match &mut self.running.body {
            InstanceSlot::Live(instance) => instance.take_slow(),
            _ => true,
        }
    }

    pub(super) fn drop_instance(&mut self) {
        self.running.body = match std::mem::replace(&mut self.running.body, InstanceSlot::Between) {
            InstanceSlot::Live(instance) => InstanceSlot::Bare(Box::new(instance.into_session())),
            other => other,
        };
    }

    pub(super) fn session(&self) -> &Session {
        match &self.running.body {
            InstanceSlot::Bare(session) => session,
            InstanceSlot::Live(instance) => instance.session(),
            InstanceSlot::Between => unreachable!("only inside `start` and `drop_instance`"),
        }
    }

    pub(super) fn session_mut(&mut self) -> &mut Session {
        match &mut self.running.body {
            InstanceSlot::Bare(session) => session,
            InstanceSlot::Live(instance) => instance.session_mut(),
            InstanceSlot::Between => unreachable!("only inside `start` and `drop_instance`"),
        }
    }
}

/// Separates the trap of a failed start from a fault of the host, which is the error.
pub(super) fn refused(error: CallError) -> Result<Result<(), Trap>, StoreError> {
    match error {
        CallError::Trap(trap) | CallError::Limit(trap) => Ok(Err(trap)),
        CallError::Host(error) => Err(error),
    }
}
