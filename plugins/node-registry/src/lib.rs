//! Tracks the nodes of the fleet, their free resources and their status.
//!
//! The registry receives heartbeats and the verdicts of watchdogs. It publishes a document under an IPNS
//! key, together with the jobs that the job tracker publishes.

mod document;
mod intake;
mod import;
mod instances;
mod merged;
mod node;
mod orders;
mod query;
mod resources;
mod heartbeat;

use std::time::Duration;

use dim_guest::document::Document;
use dim_guest::heartbeat::check_id;
use dim_guest::log::{self, Level};
use dim_guest::speaker::{Binding, Speakers};
use dim_guest::time::Time;
use dim_guest::{Event, Failure, Message, Origin, Plugin, Refusal, export_plugin, ipns, json, state, timers};
use serde::Deserialize;

use heartbeat::Said;
use intake::{Observer, Verdict};
use node::{Before, NODES, Node};
use query::Filter;

/// The config of the plugin. The manifest describes the fields.
#[derive(Debug, Deserialize)]
pub struct Config {
    heartbeat_topic: String,
    status_topic: String,
    ipns_key_name: String,
    registry_ipns: Option<String>,
    trusted_observers: Vec<String>,
    publish_every_ms: u64,
    forget_after_days: u64,
    bind_nodes: Binding,
    node_peers: Vec<String>,
}

/// The timer that removes nodes that have been dead for `forget_after_days`.
const FORGET: &str = "forget";
/// Interval of this timer.
const FORGET_EVERY: Duration = Duration::from_secs(3_600);

/// The plugin `node-registry`.
pub struct NodeRegistry {
    config: Config,
    document: Document,
    speakers: Speakers,
    jobs: String,
}

impl Plugin for NodeRegistry {
    type Config = Config;

    fn start(config: Config, _: Option<u32>) -> Result<Self, String> {
        let jobs = format!("{}-jobs", config.ipns_key_name);
        ipns::follow(&jobs).map_err(|error| format!("cannot follow {jobs}: {error:?}"))?;
        match &config.registry_ipns {
            Some(other) => {
                ipns::follow(other).map_err(|error| format!("cannot follow {other}: {error:?}"))?;
            }
            None => merged::forget().map_err(|error| format!("{error:?}"))?,
        }
        if timers::get(FORGET).map_err(|error| format!("{error:?}"))?.is_none() {
            look_again_after(FORGET_EVERY).map_err(|error| format!("{error:?}"))?;
        }
        let every = Duration::from_millis(config.publish_every_ms);
        let document = Document::new(config.ipns_key_name.clone(), "document", every);
        let speakers = Speakers::new(config.bind_nodes, &config.node_peers)?;
        Ok(Self { config, document, speakers, jobs })
    }

    fn handle(&mut self, event: Event) -> Result<(), Failure> {
        match event {
            Event::Message(message) if message.topic == self.config.heartbeat_topic => {
                self.heartbeat(&message)
            }
            Event::Message(message) if message.topic == self.config.status_topic => self.verdict(&message),
            Event::Timer(timer) if self.document.is_due(&timer) => self.publish(),
            Event::Timer(timer) if timer.key == FORGET => self.forget(),
            Event::NameChanged(changed) => self.name_changed(&changed.name),
            Event::Message(_) | Event::Timer(_) | Event::Gap(_) => Ok(()),
        }
    }

    fn command(&mut self, method: &str, body: &str) -> Result<String, Refusal> {
        match method {
            "import" => import::import(self, body),
            "put" => self.put(body),
            "remove" => self.remove(&json::read(body)?),
            "unbind" => self.speakers.unbind(body),
            _ => Err(Refusal::UnknownMethod),
        }
    }

    fn query(&self, method: &str, body: &str) -> Result<String, Refusal> {
        match method {
            "get" => get(json::read(body)?),
            "list" => list(&json::read(body)?),
            "merged" => json::write(&merged::report()?),
            _ => Err(Refusal::UnknownMethod),
        }
    }
}

impl NodeRegistry {
    fn heartbeat(&self, message: &Message) -> Result<(), Failure> {
        let now = Time::now();
        let said = Said::read(&message.data, now)?;
        self.speakers.check(&said.node_id, &message.origin)?;
        let record = NODES.get_raw(&said.node_id)?;
        if record.is_none() {
            self.document.check_room("nodes")?;
        }
        // An unreadable record is replaced.
        let before = record.as_deref().and_then(|record| state::decode::<Before<'_>>(record).ok());
        let before = before.unwrap_or_default();
        let node = Node::heard(record.as_deref(), &before, said, now);
        log_news(&before, &node);
        let bytes = NODES.put(&node.node_id, &node)?;
        self.document.counts(record.as_ref().map(Vec::len), Some(bytes))?;
        self.document.touch()
    }

    /// Applies a verdict, which lasts until the next heartbeat. Ignores verdicts of peers that are not in
    /// `trusted_observers`.
    fn verdict(&self, message: &Message) -> Result<(), Failure> {
        let verdict = Verdict::parse(&message.data)?;
        let trusted = &self.config.trusted_observers;
        let observer = match (&message.origin, message.origin.peer()) {
            (Origin::Plugin(_), _) => Observer::Own,
            (_, Some(peer)) if !trusted.iter().any(|it| it == peer) => return Ok(()),
            _ => Observer::Other,
        };
        let Some(record) = NODES.get_raw(&verdict.node_id)? else { return Ok(()) };
        let Some(mut node) = query::read(&record) else { return Ok(()) };
        if node.judge(&verdict, observer, Time::now()) {
            let bytes = NODES.put(&node.node_id, &node)?;
            self.document.counts(Some(record.len()), Some(bytes))?;
            self.document.touch()?;
        }
        Ok(())
    }

    /// Handles a changed name. Jobs are part of the document. Merged nodes are not, because two registries that
    /// merge each other would publish without end.
    fn name_changed(&self, name: &str) -> Result<(), Failure> {
        let is = |known: &str| ipns::resolve(known).is_ok_and(|known| known.name == name);
        if is(&self.jobs) {
            return self.document.touch();
        }
        let is_own = ipns::key_id(&self.config.ipns_key_name)? == name;
        if !is_own && self.config.registry_ipns.as_deref().is_some_and(is) {
            merged::merge(name)?;
        }
        Ok(())
    }

    fn forget(&self) -> Result<(), Failure> {
        let age = Duration::from_secs(self.config.forget_after_days.saturating_mul(86_400));
        let forgotten = self.forget_dead(age)?;
        look_again_after(if forgotten.all { FORGET_EVERY } else { Duration::ZERO })?;
        if forgotten.count > 0 { self.document.touch() } else { Ok(()) }
    }

    fn publish(&self) -> Result<(), Failure> {
        self.document.publish(&document::build(&self.document, &self.jobs)?)
    }
}

/// Logs a new conflict and newly unreadable members of a heartbeat.
fn log_news(before: &Before<'_>, node: &Node) {
    if let Some(conflict) = node.conflict.as_ref().filter(|_| !before.is_in_conflict()) {
        let fields = [("node_id", node.node_id.as_str()), ("instances", &conflict.instances.join(", "))];
        log::line(
            Level::Warn,
            "several agents send heartbeats under one node id: give each its own",
            &fields,
        );
    }
    if node.ignored.is_empty() {
        return;
    }
    // Compares only the names of the members, because the values in the reasons may differ each time.
    let members = |reasons: &[String]| -> Vec<String> {
        reasons.iter().map(|reason| reason.split(':').next().unwrap_or_default().to_owned()).collect()
    };
    if members(&before.ignored()) != members(&node.ignored) {
        let fields = [("node_id", node.node_id.as_str()), ("ignored", &node.ignored.join("; "))];
        log::line(Level::Warn, "unreadable members of a heartbeat are ignored", &fields);
    }
}

fn look_again_after(pause: Duration) -> Result<(), timers::Error> {
    timers::set(FORGET, Time::now().after(pause).timestamp())
}

/// A body that names a node.
#[derive(Deserialize)]
struct Named {
    node_id: String,
}

fn get(Named { node_id }: Named) -> Result<String, Refusal> {
    check_id(&node_id).map_err(Refusal::Invalid)?;
    json::write(&query::get(&node_id)?.ok_or(Refusal::NotFound(node_id))?)
}

fn list(filter: &Filter) -> Result<String, Refusal> {
    json::write(&query::list(filter)?)
}

export_plugin!(NodeRegistry, manifest: "../plugin.toml");
