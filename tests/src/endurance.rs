//! Runs a fleet under faults. The host is under load and uses a daemon behind a faulty proxy. The nodes use another
//! daemon, and one of them dies. The caller judges the results.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dim_ipfs::Backend;
use dim_model::entry::{Event, Kind, Origin};
use serde_json::{Value, json};
use tokio::time::{Instant, interval, sleep};

use crate::{Fault, FaultProxy, Kubo, Setup, TestHost, Witness, directly, eventually};

/// A fault of the daemon, as the host observes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HealthFinding {
    /// The proxy has this fault all the time.
    Proxy(Fault),
    /// The daemon restarts repeatedly, at this interval.
    Restarts(Duration),
    /// The daemon loses its peers while its API stays available.
    PeersLost,
}

/// All faults.
pub const TROUBLES: [HealthFinding; 7] = [
    HealthFinding::Proxy(Fault::Stopped),
    HealthFinding::Proxy(Fault::Frozen),
    HealthFinding::Restarts(Duration::from_secs(3)),
    HealthFinding::Proxy(Fault::Refusing),
    HealthFinding::Proxy(Fault::Cutting),
    HealthFinding::Proxy(Fault::Slow),
    HealthFinding::PeersLost,
];

/// The parameters of a run.
#[derive(Clone, Copy, Debug)]
pub struct Endurance {
    /// The fault.
    pub trouble: HealthFinding,
    /// The duration of the fault.
    pub length: Duration,
    /// The silence after which a node is dead.
    pub dead_after: Duration,
    /// The time between two commands.
    pub pace: Duration,
    /// The seed of the proxy's faults.
    pub seed: u64,
}

/// The results of a run.
#[derive(Debug)]
pub struct Endured {
    /// The latencies of commands before the fault, sorted.
    pub before: Vec<Duration>,
    /// The latencies of commands during the fault, sorted.
    pub during: Vec<Duration>,
    /// The number of failed commands.
    pub failed: usize,
    /// The numbers of the commands whose event was committed but never accepted by the daemon.
    pub lost: Vec<u64>,
    /// The verdicts on nodes that were alive all the time.
    pub accused: BTreeMap<String, Vec<String>>,
    /// The time from the end of the fault to the verdict that the dead node is dead.
    pub found_after: Duration,
    /// The time from the end of the fault to an empty outbox.
    pub drained_after: Duration,
    /// The maximum number of publishes in the outbox.
    pub most_waiting: u64,
}

/// Returns the 99th percentile of sorted latencies.
pub fn p99(latencies: &[Duration]) -> Duration {
    latencies.get(latencies.len() * 99 / 100).copied().unwrap_or_default()
}

const LIVING: [&str; 4] = ["n1", "n2", "n3", "n4"];

/// The number of jobs.
const JOBS: u64 = 100;

/// The node that dies.
const DYING: &str = "doomed";

/// Runs a fleet under a fault. Returns none if `DIM_SKIP_KUBO=1` skips the tests with Kubo.
pub async fn endure(what: Endurance) -> Option<Endured> {
    let (near, far) = Kubo::start_pair()?;
    let target: SocketAddr = near.url().trim_start_matches("http://").parse().expect("an address");
    let proxy = FaultProxy::start(target, what.seed).await;
    let ms = what.dead_after.as_millis();
    let watchdog = json!({ "suspect_after_ms": ms / 2, "dead_after_ms": ms });
    let yaml = format!("plugins:\n  heartbeat-watchdog:\n    config: {watchdog}\n");
    let host = Setup::bundled().yaml(&yaml).on_kubo(&proxy.api()).start().await;
    let fleet = Fleet {
        witness: Witness::of(&near, "dim.jobs.updates").await,
        network: directly(&far),
        host,
        proxy,
        near,
        far,
        what,
        stop: AtomicBool::new(false),
        is_dead: AtomicBool::new(false),
        troubled: AtomicBool::new(false),
        load: Mutex::default(),
    };
    Some(fleet.run().await)
}

/// Returns the number of the command that caused an event.
fn number_of(event: &[u8]) -> u64 {
    let event: Value = serde_json::from_slice(event).expect("an event");
    event["data"]["number"].as_u64().expect("a number")
}

struct Fleet {
    /// The record of the messages that the host's daemon accepted.
    witness: Witness,
    /// The daemon of the nodes.
    network: Backend,
    host: TestHost,
    proxy: FaultProxy,
    near: Kubo,
    far: Kubo,
    what: Endurance,
    stop: AtomicBool,
    is_dead: AtomicBool,
    troubled: AtomicBool,
    load: Mutex<Load>,
}

#[derive(Default)]
struct Load {
    before: Vec<Duration>,
    during: Vec<Duration>,
    acknowledged: Vec<u64>,
    failed: usize,
    most_waiting: u64,
}

impl Fleet {
    async fn run(self) -> Endured {
        self.meet().await;
        let work = async { tokio::join!(self.send_heartbeats(), self.give_orders()) };
        let story = async {
            let outcome = self.tell().await;
            self.stop.store(true, Ordering::SeqCst);
            outcome
        };
        let (_, (found_after, drained_after)) = tokio::join!(work, story);
        let Load { mut before, mut during, acknowledged, failed, most_waiting } =
            std::mem::take(&mut *self.load.lock().expect("no panic"));
        before.sort();
        during.sort();
        let lost = self.lost(&acknowledged).await;
        let accused = LIVING.iter().map(|node| ((*node).to_owned(), self.verdicts(node))).collect();
        Endured { before, during, failed, lost, accused, found_after, drained_after, most_waiting }
    }

    /// Waits until the host receives heartbeats from the daemon of the nodes.
    async fn meet(&self) {
        let topic = "dim.nodes.heartbeat".parse().expect("a topic");
        self.host.listening(&topic).await;
        eventually("the nodes are heard", async || {
            for node in LIVING.iter().chain([&DYING]) {
                self.heartbeat(node).await;
            }
            self.standing("alive").await.len() == LIVING.len() + 1
        })
        .await;
    }

    /// Runs a phase without fault, the fault, and the recovery. Returns the times until the dead node was detected and
    /// the outbox was empty.
    async fn tell(&self) -> (Duration, Duration) {
        sleep(self.what.length).await;
        self.troubled.store(true, Ordering::SeqCst);
        let dying = async {
            sleep(self.what.length / 2).await;
            self.is_dead.store(true, Ordering::SeqCst);
        };
        tokio::join!(self.trouble(), dying);
        self.troubled.store(false, Ordering::SeqCst);
        let over = Instant::now();
        let patience = Duration::from_secs(120) + self.what.dead_after * 3;
        let found = async {
            self.until("the dead node is found", patience, async || {
                self.standing("dead").await == [json!(DYING)]
            })
            .await;
            over.elapsed()
        };
        let drained = async {
            self.until("everything is sent", patience, async || self.waiting() == 0).await;
            over.elapsed()
        };
        tokio::join!(found, drained)
    }

    /// Returns the commands whose event the daemon never accepts. It waits, because the last events are still in the
    /// outbox when their commands are acknowledged.
    async fn lost(&self, acknowledged: &[u64]) -> Vec<u64> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let seen: BTreeSet<u64> = self.witness.seen().iter().map(|data| number_of(data)).collect();
            let lost: Vec<u64> = acknowledged.iter().copied().filter(|it| !seen.contains(it)).collect();
            if lost.is_empty() || Instant::now() > deadline {
                return lost;
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    async fn until(&self, what: &str, patience: Duration, mut holds: impl AsyncFnMut() -> bool) {
        let deadline = Instant::now() + patience;
        while !holds().await {
            assert!(Instant::now() < deadline, "{:?}: in vain: {what}", self.what.trouble);
            sleep(Duration::from_millis(50)).await;
        }
    }

    async fn trouble(&self) {
        match self.what.trouble {
            HealthFinding::Proxy(fault) => {
                self.proxy.set(fault);
                sleep(self.what.length).await;
            }
            HealthFinding::Restarts(every) => {
                let end = Instant::now() + self.what.length;
                while Instant::now() < end {
                    self.proxy.set(Fault::Stopped);
                    sleep(every / 3).await;
                    self.proxy.set(Fault::None);
                    sleep(every * 2 / 3).await;
                }
            }
            HealthFinding::PeersLost => {
                tokio::task::block_in_place(|| self.near.cut_off());
                sleep(self.what.length).await;
                assert!(!self.near.has_peers(), "it was cut off all the while");
                tokio::task::block_in_place(|| self.near.reconnect(&self.far));
            }
        }
        self.proxy.set(Fault::None);
    }

    async fn send_heartbeats(&self) {
        let mut tick = interval(self.what.dead_after / 10);
        while !self.stop.load(Ordering::SeqCst) {
            tick.tick().await;
            for node in LIVING {
                self.heartbeat(node).await;
            }
            if !self.is_dead.load(Ordering::SeqCst) {
                self.heartbeat(DYING).await;
            }
        }
    }

    async fn heartbeat(&self, node: &str) {
        let topic = "dim.nodes.heartbeat".parse().expect("a topic");
        let heartbeat = json!({ "node_id": node, "status": "online", "timestamp": jiff::Timestamp::now() });
        let sent = self.network.pubsub.publish(&topic, heartbeat.to_string().into()).await;
        sent.expect("the nodes' daemon is well");
    }

    async fn give_orders(&self) {
        let mut tick = interval(self.what.pace);
        for number in 0_u64.. {
            tick.tick().await;
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            // A fixed set of jobs, because a growing fleet would increase the latency.
            let job = format!("job-{}", number % JOBS);
            let data = json!({ "node_id": "n1", "number": number });
            let order = json!({ "job_id": job, "event_type": "running", "data": data });
            let begun = Instant::now();
            let reply = self.host.command("job-tracker", "update", order).await;
            let took = begun.elapsed();
            let mut load = self.load.lock().expect("no panic");
            load.most_waiting = load.most_waiting.max(self.waiting());
            match reply {
                Ok(_) => load.acknowledged.push(number),
                Err(_) => load.failed += 1,
            }
            // Commands after the fault are not measured.
            match (self.troubled.load(Ordering::SeqCst), self.is_dead.load(Ordering::SeqCst)) {
                (true, _) => load.during.push(took),
                (false, false) => load.before.push(took),
                (false, true) => {}
            }
        }
    }

    /// Returns the number of publishes in the outbox.
    fn waiting(&self) -> u64 {
        dim_store::outbox::waiting(&self.host.host.storage.store).expect("the outbox").0
    }

    async fn standing(&self, word: &str) -> Vec<Value> {
        let asked = self.host.query("heartbeat-watchdog", "list", json!({ "standing": word })).await;
        let nodes = asked.expect("questions are answered");
        nodes.as_array().expect("a list").iter().map(|node| node["node_id"].clone()).collect()
    }

    fn verdicts(&self, node: &str) -> Vec<String> {
        let entries = self.host.entries();
        let said = entries.iter().filter_map(|entry| match &entry.kind {
            Kind::Event(Event::Message { topic, data, origin: Origin::Plugin(_) })
                if topic.as_str() == "dim.nodes.status" =>
            {
                let verdict: Value = serde_json::from_slice(data).expect("a verdict");
                (verdict["node_id"] == node).then(|| verdict["status"].as_str().unwrap_or("?").to_owned())
            }
            _ => None,
        });
        said.collect()
    }
}
