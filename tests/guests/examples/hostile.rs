//! A plugin that wants the worst. Its config names the attack; a timer that it sets again and again drives it, and it
//! does the same at each call.

use std::hint::black_box;
use std::time::Duration;

use dim_guest::log::Level;
use dim_guest::{Event, Failure, Plugin, Refusal, export_plugin, ipns, log, pubsub, state, timers};
use serde::Deserialize;

#[derive(Deserialize)]
struct Config {
    attack: String,
}

struct Hostile {
    attack: String,
    /// What it keeps from call to call.
    hoard: Vec<Vec<u8>>,
    calls: u64,
}

/// The timer that drives it.
const GO: &str = "go";

impl Plugin for Hostile {
    type Config = Config;

    fn start(Config { attack }: Config, _: Option<u32>) -> Result<Self, String> {
        let mut hostile = Hostile { attack, hoard: Vec::new(), calls: 0 };
        let _ = timers::set(GO, 0);
        if hostile.attack.starts_with("start-") {
            hostile.attack()?;
        }
        Ok(hostile)
    }

    fn handle(&mut self, _: Event) -> Result<(), Failure> {
        let _ = timers::set(GO, 0);
        self.attack().map_err(Failure::Reject)
    }

    fn command(&mut self, _: &str, _: &str) -> Result<String, Refusal> {
        self.attack().map_err(Refusal::Other)?;
        Ok("{}".to_owned())
    }

    fn query(&self, _: &str, _: &str) -> Result<String, Refusal> {
        let mut again = Hostile { attack: self.attack.clone(), hoard: Vec::new(), calls: self.calls };
        again.attack().map_err(Refusal::Other)?;
        Ok("{}".to_owned())
    }
}

impl Hostile {
    fn attack(&mut self) -> Result<(), String> {
        self.calls += 1;
        match self.attack.as_str() {
            "loop" => spin(),
            "allocate" => loop {
                self.hoard.push(vec![1; 1 << 20]);
            },
            "flood-outbox" => {
                while pubsub::publish("hostile.out", &[b'x'; 1_000]).is_ok() {}
                Ok(())
            }
            "log-without-end" => {
                for line in 0..10_000 {
                    log::line(Level::Error, &format!("{line} {}", "x".repeat(1_000)), &[]);
                }
                Ok(())
            }
            "fill-state" => {
                let value = vec![black_box(7); 1 << 19];
                for part in 0.. {
                    let key = format!("{}/{part}", self.calls % 1_000);
                    if state::set(key.as_bytes(), &value).is_err() {
                        break;
                    }
                }
                Ok(())
            }
            "write-documents" => {
                let document = vec![black_box(b'x'); 2 << 20];
                ipns::update_state("hostile-key", &document, None)
                    .map(drop)
                    .map_err(|error| format!("{error:?}"))
            }
            "sleep" => {
                std::thread::sleep(Duration::from_secs(3_600));
                Ok(())
            }
            other => Err(format!("there is no attack {other}")),
        }
    }
}

fn spin() -> ! {
    loop {
        black_box(());
    }
}

export_plugin!(Hostile, manifest: "hostile.toml");
