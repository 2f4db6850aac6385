//! Owns the moment at which other code takes over: between two entries, with everything that the plugin
//! has. The batch of the old code is closed; what the new code's `start` asks for begins the next one, and
//! both become real, or neither does.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::Actor;
use super::body::refused;
use crate::entry::Offset;
use crate::ident::Topic;
use crate::plugin::Prepared;
use crate::plugin::instance::{Instance, Setting};
use crate::plugin::limits::Limits;
use crate::plugin::roster::Code;
use crate::plugin::session::{Mode, Session, SessionParts};
use crate::store::StoreError;

/// Code that takes over from what runs.
#[derive(Debug)]
pub struct Successor {
    /// Its component.
    pub prepared: Prepared,
    /// Its config, a JSON object.
    pub config: String,
    /// What it may take.
    pub limits: Limits,
    /// The topics that its manifest asks for and that it may subscribe to.
    pub topics: Vec<Topic>,
    /// What the store says of it from then on.
    pub code: Code,
    /// Who waits to hear how it went.
    pub done: oneshot::Sender<Succession>,
}

/// How it went: what is durable, or why the old code goes on.
pub type Succession = Result<TakenOver, String>;

/// Other code has taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TakenOver {
    /// The first entry that it handles.
    pub at: Offset,
    /// The version of the state that it found.
    pub from_state_version: Option<u32>,
    /// How long the plugin handled nothing, but for the compiling that came before.
    pub pause: Duration,
}

/// What a batch says of the code that takes over with it.
#[derive(Debug)]
pub struct Handover {
    /// What the store says of it.
    pub code: Code,
    told: Mutex<Option<(oneshot::Sender<Succession>, TakenOver)>>,
}

impl Handover {
    /// Tells who waits that it is durable.
    pub fn tell(&self) {
        let told = self.told.lock().expect("no one panics while holding it").take();
        if let Some((done, taken_over)) = told {
            // Whoever asked may have gone away.
            let _ = done.send(Ok(taken_over));
        }
    }
}

impl Actor {
    /// Lets a successor take over, if there is one and the old code's batch is with the commit.
    pub(super) fn take_over(&mut self) -> Result<(), StoreError> {
        if !self.inbox.has_successor() || !self.hand_over() {
            return Ok(());
        }
        let Some(successor) = self.inbox.take_successor() else { return Ok(()) };
        let Successor { mut prepared, mut config, mut limits, topics, code, done } = successor;
        let (begun, from) = (Instant::now(), self.state_version);
        self.drop_instance();
        self.swap(&mut prepared, &mut config, &mut limits);
        match self.start()? {
            Ok(()) => {
                self.restart = None;
                self.subscribe_to_new(topics);
                let taken_over =
                    TakenOver { at: self.cursor(), from_state_version: from, pause: begun.elapsed() };
                let told = Mutex::new(Some((done, taken_over)));
                self.session_mut().effects.batch.handover = Some(Handover { code, told });
                self.show_running();
                self.hand_over();
            }
            Err(reason) => {
                self.swap(&mut prepared, &mut config, &mut limits);
                let _ = done.send(Err(reason));
            }
        }
        Ok(())
    }

    fn swap(&mut self, prepared: &mut Prepared, config: &mut String, limits: &mut Limits) {
        std::mem::swap(&mut self.prepared, prepared);
        std::mem::swap(&mut self.config, config);
        self.version.clone_from(&self.prepared.inspection.manifest.version);
        let version = self.version.clone();
        self.session_mut().run_as(version, limits);
    }

    /// Subscribes to what the manifest asks for and the plugin never had.
    fn subscribe_to_new(&mut self, topics: Vec<Topic>) {
        let session = self.session_mut();
        let time = session.world.time();
        session.begin(Mode::Entry, time);
        for topic in topics {
            if session.world.is_new(&topic) {
                session.effects.subscribe(&mut session.world, topic, true);
            }
        }
    }
}

/// Starts a component on what a plugin has and throws away what it does; returns why it does not start.
/// Blocks for as long as a start may take.
pub fn rehearse(
    prepared: &Prepared,
    session: SessionParts,
    secret: &[u8; 32],
    config: &str,
    from_state_version: Option<u32>,
) -> Result<Result<(), String>, StoreError> {
    let setting = Setting::new(secret, &session.plugin);
    let mut session = Session::new(session, prepared.inspection.manifest.version.clone())?;
    let time = session.world.time();
    session.begin(Mode::Entry, time);
    setting.random.begin(session.effects.batch.cursor.0, u64::MAX);
    let started = match Instance::new(prepared, session, &setting) {
        Ok(mut instance) => instance.start(config, from_state_version),
        Err(failed) => Err(failed.1),
    };
    started.map_or_else(refused, Ok)
}
