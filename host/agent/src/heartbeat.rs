//! Owns the task that sends heartbeats with the machine's figures at intervals. Only the newest figures count, so a
//! heartbeat that fails is not stored.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use dim_model::connectivity::Connectivity;
use dim_model::ident::NodeId;
use dim_model::time::{Clock, Timestamp};
use serde::Serialize;
use serde_json::json;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::machine::{Machine, Resources};
use crate::transport::{Transport, Undelivered};

/// The time limit of a heartbeat, unless the interval is shorter.
const PATIENCE: Duration = Duration::from_secs(10);

/// The task that sends heartbeats.
#[derive(Debug)]
pub struct Heartbeat {
    /// The node.
    pub node: NodeId,
    /// The identifier of this start of the agent.
    pub instance: String,
    /// The models that the node has.
    pub models: Vec<String>,
    /// The time between two heartbeats.
    pub every: Duration,
    /// The transport to the receivers.
    pub transport: Arc<dyn Transport>,
    /// The state of the connection, from the results of sends.
    pub connectivity: Arc<Connectivity>,
    /// The last heartbeat that was sent.
    pub last: Arc<Mutex<Option<Beat>>>,
    /// The clock that measures the time between two heartbeats.
    pub clock: Arc<dyn Clock>,
}

/// A heartbeat that was sent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Beat {
    /// The time of the heartbeat.
    pub sent: Timestamp,
    /// The figures in it.
    pub resources: Resources,
}

impl Heartbeat {
    /// Sends heartbeats until `stop` is cancelled.
    pub async fn run(self, machine: Machine, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(self.clock.real(self.every));
        // One heartbeat after a suspend is enough.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let beats = async {
            // The CPU usage needs a minimum time between two measurements.
            tokio::time::sleep(sysinfo::MINIMUM_CPU_UPDATE_INTERVAL).await;
            let mut machine = machine;
            loop {
                ticks.tick().await;
                machine = self.beat(machine).await;
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = beats => {}
        }
    }

    fn said(&self) -> Said<'_> {
        let Self { node, instance, models, every, .. } = self;
        Said { node, instance, every: *every, models }
    }

    async fn beat(&self, mut machine: Machine) -> Machine {
        let look = tokio::task::spawn_blocking(move || (machine.look(), machine));
        let (resources, machine) = look.await.expect("a look at the machine does not panic");
        let sent = Timestamp::wall();
        let patience = PATIENCE.min(self.every);
        let message = message(&self.said(), sent, &resources);
        let told = tokio::time::timeout(patience, self.transport.beat(message)).await;
        match told.unwrap_or_else(|_| Err(Undelivered::Away(format!("no answer within {patience:?}")))) {
            Ok(()) => {
                self.connectivity.made();
                let mut last = self.last.lock().expect("no thread panics while it holds the last beat");
                *last = Some(Beat { sent, resources });
            }
            Err(why) => self.connectivity.failed(&why),
        }
        machine
    }
}

/// The fields that are the same in each heartbeat of an agent.
#[derive(Debug)]
pub struct Said<'a> {
    /// The node.
    pub node: &'a NodeId,
    /// The identifier of this start of the agent. It distinguishes two agents of one node.
    pub instance: &'a str,
    /// The time between two heartbeats. A watchdog compares it with its own limit.
    pub every: Duration,
    /// The models that the node has.
    pub models: &'a [String],
}

/// Returns a new identifier of a start of an agent.
pub fn new_instance() -> String {
    format!("{:016x}", rand::random::<u64>())
}

/// Returns a heartbeat in the form that nodes of a fleet use.
pub fn message(said: &Said<'_>, time: Timestamp, resources: &Resources) -> String {
    let heartbeat = json!({
        "node_id": said.node,
        "timestamp": time,
        "status": "online",
        "resources": resources,
        "cached_models": said.models,
        "instance": said.instance,
        "every_ms": u64::try_from(said.every.as_millis()).unwrap_or(u64::MAX),
    });
    heartbeat.to_string()
}
