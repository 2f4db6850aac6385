//! Publishes the running jobs as a document under an IPNS name.

#![forbid(unsafe_code)]

use dim_guest::state::Map;
use dim_guest::time::Time;
use dim_guest::{Event, Failure, Plugin, Refusal, export_plugin, ipns, json};
use serde::{Deserialize, Serialize};

/// The running jobs, each with its start time.
const RUNNING: Map<str, Time> = Map::new("running/");

#[derive(Deserialize)]
struct Config {
    key: String,
}

#[derive(Deserialize)]
struct JobEvent {
    job_id: String,
    event_type: String,
}

#[derive(Serialize)]
struct Document {
    jobs: Vec<String>,
}

struct This {
    config: Config,
}

fn running() -> Result<Vec<String>, dim_guest::state::Error> {
    RUNNING.iter(None).map(|job| job.map(|(id, _)| id)).collect()
}

impl Plugin for This {
    type Config = Config;

    fn start(config: Config, _: Option<u32>) -> Result<Self, String> {
        Ok(This { config })
    }

    fn handle(&mut self, event: Event) -> Result<(), Failure> {
        let Event::Message(message) = event else { return Ok(()) };
        let JobEvent { job_id, event_type } = message.json()?;
        let was_running = RUNNING.get(&job_id)?.is_some();
        let is_running = event_type == "running";
        if was_running == is_running {
            return Ok(());
        }
        if is_running {
            RUNNING.set(&job_id, &Time::now())?;
        } else {
            RUNNING.delete(&job_id)?;
        }
        Ok(ipns::update_json(&self.config.key, &Document { jobs: running()? })?)
    }

    fn query(&self, method: &str, _: &str) -> Result<String, Refusal> {
        match method {
            "running" => json::write(&running()?),
            _ => Err(Refusal::UnknownMethod),
        }
    }
}

export_plugin!(This, manifest: "../plugin.toml");
