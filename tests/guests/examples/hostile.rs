//! A plugin that attacks its host. Its config selects the attack, which each call runs. With `again` a repeated timer
//! continues the attack. The plugin reports refusals of the host as the reason of a rejection.

use std::fmt::Debug;
use std::hint::black_box;
use std::time::{Duration, SystemTime};

use dim_guest::log::Level;
use dim_guest::{Event, Failure, Plugin, Refusal, export_plugin, ipns, log, pubsub, state, timers};
use serde::Deserialize;

#[derive(Clone, Deserialize)]
struct Config {
    attack: String,
    again: bool,
}

struct Hostile {
    config: Config,
    /// Memory that it keeps between calls.
    hoard: Vec<Vec<u8>>,
    calls: u64,
}

/// The timer that continues the attack.
const GO: &str = "go";

/// The result of an attack: an error is the host's refusal.
type Attack = Result<(), String>;

impl Plugin for Hostile {
    type Config = Config;

    fn start(config: Config, _: Option<u32>) -> Result<Self, String> {
        let mut hostile = Hostile { config, hoard: Vec::new(), calls: 0 };
        if hostile.config.again {
            let _ = timers::set(GO, 0);
        }
        if hostile.config.attack.starts_with("start-") {
            hostile.attack()?;
        }
        Ok(hostile)
    }

    fn handle(&mut self, _: Event) -> Result<(), Failure> {
        if self.config.again {
            let _ = timers::set(GO, 0);
        }
        match self.config.attack.as_str() {
            "retry-for-ever" => return Err(Failure::Retry(0)),
            "reject-with-a-novel" => return Err(Failure::Reject("never ".repeat(1 << 20))),
            _ => {}
        }
        self.attack().map_err(Failure::Reject)
    }

    fn command(&mut self, _: &str, _: &str) -> Result<String, Refusal> {
        if self.config.attack == "answer-with-a-novel" {
            return Ok("x".repeat(32 << 20));
        }
        self.attack().map_err(Refusal::Other)?;
        Ok("{}".to_owned())
    }

    fn query(&self, _: &str, _: &str) -> Result<String, Refusal> {
        let mut again = Hostile { config: self.config.clone(), hoard: Vec::new(), calls: self.calls };
        again.attack().map_err(Refusal::Other)?;
        Ok("{}".to_owned())
    }
}

/// Returns the error of an operation that must fail.
fn refused<T, E: Debug>(result: Result<T, E>, what: &str) -> Attack {
    match result {
        Ok(_) => panic!("{what} went well"),
        Err(error) => Err(format!("{what}: {error:?}")),
    }
}

/// Repeats an operation until the host refuses it.
fn until_refused<E: Debug>(what: &str, mut step: impl FnMut(u64) -> Result<(), E>) -> Attack {
    for number in 0.. {
        if let Err(error) = step(number) {
            return Err(format!("{what}: {error:?}"));
        }
    }
    Ok(())
}

impl Hostile {
    #[expect(clippy::too_many_lines, reason = "a list of attacks")]
    fn attack(&mut self) -> Attack {
        self.calls += 1;
        let calls = self.calls;
        match self.config.attack.as_str() {
            // CPU time.
            "loop" | "start-loop" => spin(),
            // Exceeds no limit: at most 0.1 s of work on any machine, repeated immediately.
            "work-without-end" => {
                black_box((0..20_000_000_u64).fold(calls, |sum, number| black_box(sum ^ number)));
                Ok(())
            }
            "wait-for-the-clock" => {
                let begun = SystemTime::now();
                while begun.elapsed().is_ok_and(|elapsed| elapsed < Duration::from_secs(1)) {}
                Ok(())
            }
            "sleep" => {
                std::thread::sleep(Duration::from_secs(3_600));
                Ok(())
            }
            "call-the-host-without-end" => until_refused("read", |_| state::get(b"nothing").map(drop)),
            "scan-without-end" => until_refused("scan", |_| state::scan(b"", None, u32::MAX).map(drop)),
            // Memory.
            "allocate" => loop {
                self.hoard.push(vec![1; 1 << 20]);
            },
            "hoard" => {
                self.hoard.push(vec![1; 33 << 20]);
                Ok(())
            }
            "recurse" => {
                black_box(recurse(u64::MAX));
                Ok(())
            }
            "ask-for-random-without-end" => {
                black_box(wasip2::random::random::get_random_bytes(1 << 40));
                Ok(())
            }
            "hold-on-to-resources" => {
                let held: Vec<_> = (0..1_000_000).map(|_| wasip2::cli::stdout::get_stdout()).collect();
                black_box(held);
                Ok(())
            }
            // Traps.
            "trap" | "start-trap" => panic!("it wants to"),
            "abort" => std::process::abort(),
            "exit" => std::process::exit(1),
            "start-fail" => Err("it does not want to".to_owned()),
            // Publishes.
            "flood-outbox" => {
                while pubsub::publish("hostile.out", &[b'x'; 1_000]).is_ok() {}
                Ok(())
            }
            "publish-too-much-at-once" => {
                until_refused("publish", |_| pubsub::publish("hostile.out", &[b'x'; 60 << 10]))
            }
            "publish-a-huge-message" => {
                refused(pubsub::publish("hostile.out", &vec![b'x'; 2 << 20]), "a huge message")
            }
            "send-a-flood-over-the-border" => {
                refused(pubsub::publish("hostile.out", &vec![b'x'; 40 << 20]), "a flood")
            }
            "speak-on-a-topic-of-others" => refused(pubsub::publish("dim.jobs.updates", b"{}"), "a topic"),
            "smuggle-a-line-into-a-topic" => {
                refused(pubsub::publish("hostile.out\nhostile.in", b"x"), "a topic")
            }
            "listen-to-others" => refused(pubsub::subscribe("dim.nodes.heartbeat"), "a topic"),
            "toggle-a-subscription" => {
                for _ in 0..50_000 {
                    pubsub::unsubscribe("hostile.in").map_err(|error| format!("{error:?}"))?;
                    pubsub::subscribe("hostile.in").map_err(|error| format!("{error:?}"))?;
                }
                Err("it has toggled".to_owned())
            }
            "listen-to-everything" => {
                until_refused("subscribe", |number| pubsub::subscribe(&format!("hostile.{number}")))
            }
            // State.
            "fill-state" => {
                let value = vec![black_box(7); 1 << 19];
                until_refused("state", |part| {
                    state::set(format!("{}/{part}", calls % 1_000).as_bytes(), &value)
                })
            }
            "write-a-million-keys" => {
                until_refused("state", |number| state::set(&number.to_be_bytes(), b"x"))
            }
            "write-a-huge-value" => refused(state::set(b"huge", &vec![1; 2 << 20]), "a huge value"),
            "write-a-long-key" => refused(state::set(&[b'k'; 1_000], b"x"), "a long key"),
            // Timers.
            "set-timers-without-end" => {
                until_refused("timer", |number| timers::set(&format!("{calls}/{number}"), u64::MAX))
            }
            "set-timers-in-the-past" => {
                for number in 0..1_000 {
                    timers::set(&format!("past/{number}"), number).map_err(|error| format!("{error:?}"))?;
                }
                Err("a thousand are due at once".to_owned())
            }
            // Names.
            "take-the-key-of-others" => refused(ipns::update_state("dim-state-key", b"{}", None), "a key"),
            "read-what-is-not-granted" => refused(ipns::follow("dim-state-key"), "a name"),
            "publish-a-huge-document" => {
                refused(ipns::update_state("hostile-key", &vec![b'x'; 8 << 20], None), "a huge document")
            }
            "publish-documents-without-end" => until_refused("document", |number| {
                let document = vec![number as u8; 1 << 20];
                ipns::update_state("hostile-key", &document, None).map(drop)
            }),
            "publish-changed-documents" => {
                let mut document = vec![b'x'; 3 << 20];
                document[..8].copy_from_slice(&calls.to_le_bytes());
                ipns::update_state("hostile-key", &document, None).map_err(|error| format!("{error:?}"))
            }
            // The log.
            "log-without-end" => {
                for line in 0..100_000 {
                    log::line(Level::Error, &format!("{line} {}", "x".repeat(1_000)), &[]);
                }
                Ok(())
            }
            "print-without-end" => {
                for line in 0..100_000 {
                    println!("{line} {}", "x".repeat(1_000));
                }
                Ok(())
            }
            "draw-on-the-terminal" => {
                log::line(Level::Error, "\x1b[2J\x1b]0;owned\x07\nERROR all is lost", &[]);
                Err("\x1b[2Jnothing to see".to_owned())
            }
            // The machine.
            "read-files" => refused(std::fs::read("/etc/passwd"), "a file"),
            "write-files" => refused(std::fs::write("/tmp/hostile", b"x"), "a file"),
            "connect" => refused(std::net::TcpStream::connect("127.0.0.1:22"), "a connection"),
            "listen-on-a-port" => refused(std::net::TcpListener::bind("127.0.0.1:0"), "a port"),
            "read-the-environment" => match std::env::vars().count() + std::env::args().count() {
                0 => Err("the environment is empty".to_owned()),
                found => panic!("{found} words of the environment"),
            },
            "make-a-thread" => refused(std::thread::Builder::new().spawn(spin), "a thread"),
            other => Err(format!("there is no attack {other}")),
        }
    }
}

fn spin() -> ! {
    loop {
        black_box(());
    }
}

fn recurse(depth: u64) -> u64 {
    if depth == 0 { 0 } else { 1 + black_box(recurse(black_box(depth - 1))) }
}

export_plugin!(Hostile, manifest: "hostile.toml");
