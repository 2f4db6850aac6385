//! Counts heartbeats and reports silent nodes.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::time::Duration;

use dim_guest::log::{self, Level};
use dim_guest::state::Counters;
use dim_guest::timers::Timers;
use dim_guest::{Event, Failure, Plugin, Refusal, call, export_plugin, json, pubsub};
use serde::{Deserialize, Serialize};

/// Data that must survive a crash belongs in the state: memory is lost with the instance.
const COUNTS: Counters<str> = Counters::new("count/");
const SILENCE: Timers<str> = Timers::new("silent/");

#[derive(Deserialize)]
struct Config {
    silent_topic: String,
    silent_after_seconds: u64,
}

#[derive(Deserialize)]
struct Heartbeat {
    node_id: String,
}

#[derive(Serialize)]
struct Counted {
    node_id: String,
    count: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Command {
    Forget { node_id: String },
}

struct This {
    config: Config,
}

impl Plugin for This {
    type Config = Config;

    fn start(config: Config, _: Option<u32>) -> Result<Self, String> {
        Ok(This { config })
    }

    fn handle(&mut self, event: Event) -> Result<(), Failure> {
        match event {
            Event::Message(message) => {
                let Heartbeat { node_id } = message.json()?;
                if COUNTS.add(&node_id, 1)? == 1 {
                    log::line(Level::Info, "a new node", &[("node_id", &node_id)]);
                }
                SILENCE.set_in(&node_id, Duration::from_secs(self.config.silent_after_seconds))?;
            }
            Event::Timer(timer) => {
                if let Some(node_id) = SILENCE.fired(&timer) {
                    let count = COUNTS.get(&node_id)?.unwrap_or(0);
                    pubsub::publish_json(&self.config.silent_topic, &Counted { node_id, count })?;
                }
            }
            Event::NameChanged(_) | Event::Gap(_) => {}
        }
        Ok(())
    }

    fn command(&mut self, method: &str, body: &str) -> Result<String, Refusal> {
        let Command::Forget { node_id } = call::read(method, body)?;
        let count = COUNTS.get(&node_id)?.ok_or_else(|| Refusal::NotFound(format!("node {node_id}")))?;
        COUNTS.delete(&node_id)?;
        SILENCE.clear(&node_id)?;
        json::write(&Counted { node_id, count })
    }

    fn query(&self, method: &str, _: &str) -> Result<String, Refusal> {
        match method {
            "counts" => json::write(&COUNTS.iter(None).collect::<Result<BTreeMap<_, _>, _>>()?),
            _ => Err(Refusal::UnknownMethod),
        }
    }
}

export_plugin!(This, manifest: "../plugin.toml");
