//! Owns the threads and tasks of a host: spawns them at the start and ends them in order. It receives the opened
//! parts of the host.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dim_model::error_chain::chain;
use dim_model::ident::{PluginName, Topic};
use dim_network::name_follower::NameFollower;
use dim_network::name_publisher::Publisher;
use dim_network::outbox::Outbox;
use dim_network::own_messages::Echoes;
use dim_network::reliable_topics::{Driver, Identity, Inputs, Parts, end_catch_ups_of_plain_topics};
use dim_network::subscription::{self, Prober, Subscriptions};
use dim_runtime::{Actor, Engine};
use dim_store::commit::CommitError;
use dim_store::retention::Retention;
use dim_store::retry_scheduler::Retries;
use dim_store::{StoreError, names, outbox};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::start::{Start, quota};
use super::{Host, HostError};

/// The maximum time for the outbox to continue after the end of the plugins.
const GRACE: Duration = Duration::from_secs(5);

/// The channel for the reason why the host cannot continue.
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

/// The tokens that end the threads and tasks, in the order of their cancellation.
#[derive(Debug, Default)]
struct Stops {
    intake: CancellationToken,
    plugins: CancellationToken,
    tasks: CancellationToken,
    writer: CancellationToken,
}

impl Running {
    /// Starts the driver of reliable topics.
    pub(super) fn spawn_driver(&self, driver: Driver, inputs: Inputs) {
        self.other_tasks.spawn(driver.run(inputs));
    }

    /// Starts everything, the writer first, because the others wait for its commits.
    pub fn spawn(
        start: &Start,
        echoes: &Arc<Echoes>,
        received: &Arc<subscription::Counters>,
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

    /// Returns a token for one plugin, which is cancelled with all plugins.
    pub fn plugin_stop(&self) -> CancellationToken {
        self.stops.plugins.child_token()
    }

    /// Runs a plugin in a thread until `stop` is cancelled.
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

    /// Runs a task that ends by itself when the host ends.
    pub fn spawn_task(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.other_tasks.spawn(task);
    }

    /// Returns the thread of a stopped plugin, to be joined.
    pub fn take_plugin(&mut self, name: &PluginName) -> Option<JoinHandle<()>> {
        self.plugin_threads.remove(name)
    }

    /// Ends everything in order: it stops the intake, lets each plugin finish its current entry, drains the outbox
    /// within the grace period, and commits everything that was handled.
    pub async fn end(self, host: &Host) {
        host.storage.log.close();
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

    /// Cancels everything and waits for nothing.
    pub fn abandon(self, host: &Host) {
        host.storage.log.close();
        for stop in [self.stops.intake, self.stops.plugins, self.stops.tasks, self.stops.writer] {
            stop.cancel();
        }
        host.plugins.all().values().for_each(|plugin| plugin.handle.wake());
        self.writer_thread.thread().unpark();
    }
}

/// Waits until the committed publishes and names are sent, within the grace period. Logs the rest.
async fn drain(host: &Host) {
    let deadline = Instant::now() + GRACE;
    loop {
        let Ok(left) = Left::of(host) else { return };
        if left.is_nothing() {
            return;
        }
        // Without the writer nothing more is sent.
        if Instant::now() >= deadline || host.storage.commit.is_closed() {
            let Left { publishes, names } = left;
            tracing::info!(publishes, names, "not sent before the shutdown, but after the next start");
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The committed publishes and names that the backend has not accepted yet.
struct Left {
    publishes: u64,
    names: usize,
}

impl Left {
    fn of(host: &Host) -> Result<Self, StoreError> {
        let names = names::all(&host.storage.store.snapshot()?)?;
        let names = names.iter().filter(|(_, known)| known.is_waiting()).count();
        Ok(Self { publishes: outbox::waiting(&host.storage.store)?.0, names })
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
        let (commit, store, log) = (
            self.loader.storage.commit.clone(),
            self.loader.storage.store.clone(),
            self.loader.storage.log.clone(),
        );
        let thread = spawn_thread("commit".to_owned(), move || {
            report(&fail, || commit.run(&store, &log, &stop));
        })?;
        self.loader.storage.commit.attach(thread.thread().clone());
        self.loader.storage.log.attach(thread.thread().clone());
        Ok(thread)
    }

    fn spawn_intake(
        &self,
        stop: &CancellationToken,
        echoes: &Arc<Echoes>,
        counters: &Arc<subscription::Counters>,
    ) -> Result<TaskTracker, HostError> {
        let tasks = TaskTracker::new();
        let subscriptions = Subscriptions {
            backend: self.loader.links.backend.clone(),
            log: self.loader.storage.log.clone(),
            commit: self.loader.storage.commit.clone(),
            interest: self.loader.links.interest.clone(),
            echoes: echoes.clone(),
            listening_records: self.loader.links.listening_records.clone(),
            disk: self.loader.storage.disk.clone(),
            settings: self.loader.network.clone(),
            reliable: self.loader.links.reliable.clone(),
            counters: counters.clone(),
        };
        tasks.spawn(subscriptions.run(stop.clone()));
        let prober = Prober {
            backend: self.loader.links.backend.clone(),
            log: self.loader.storage.log.clone(),
            interest: self.loader.links.interest.clone(),
            listening_records: self.loader.links.listening_records.clone(),
            disk: self.loader.storage.disk.clone(),
            reliable: self.loader.links.reliable.clone(),
            topic: format!("dim.probe.{}", self.loader.identity.id).parse::<Topic>()?,
        };
        tasks.spawn(prober.run(stop.clone()));
        let follower = NameFollower {
            store: self.loader.storage.store.clone(),
            commit: self.loader.storage.commit.clone(),
            backend: self.loader.links.backend.clone(),
            interest: self.loader.links.interest.clone(),
            keys: self.loader.storage.keys.clone(),
            settings: self.loader.network.clone(),
            disk: self.loader.storage.disk.clone(),
            unresolved: self.loader.links.unresolved.clone(),
            cipher: self.loader.links.cipher.clone(),
            clock: self.loader.storage.log.clock().clone(),
        };
        tasks.spawn(follower.run(stop.clone()));
        Ok(tasks)
    }

    /// Makes the driver of reliable topics. It ends with the outbox.
    pub(super) fn reliable_topics(
        &self,
        running: &Running,
        identity: Option<Identity>,
        echoes: &Arc<Echoes>,
    ) -> Result<Driver, HostError> {
        let (storage, links) = (&self.loader.storage, &self.loader.links);
        let parts = Parts {
            store: storage.store.clone(),
            commit: storage.commit.clone(),
            log: storage.log.clone(),
            disk: storage.disk.clone(),
            backend: links.backend.clone(),
            backlog: links.backlog.clone(),
            reliable: links.reliable.clone(),
            echoes: echoes.clone(),
            queue_bytes: self.loader.config.now().queue_bytes(),
        };
        Ok(Driver::new(parts, identity, running.stops.tasks.clone())?)
    }

    /// Ends the catch-ups of topics that the config no longer names as reliable.
    pub(super) fn end_catch_ups_of_plain_topics(&self, running: &Running) {
        let (storage, reliable) = (&self.loader.storage, self.loader.links.reliable.clone());
        let (store, commit, log) = (storage.store.clone(), storage.commit.clone(), storage.log.clone());
        running.other_tasks.spawn(async move {
            match end_catch_ups_of_plain_topics(&store, &commit, log, &reliable).await {
                Ok(()) | Err(CommitError::Closed) => {}
                Err(error) => tracing::error!("cannot end the catch-ups of plain topics: {error}"),
            }
        });
    }

    fn spawn_tasks(&self, stop: &CancellationToken, echoes: &Arc<Echoes>, fail: Fail) -> TaskTracker {
        let tasks = TaskTracker::new();
        let (store, commit, backend) =
            (&self.loader.storage.store, &self.loader.storage.commit, &self.loader.links.backend);
        let outbox = Outbox {
            store: store.clone(),
            commit: commit.clone(),
            backend: backend.clone(),
            echoes: echoes.clone(),
            backlog: self.loader.links.backlog.clone(),
            sent: self.sent.clone(),
            reliable: self.loader.links.reliable.clone(),
            expiry: self.loader.config.now().outbox_expiry(),
            clock: self.loader.storage.log.clock().clone(),
        };
        tasks.spawn(outbox.run(stop.clone()));
        let publisher = Publisher {
            store: store.clone(),
            commit: commit.clone(),
            backend: backend.clone(),
            keys: self.loader.storage.keys.clone(),
            listening_records: self.loader.links.listening_records.clone(),
            failures: self.loader.links.failures.clone(),
            looks: self.loader.links.checked_names.clone(),
            cipher: self.loader.links.cipher.clone(),
            clock: self.loader.storage.log.clock().clone(),
        };
        tasks.spawn(publisher.run(stop.clone()));
        let retries =
            Retries { store: store.clone(), commit: commit.clone(), log: self.loader.storage.log.clone() };
        tasks.spawn(retries.run(stop.clone()));
        let retention = Retention {
            store: store.clone(),
            commit: commit.clone(),
            kept: self.loader.config.now().store.log.clone(),
            undo: self.loader.config.now().replacement.undo(),
            letters: self.loader.config.now().store.dead_letters,
            quota: quota(&self.loader.config.now().store),
            disk: self.loader.storage.disk.clone(),
            awaited: self.awaited.clone(),
            queue_bytes: self.loader.config.now().queue_bytes(),
        };
        tasks.spawn(retention.run(stop.clone()));
        tasks.spawn(self.disk_check().run(fail, stop.clone()));
        tasks
    }
}

/// Runs the work of a thread. An error or a panic of it becomes the reason why the host cannot continue.
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
