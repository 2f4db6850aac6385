//! Owns heartbeats: what the machine has to spare, now and then. Only the newest counts, so none is
//! kept: a time that has passed without one stays so.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::machine::{Machine, Resources};
use super::way::{Untold, Way};
use crate::contact::Contact;
use crate::ident::NodeId;
use crate::time::Timestamp;

/// How long one may take, unless the next comes sooner.
const PATIENCE: Duration = Duration::from_secs(10);

/// The task.
#[derive(Debug)]
pub struct Heartbeat {
    /// Whose heart it is.
    pub node: NodeId,
    /// The name of this agent's instance.
    pub instance: String,
    /// The models that the node holds.
    pub models: Vec<String>,
    /// How often it beats.
    pub every: Duration,
    /// To whom.
    pub way: Arc<dyn Way>,
    /// How that goes.
    pub contact: Arc<Contact>,
    /// The last one that got through.
    pub last: Arc<Mutex<Option<Beat>>>,
}

/// A heartbeat that got through.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Beat {
    /// When.
    pub sent: Timestamp,
    /// What it said.
    pub resources: Resources,
}

impl Heartbeat {
    /// Sends heartbeats until `stop` is cancelled.
    pub async fn run(self, machine: Machine, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(self.every);
        // After a suspend one is enough.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let beats = async {
            // The first figure of the CPU needs some time to be about.
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
        let told = tokio::time::timeout(patience, self.way.beat(message)).await;
        match told.unwrap_or_else(|_| Err(Untold::Away(format!("no answer within {patience:?}")))) {
            Ok(()) => {
                self.contact.made();
                let mut last = self.last.lock().expect("no one panics while holding the last beat");
                *last = Some(Beat { sent, resources });
            }
            Err(why) => self.contact.failed(&why),
        }
        machine
    }
}

/// What each heartbeat of one agent says.
#[derive(Debug)]
pub struct Said<'a> {
    /// The node.
    pub node: &'a NodeId,
    /// The agent, another one after each start: two that speak for one node are told apart by it.
    pub instance: &'a str,
    /// The time between two heartbeats, so that a watchdog can say that it waits for less.
    pub every: Duration,
    /// The models that the node holds.
    pub models: &'a [String],
}

/// The name of an agent's instance, for as long as it runs.
pub fn new_instance() -> String {
    format!("{:016x}", rand::random::<u64>())
}

/// A heartbeat, as nodes of a fleet send it.
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
