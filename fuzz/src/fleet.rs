//! Runs a plugin on a fake host with the messages and commands of a fleet. Each line of the input is a step; its first
//! character selects the kind.

use std::time::Duration;

use dim_guest::fake::Host;
use dim_guest::{Event, Failure, Gap, Message, Origin, Plugin};

/// Maximum number of steps of one run.
const STEPS: usize = 200;

/// The peers that publish.
const PEERS: [&str; 3] = [
    "12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf",
    "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5",
    "QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN",
];

/// A plugin under test.
pub struct Fleet<P> {
    /// The host of the plugin.
    pub host: Host,
    /// The plugin.
    pub plugin: P,
    config: &'static str,
}

impl<P: Plugin> Fleet<P> {
    /// Starts a plugin without state.
    pub fn new(config: &'static str) -> Self {
        let host = Host::new();
        let plugin = start(&host, config);
        Self { host, plugin, config }
    }

    /// Runs the steps. The first character of a step is one of these:
    ///
    /// - a topic in `topics`: the next character selects the sender, and the rest is a message on the topic;
    /// - a command in `commands`: the rest is its body;
    /// - `+`: this number of seconds passes;
    /// - `~`: this number of seconds passes, in which the host receives no messages;
    /// - `@`: a new instance starts.
    pub fn run(&mut self, steps: &[u8], topics: &[(u8, &str)], commands: &[(u8, &str)]) {
        for step in steps.split(|byte| *byte == b'\n').take(STEPS) {
            let Some((what, rest)) = step.split_first() else { continue };
            if let Some((_, topic)) = topics.iter().find(|(name, _)| name == what) {
                let Some((who, data)) = rest.split_first() else { continue };
                let _ = self.hear(topic, *who, data);
            } else if let Some((_, method)) = commands.iter().find(|(name, _)| name == what) {
                let body = String::from_utf8_lossy(rest);
                let _ = self.host.command(&mut self.plugin, method, &body);
                // A query with any body must have no effects.
                let before = self.host.state();
                for method in ["get", "list", method] {
                    let _ = self.host.query(&self.plugin, method, &body);
                }
                assert!(before == self.host.state(), "a query changed the state");
            } else {
                self.other(*what, rest);
            }
        }
    }

    /// Delivers a message on a topic from the sender that `who` selects. Returns whether the plugin accepted it.
    pub fn hear(&mut self, topic: &str, who: u8, data: &[u8]) -> bool {
        let origin = match who.wrapping_sub(b'0') % 5 {
            0 => Origin::Host,
            1 => Origin::Plugin("heartbeat-watchdog".to_owned()),
            peer => Origin::Peer(PEERS[usize::from(peer) - 2].to_owned()),
        };
        let message = Message { topic: topic.to_owned(), data: data.to_vec(), origin };
        let handled = self.host.handle(&mut self.plugin, Event::Message(message));
        if let Err(Failure::Reject(why)) = &handled {
            assert!(!why.is_empty(), "rejected without a reason");
            assert!(!why.contains("stored record"), "its own state cannot be read: {why}");
        }
        handled.is_ok()
    }

    fn other(&mut self, what: u8, rest: &[u8]) {
        let seconds = || {
            let digits = std::str::from_utf8(rest).ok()?.parse::<u32>().ok()?;
            Some(Duration::from_secs(u64::from(digits.min(1 << 20))))
        };
        match what {
            b'+' => self.pass(seconds().unwrap_or_default()),
            b'~' => {
                let deaf = seconds().unwrap_or_default();
                self.pass(deaf);
                self.host.was_deaf_for(deaf);
                let until = self.host.now().timestamp();
                let gap = Gap { topic: "heartbeats".to_owned(), since: until, until, missing: None };
                self.host.handle(&mut self.plugin, Event::Gap(gap)).expect("a gap does not fail");
            }
            b'@' => self.plugin = start(&self.host, self.config),
            _ => {}
        }
    }

    /// Advances the time. Fails if a timer fails; a timer that fires without end is a hang.
    pub fn pass(&mut self, time: Duration) {
        // The watchdog checks a silent node every few seconds, so only the first hour fires timers in order.
        let hour = Duration::from_secs(3_600);
        self.host.pass(&mut self.plugin, time.min(hour)).expect("a timer fails");
        if let Some(rest) = time.checked_sub(hour) {
            self.host.skip(rest);
            self.host.pass(&mut self.plugin, Duration::ZERO).expect("a timer fails");
        }
    }

    /// Sends a query that must succeed, and returns the reply.
    pub fn query(&self, method: &str, body: &str) -> serde_json::Value {
        let answer = self.host.query(&self.plugin, method, body).expect("it answers");
        serde_json::from_str(&answer).expect("an answer is JSON")
    }

    /// Returns the published document of a key, after a minute for its build.
    pub fn document(&mut self, key: &str) -> Option<serde_json::Value> {
        self.pass(Duration::from_secs(60));
        let document = self.host.document(key)?;
        Some(serde_json::from_slice(&document).expect("a document is JSON"))
    }
}

fn start<P: Plugin>(host: &Host, config: &str) -> P {
    host.start(config, 1).expect("it starts")
}
