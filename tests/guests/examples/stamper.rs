//! A plugin for the benchmark of replacements. It stores its version with each event, and detects missing, repeated and
//! reordered events.

use dim_guest::{Event, Failure, Message, Plugin, Refusal, export_plugin, pubsub, state, timers};
use serde::Deserialize;

/// Number of messages between two publishes and between two timers.
const EVERY: u64 = 100;

/// Number of keys that are written in turn.
const KEYS: u64 = 1_000;

#[derive(Deserialize)]
struct Config {
    version: String,
    /// Whether `start` migrates the state to a new layout.
    migrate: bool,
}

struct Stamper {
    version: String,
}

impl Plugin for Stamper {
    type Config = Config;

    fn start(config: Config, from_state_version: Option<u32>) -> Result<Self, String> {
        if config.migrate && from_state_version == Some(1) {
            migrate().map_err(|error| format!("{error:?}"))?;
        }
        Ok(Self { version: config.version })
    }

    fn handle(&mut self, event: Event) -> Result<(), Failure> {
        match event {
            Event::Message(message) => self.message(&message),
            Event::Timer(_) => Ok(add("fired")?),
            Event::NameChanged(_) | Event::Gap(_) => Ok(()),
        }
    }

    fn command(&mut self, method: &str, body: &str) -> Result<String, Refusal> {
        match method {
            "bump" => {
                add("bumped")?;
                Ok("null".to_owned())
            }
            "fill" => {
                let count: u64 = body.parse().map_err(|_| Refusal::Invalid("a number".to_owned()))?;
                for key in 0..count {
                    state::set(format!("old/{key:08}").as_bytes(), b"a value of about thirty bytes..")?;
                }
                Ok("null".to_owned())
            }
            _ => Err(Refusal::UnknownMethod),
        }
    }

    fn query(&self, method: &str, body: &str) -> Result<String, Refusal> {
        match method {
            "number" => Ok(number(body)?.to_string()),
            _ => Err(Refusal::UnknownMethod),
        }
    }
}

impl Stamper {
    fn message(&self, message: &Message) -> Result<(), Failure> {
        let bytes = message.data.get(..8).and_then(|bytes| bytes.try_into().ok());
        let this = u64::from_be_bytes(bytes.ok_or_else(|| Failure::Reject("no number".to_owned()))?);
        let last = number("last")?;
        if this != last + 1 {
            add("wrong")?;
        }
        set("last", this)?;
        state::set(format!("stamp/{}", this % KEYS).as_bytes(), self.version.as_bytes())?;
        if this.is_multiple_of(EVERY) {
            pubsub::publish("stamps", &message.data)?;
            timers::set(&format!("t{}", this % KEYS), dim_guest::time::Time::now().timestamp())?;
        }
        Ok(())
    }
}

fn migrate() -> Result<(), state::Error> {
    let mut after: Option<Vec<u8>> = None;
    loop {
        let page = state::scan(b"old/", after.as_deref(), 1_000)?;
        let Some(last) = page.last() else { return Ok(()) };
        after = Some(last.key.clone());
        for pair in page {
            let new = [b"new/", &pair.key[4..]].concat();
            state::set(&new, &pair.value)?;
            state::delete(&pair.key)?;
        }
    }
}

fn number(key: &str) -> Result<u64, state::Error> {
    let value = state::get(key.as_bytes())?;
    Ok(value.and_then(|value| value.try_into().ok()).map_or(0, u64::from_be_bytes))
}

fn set(key: &str, value: u64) -> Result<(), state::Error> {
    state::set(key.as_bytes(), &value.to_be_bytes())
}

fn add(key: &str) -> Result<(), state::Error> {
    set(key, number(key)? + 1)
}

export_plugin!(Stamper, manifest: "stamper.toml");
