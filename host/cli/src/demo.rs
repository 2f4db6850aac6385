//! Owns `dim run --demo N`: simulated nodes that send heartbeats and run jobs; from time to time one falls silent.
//! Receives a running host; writes the reactions of the plugins to standard output.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dim_ipfs::embedded::new_peer;
use dim_model::entry::{Event, Kind, Origin};
use dim_model::escape::escaped;
use dim_model::ident::{PeerName, Topic};
use dim_server::config::Config;
use dim_server::host::Host;
use dim_server::line_queue::LineQueue;
use rand::RngExt as _;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Interval between two heartbeats of a node.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Duration of a job.
const JOB: Duration = Duration::from_secs(12);
/// Duration of a node's silence; long enough for the watchdog to declare it dead.
const SILENCE: Duration = Duration::from_secs(12);
/// Time in which all nodes send heartbeats before one falls silent.
const CALM: Duration = Duration::from_secs(6);
/// Interval between two summaries of the fleet.
const SHOW: Duration = Duration::from_secs(5);

/// Shortens the time limits of the watchdog to seconds, so that a demonstration shows dead nodes soon. Values that the
/// config sets stay.
pub fn quicken(config: &mut Config) {
    let watchdog = config.plugins.entry("heartbeat-watchdog".parse().expect("a valid name")).or_default();
    for (key, value) in [("suspect_after_ms", 3_000), ("dead_after_ms", 6_000)] {
        watchdog.config.entry(key).or_insert_with(|| value.into());
    }
}

/// Runs the fleet until `stop` is cancelled, and writes its events to `out`.
pub async fn run(host: Arc<Host>, nodes: u32, out: LineQueue, stop: CancellationToken) -> anyhow::Result<()> {
    host.all_loaded().await;
    let fleet = Fleet::new(host, nodes, out);
    fleet.say(format_args!(
        "{nodes} simulated nodes; one of them falls silent now and then. Stop with Ctrl-C."
    ));
    tokio::select! {
        biased;
        () = stop.cancelled() => Ok(()),
        result = async {
            tokio::try_join!(fleet.send_heartbeats(), fleet.tell(), fleet.show()).map(drop)
        } => result,
    }
}

struct Fleet {
    host: Arc<Host>,
    peers: Vec<PeerName>,
    heartbeats: Topic,
    jobs: Topic,
    verdicts: Topic,
    out: LineQueue,
}

impl Fleet {
    fn new(host: Arc<Host>, nodes: u32, out: LineQueue) -> Self {
        let topics = host.config.now().ipfs.pubsub.clone();
        Self {
            peers: (0..nodes).map(|_| new_peer()).collect(),
            heartbeats: topics.node_heartbeat,
            jobs: topics.job_updates,
            verdicts: topics.node_status,
            host,
            out,
        }
    }

    /// Writes an escaped line without waiting for the reader.
    fn say(&self, line: fmt::Arguments<'_>) {
        self.out.push(format!("{}\n", escaped(&line.to_string())).into_bytes());
    }

    async fn send_heartbeats(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        let mut jobs: Vec<Option<(u64, Instant)>> = vec![None; self.peers.len()];
        let mut next_job = 1;
        let mut interval = tokio::time::interval(HEARTBEAT);
        loop {
            interval.tick().await;
            let silent = silent_node(begun.elapsed(), self.peers.len());
            for (index, job) in jobs.iter_mut().enumerate().filter(|(index, _)| Some(*index) != silent) {
                self.heartbeat(index).await?;
                match job {
                    Some((number, since)) if since.elapsed() >= JOB => {
                        self.job(index, *number, "completed").await?;
                        *job = None;
                    }
                    Some(_) => {}
                    None => {
                        self.job(index, next_job, "running").await?;
                        *job = Some((next_job, Instant::now()));
                        next_job += 1;
                    }
                }
            }
        }
    }

    async fn heartbeat(&self, index: usize) -> anyhow::Result<()> {
        let free = rand::rng().random_range(8..64);
        let heartbeat = json!({
            "node_id": node_id(index),
            "timestamp": jiff::Timestamp::now(),
            "status": "online",
            "resources": { "cpu_available": free / 4, "memory_available": free, "gpu_available": index % 2 },
            "cached_models": ["llama-3-8b"],
        });
        self.publish(index, &self.heartbeats, &heartbeat).await
    }

    async fn job(&self, index: usize, number: u64, event: &str) -> anyhow::Result<()> {
        let message = json!({
            "job_id": format!("job-{number}"),
            "event_type": event,
            "timestamp": jiff::Timestamp::now(),
            "data": { "node_id": node_id(index) },
        });
        self.publish(index, &self.jobs, &message).await
    }

    /// Publishes a message: as a peer of its own on the embedded bus, else through the daemon.
    async fn publish(&self, index: usize, topic: &Topic, message: &Value) -> anyhow::Result<()> {
        let data = Bytes::from(message.to_string());
        match &self.host.exchange.bus {
            Some(bus) => bus.publish_as(&self.peers[index], topic, data).await,
            None => {
                if let Err(error) = self.host.exchange.links.backend.pubsub.publish(topic, data).await {
                    self.say(format_args!("          a simulated node cannot publish: {error}"));
                }
            }
        }
        Ok(())
    }

    /// Follows the log, and writes the verdicts of the watchdog and their effect on jobs.
    async fn tell(&self) -> anyhow::Result<()> {
        let mut log = self.host.storage.log.follow(None);
        let mut entries = VecDeque::new();
        loop {
            let Some(entry) = entries.pop_front() else {
                entries = log.read().await?.entries;
                continue;
            };
            let Kind::Event(Event::Message { topic, data, origin }) = &entry.kind else { continue };
            let Ok(message) = serde_json::from_slice::<Value>(data) else { continue };
            let word = |key: &str| message[key].as_str().unwrap_or("?").to_owned();
            let time = format!("{:.0}", entry.time);
            if *topic == self.verdicts && matches!(origin, Origin::Plugin(_)) {
                self.say(format_args!(
                    "{time}  heartbeat-watchdog: {} is {}",
                    word("node_id"),
                    word("status")
                ));
                if ["dead", "recovered"].contains(&word("status").as_str()) {
                    // The job tracker receives the verdict at the same time and needs a moment to handle it.
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    self.tell_jobs_of(&word("node_id"), &time).await;
                }
            }
        }
    }

    async fn tell_jobs_of(&self, node: &str, time: &str) {
        let jobs = self.query("job-tracker", json!({ "node_id": node, "status": "running" })).await;
        for job in jobs.as_array().into_iter().flatten() {
            let id = job["job_id"].as_str().unwrap_or("?");
            match job["node_dead"]["observer"].as_str() {
                Some(observer) => self.say(format_args!(
                    "{time}  job-tracker: {id} is marked: {observer} reports that its node {node} is dead"
                )),
                None => {
                    self.say(format_args!("{time}  job-tracker: {id} continues, its node {node} is alive"))
                }
            }
        }
    }

    async fn show(&self) -> anyhow::Result<()> {
        loop {
            tokio::time::sleep(SHOW).await;
            let nodes = self.query("node-registry", json!({})).await;
            let jobs = self.query("job-tracker", json!({ "status": "running" })).await;
            let finished = self.query("job-tracker", json!({ "status": "completed" })).await;
            self.say(format_args!(
                "{:.0}  {}",
                self.host.storage.log.now(),
                summary(&nodes, &jobs, &finished)
            ));
        }
    }

    async fn query(&self, plugin: &str, body: Value) -> Value {
        let Some(found) = self.host.plugins.get(plugin) else { return Value::Null };
        let reply = found.handle.query("list".to_owned(), body.to_string()).await;
        reply.ok().and_then(|reply| serde_json::from_str(&reply).ok()).unwrap_or_default()
    }
}

fn summary(nodes: &Value, jobs: &Value, finished: &Value) -> String {
    let nodes: Vec<String> = nodes
        .as_array()
        .into_iter()
        .flatten()
        .take(8)
        .map(|node| {
            format!("{} {}", node["node_id"].as_str().unwrap_or("?"), node["status"].as_str().unwrap_or("?"))
        })
        .collect();
    let count = |list: &Value| list.as_array().map_or(0, Vec::len);
    format!(
        "node-registry: {}; job-tracker: {} running, {} completed",
        nodes.join(", "),
        count(jobs),
        count(finished)
    )
}

fn node_id(index: usize) -> String {
    format!("node-{}", index + 1)
}

/// The index of the silent node, if any: each node in turn, with [`CALM`] before each silence.
fn silent_node(elapsed: Duration, nodes: usize) -> Option<usize> {
    let round = CALM + SILENCE;
    let number = usize::try_from(elapsed.as_secs() / round.as_secs()).unwrap_or(0);
    let within = elapsed.as_secs() % round.as_secs();
    (within >= CALM.as_secs()).then_some(number % nodes)
}
