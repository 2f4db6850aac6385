//! Owns what runs in a host: spawns the threads and tasks, and ends them in order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::start::{Start, quota};
use super::{Host, HostError};
use crate::cause::chain;
use crate::echo::Echoes;
use crate::followed::Follower;
use crate::ident::{PluginName, Topic};
use crate::names::Publisher;
use crate::outbox::Outbox;
use crate::plugin::{Actor, Engine};
use crate::retention::Retention;
use crate::retries::Retries;
use crate::store::{StoreError, names, outbox};
use crate::subscription::{self, Prober, Subscriptions};

/// How long the outbox may go on sending when the host ends.
const GRACE: Duration = Duration::from_secs(5);

/// Who is told why the host cannot go on.
pub type Fail = Arc<watch::Sender<Option<String>>>;

/// The threads and tasks of a host.
#[derive(Debug)]
pub struct Running {
    stops: Stops,
    intake_tasks: TaskTracker,
    other_tasks: TaskTracker,
    plugin_threads: BTreeMap<PluginName, JoinHandle<()>>,
    writer_thread: JoinHandle<()>,
    epoch_thread: JoinHandle<()>,
}

/// What is cancelled to end them, in this order.
#[derive(Debug, Default)]
struct Stops {
    intake: CancellationToken,
    plugins: CancellationToken,
    tasks: CancellationToken,
    writer: CancellationToken,
}

impl Running {
    /// Starts everything; the writer first, for the others wait for it.
    pub fn spawn(
        start: &Start,
        echoes: &Arc<Echoes>,
        received: &Arc<subscription::Tally>,
        fail: &Fail,
    ) -> Result<Self, HostError> {
        let stops = Stops::default();
        let writer_thread = start.spawn_writer(stops.writer.clone(), fail.clone())?;
        let epoch_thread = spawn_epochs(start.loader.engine.clone(), stops.writer.clone())?;
        let intake_tasks = start.spawn_intake(&stops.intake, echoes, received)?;
        let other_tasks = start.spawn_tasks(&stops.tasks, echoes, fail.clone());
        let plugin_threads = BTreeMap::new();
        Ok(Self { stops, intake_tasks, other_tasks, plugin_threads, writer_thread, epoch_thread })
    }

    /// What ends a plugin when it is cancelled, and is cancelled when all end.
    pub fn plugin_stop(&self) -> CancellationToken {
        self.stops.plugins.child_token()
    }

    /// Runs a plugin until `stop` is cancelled.
    pub fn spawn_plugin(
        &mut self,
        name: &PluginName,
        actor: Actor,
        stop: CancellationToken,
        fail: Fail,
    ) -> Result<(), HostError> {
        let thread = spawn_thread(format!("plugin {name}"), move || report(&fail, || actor.run(&stop)))?;
        self.plugin_threads.insert(name.clone(), thread);
        Ok(())
    }

    /// Runs a task that ends by itself when the host does.
    pub fn spawn_task(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.other_tasks.spawn(task);
    }

    /// The thread of a plugin that was told to stop, for who waits for its end.
    pub fn take_plugin(&mut self, name: &PluginName) -> Option<JoinHandle<()>> {
        self.plugin_threads.remove(name)
    }

    /// Ends everything: no more intake, plugins finish their entry, the outbox drains within a
    /// grace, everything handled is committed.
    pub async fn end(self, host: &Host) {
        host.log.close();
        self.stops.intake.cancel();
        self.intake_tasks.close();
        self.intake_tasks.wait().await;
        self.stops.plugins.cancel();
        host.plugins.all().values().for_each(|plugin| plugin.handle.wake());
        join(self.plugin_threads.into_values().collect()).await;
        drain(host).await;
        self.stops.tasks.cancel();
        self.other_tasks.close();
        self.other_tasks.wait().await;
        self.stops.writer.cancel();
        self.writer_thread.thread().unpark();
        join(vec![self.writer_thread, self.epoch_thread]).await;
    }

    /// Lets everything end by itself, and waits for nothing.
    pub fn abandon(self, host: &Host) {
        host.log.close();
        for stop in [self.stops.intake, self.stops.plugins, self.stops.tasks, self.stops.writer] {
            stop.cancel();
        }
        host.plugins.all().values().for_each(|plugin| plugin.handle.wake());
        self.writer_thread.thread().unpark();
    }
}

/// Lets what was committed go out, within the grace; says what is left.
async fn drain(host: &Host) {
    let deadline = Instant::now() + GRACE;
    loop {
        let Ok(left) = Left::of(host) else { return };
        if left.is_nothing() {
            return;
        }
        // Without a writer nothing drains any more.
        if Instant::now() >= deadline || host.commit.is_closed() {
            let Left { publishes, names } = left;
            tracing::info!(publishes, names, "these are left and go out after the next start");
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What was committed and the backend has not accepted yet.
struct Left {
    publishes: u64,
    names: usize,
}

impl Left {
    fn of(host: &Host) -> Result<Self, StoreError> {
        let names = names::all(&host.store.snapshot()?)?;
        let names = names.iter().filter(|(_, known)| known.is_waiting()).count();
        Ok(Self { publishes: outbox::waiting(&host.store)?.0, names })
    }

    fn is_nothing(&self) -> bool {
        self.publishes == 0 && self.names == 0
    }
}

async fn join(threads: Vec<JoinHandle<()>>) {
    let joined = tokio::task::spawn_blocking(move || {
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the host panicked");
            }
        }
    });
    if joined.await.is_err() {
        tracing::error!("joining the threads failed");
    }
}

impl Start {
    fn spawn_writer(&self, stop: CancellationToken, fail: Fail) -> Result<JoinHandle<()>, HostError> {
        let (commit, store, log) =
            (self.loader.commit.clone(), self.loader.store.clone(), self.loader.log.clone());
        let thread = spawn_thread("commit".to_owned(), move || {
            report(&fail, || commit.run(&store, &log, &stop));
        })?;
        self.loader.commit.attach(thread.thread().clone());
        self.loader.log.attach(thread.thread().clone());
        Ok(thread)
    }

    fn spawn_intake(
        &self,
        stop: &CancellationToken,
        echoes: &Arc<Echoes>,
        tally: &Arc<subscription::Tally>,
    ) -> Result<TaskTracker, HostError> {
        let tasks = TaskTracker::new();
        let subscriptions = Subscriptions {
            backend: self.loader.backend.clone(),
            log: self.loader.log.clone(),
            commit: self.loader.commit.clone(),
            interest: self.loader.interest.clone(),
            echoes: echoes.clone(),
            hearings: self.loader.hearings.clone(),
            room: self.loader.room.clone(),
            config: self.loader.config.clone(),
            tally: tally.clone(),
        };
        tasks.spawn(subscriptions.run(stop.clone()));
        let prober = Prober {
            backend: self.loader.backend.clone(),
            log: self.loader.log.clone(),
            interest: self.loader.interest.clone(),
            hearings: self.loader.hearings.clone(),
            room: self.loader.room.clone(),
            topic: format!("dim.probe.{}", self.loader.id).parse::<Topic>()?,
        };
        tasks.spawn(prober.run(stop.clone()));
        let follower = Follower {
            store: self.loader.store.clone(),
            commit: self.loader.commit.clone(),
            backend: self.loader.backend.clone(),
            interest: self.loader.interest.clone(),
            keys: self.loader.keys.clone(),
            config: self.loader.config.clone(),
            room: self.loader.room.clone(),
            unresolved: self.loader.unresolved.clone(),
        };
        tasks.spawn(follower.run(stop.clone()));
        Ok(tasks)
    }

    fn spawn_tasks(&self, stop: &CancellationToken, echoes: &Arc<Echoes>, fail: Fail) -> TaskTracker {
        let tasks = TaskTracker::new();
        let (store, commit, backend) = (&self.loader.store, &self.loader.commit, &self.loader.backend);
        let outbox = Outbox {
            store: store.clone(),
            commit: commit.clone(),
            backend: backend.clone(),
            echoes: echoes.clone(),
            backlog: self.loader.backlog.clone(),
            sent: self.sent.clone(),
            expiry: self.loader.config.now().outbox_expiry(),
        };
        tasks.spawn(outbox.run(stop.clone()));
        let publisher = Publisher {
            store: store.clone(),
            commit: commit.clone(),
            backend: backend.clone(),
            keys: self.loader.keys.clone(),
            hearings: self.loader.hearings.clone(),
            failures: self.loader.failures.clone(),
            looks: self.loader.looks.clone(),
        };
        tasks.spawn(publisher.run(stop.clone()));
        let retries = Retries { store: store.clone(), commit: commit.clone(), log: self.loader.log.clone() };
        tasks.spawn(retries.run(stop.clone()));
        let retention = Retention {
            store: store.clone(),
            commit: commit.clone(),
            kept: self.loader.config.now().store.log.clone(),
            undo: self.loader.config.now().replacement.undo(),
            letters: self.loader.config.now().store.dead_letters,
            quota: quota(&self.loader.config.now().store),
            room: self.loader.room.clone(),
            awaited: self.awaited.clone(),
            queue_bytes: self.loader.config.now().queue_bytes(),
        };
        tasks.spawn(retention.run(stop.clone()));
        tasks.spawn(self.lookout().run(fail, stop.clone()));
        tasks
    }
}

/// Runs the work of a thread; without it the host cannot go on.
fn report<E: std::error::Error>(fail: &watch::Sender<Option<String>>, work: impl FnOnce() -> Result<(), E>) {
    let reason = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
        Ok(Ok(())) => return,
        Ok(Err(error)) => chain(&error),
        Err(_) => format!("thread {:?} panicked", std::thread::current().name().unwrap_or_default()),
    };
    fail.send_replace(Some(reason));
}

fn spawn_epochs(engine: Arc<Engine>, stop: CancellationToken) -> Result<JoinHandle<()>, HostError> {
    spawn_thread("epochs".to_owned(), move || {
        while !stop.is_cancelled() {
            std::thread::sleep(Engine::EPOCH);
            engine.tick();
        }
    })
}

fn spawn_thread(name: String, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, HostError> {
    std::thread::Builder::new().name(name).spawn(work).map_err(HostError::Thread)
}
