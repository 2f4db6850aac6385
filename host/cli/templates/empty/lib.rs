//! Logs the messages of a topic.

#![forbid(unsafe_code)]

use dim_guest::log::{self, Level};
use dim_guest::{Event, Failure, Plugin, export_plugin};
use serde::Deserialize;

#[derive(Deserialize)]
struct Config {}

struct This;

impl Plugin for This {
    type Config = Config;

    fn start(_: Config, _: Option<u32>) -> Result<Self, String> {
        Ok(This)
    }

    fn handle(&mut self, event: Event) -> Result<(), Failure> {
        if let Event::Message(message) = event {
            let bytes = message.data.len().to_string();
            log::line(Level::Info, "a message came", &[("topic", &message.topic), ("bytes", &bytes)]);
        }
        Ok(())
    }
}

export_plugin!(This, manifest: "../plugin.toml");
