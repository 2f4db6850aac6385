//! Owns the instance of an actor: made when it is needed, started, dropped after a failure.

use std::time::Instant;

use super::Actor;
use super::failing::FailedStart;
use crate::plugin::event::said;
use crate::plugin::instance::{CallError, INSTANCES, Instance, Trap};
use crate::plugin::session::Session;
use crate::store::StoreError;
use crate::time::nanoseconds;

/// The session, with or without an instance around it.
pub enum Body {
    Bare(Box<Session>),
    Live(Box<Instance>),
    /// Only while one of the other two is being made.
    Between,
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Body::Bare(_) => "Bare",
            Body::Live(_) => "Live",
            Body::Between => "Between",
        })
    }
}

impl Actor {
    /// Makes sure that there is an instance that has started; false if it does not start.
    pub(super) fn make_ready(&mut self) -> Result<bool, StoreError> {
        if matches!(self.body, Body::Live(_)) {
            return Ok(true);
        }
        if self.is_quarantined() || self.failing.must_wait() {
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
        // Who traps, or wants more than there ever is, has only itself to blame.
        let had_no_room = |trap: &Trap| may_have_room && trap.stack.is_empty() && trap.limit.is_none();
        Ok(started.map_err(|trap| FailedStart {
            is_own_fault: !had_no_room(&trap) && trap.limit != Some(INSTANCES),
            reason: trap.reason,
        }))
    }

    fn try_start(&mut self) -> Result<Result<(), Trap>, StoreError> {
        let Body::Bare(mut session) = std::mem::replace(&mut self.body, Body::Between) else {
            unreachable!("an instance is made only when there is none");
        };
        let time = session.world.time();
        session.begin_start(time);
        if let Some(recorded) = &self.recorded {
            session.outgoing = recorded.room_of_start(self.starts.next(session.effects.batch.cursor));
        }
        self.setting.random.begin(session.effects.batch.cursor.0, u64::MAX);
        self.tally.instances += 1;
        let making = Instant::now();
        let made = Instance::new(&self.run.prepared, *session, &self.setting);
        let made_in = nanoseconds(making.elapsed());
        match made {
            Ok(instance) => self.body = Body::Live(Box::new(instance)),
            Err(failed) => {
                let (session, error) = *failed;
                self.body = Body::Bare(Box::new(session));
                self.meet(&error);
                return refused(error);
            }
        }
        let (config, from) = (self.run.config.clone(), self.state_version);
        let starting = Instant::now();
        let started = self.instance().start(&config, from);
        self.start_took = (made_in, nanoseconds(starting.elapsed()));
        match started {
            Ok(Ok(())) => {
                self.note_start();
                let version = self.run.prepared.inspection.manifest.state_version;
                if self.state_version != Some(version) {
                    self.session_mut().effects.batch.started = Some(version);
                    self.state_version = Some(version);
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
        match &mut self.body {
            Body::Live(instance) => instance,
            _ => unreachable!("made ready before"),
        }
    }

    /// Whether a call took long enough for its deadline to be looked at, told once: entries without a
    /// call come after it. One that trapped did, for all that is known of it.
    pub(super) fn take_slow(&mut self) -> bool {
        match &mut self.body {
            Body::Live(instance) => instance.take_slow(),
            _ => true,
        }
    }

    pub(super) fn drop_instance(&mut self) {
        self.body = match std::mem::replace(&mut self.body, Body::Between) {
            Body::Live(instance) => Body::Bare(Box::new(instance.into_session())),
            other => other,
        };
    }

    pub(super) fn session(&self) -> &Session {
        match &self.body {
            Body::Bare(session) => session,
            Body::Live(instance) => instance.session(),
            Body::Between => unreachable!("only inside `start` and `drop_instance`"),
        }
    }

    pub(super) fn session_mut(&mut self) -> &mut Session {
        match &mut self.body {
            Body::Bare(session) => session,
            Body::Live(instance) => instance.session_mut(),
            Body::Between => unreachable!("only inside `start` and `drop_instance`"),
        }
    }
}

/// A start that failed: why, unless the host is to blame.
pub(super) fn refused(error: CallError) -> Result<Result<(), Trap>, StoreError> {
    match error {
        CallError::Trap(trap) | CallError::Limit(trap) => Ok(Err(trap)),
        CallError::Host(error) => Err(error),
    }
}
