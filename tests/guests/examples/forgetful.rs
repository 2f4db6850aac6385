//! A plugin that counts messages in its state, or only in its memory, which a new instance loses. Its config can
//! request a single mistake.

use dim_guest::state::{Map, Value};
use dim_guest::{Event, Failure, Plugin, Refusal, export_plugin, json};
use serde::Deserialize;

const COUNT: Value<u64> = Value::new("count");

/// The last number of each thousand numbers.
const LAST: Map<u64, u64> = Map::new("last/");

#[derive(Deserialize)]
struct Config {
    remember: Where,
    /// The number that it deliberately misreads.
    slips_at: Option<u64>,
}

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Where {
    Memory,
    State,
}

struct Forgetful {
    config: Config,
    count: u64,
}

impl Plugin for Forgetful {
    type Config = Config;

    fn start(config: Config, _: Option<u32>) -> Result<Self, String> {
        Ok(Self { config, count: 0 })
    }

    fn handle(&mut self, event: Event) -> Result<(), Failure> {
        if let Event::Message(message) = event {
            let number: u64 = message.json()?;
            self.count += 1;
            if self.config.remember == Where::State {
                COUNT.set(&(COUNT.get()?.unwrap_or(0) + 1))?;
                let slips = self.config.slips_at == Some(number);
                LAST.set(&(number % 1_000), &(number + u64::from(slips)))?;
            }
        }
        Ok(())
    }

    fn query(&self, method: &str, _: &str) -> Result<String, Refusal> {
        match (method, &self.config.remember) {
            ("count", Where::Memory) => json::write(&self.count),
            ("count", Where::State) => json::write(&COUNT.get()?.unwrap_or(0)),
            _ => Err(Refusal::UnknownMethod),
        }
    }
}

export_plugin!(Forgetful, manifest: "forgetful.toml");
