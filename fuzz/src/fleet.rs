//! A plugin on a fake host, and what a fleet says to it: one step a line, its first character says what.

use std::time::Duration;

use dim_guest::fake::Host;
use dim_guest::{Event, Failure, Gap, Message, Origin, Plugin};

/// Most steps of one run.
const STEPS: usize = 200;

/// Peers that speak.
const PEERS: [&str; 3] = [
    "12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf",
    "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5",
    "QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN",
];

/// A plugin of a fleet.
pub struct Fleet<P> {
    /// Its host.
    pub host: Host,
    /// The plugin.
    pub plugin: P,
    config: &'static str,
}

impl<P: Plugin> Fleet<P> {
    /// A plugin without state.
    pub fn new(config: &'static str) -> Self {
        let host = Host::new();
        let plugin = start(&host, config);
        Self { host, plugin, config }
    }

    /// Takes each step that `topics` and `commands` name by a character:
    ///
    /// - a topic's: what follows the next character is a message on it, that character says whose;
    /// - a command's: what follows is its body;
    /// - `+`: that many seconds pass; `~`: so many of which nothing was heard;
    /// - `@`: another instance takes over.
    pub fn run(&mut self, steps: &[u8], topics: &[(u8, &str)], commands: &[(u8, &str)]) {
        for step in steps.split(|byte| *byte == b'\n').take(STEPS) {
            let Some((what, rest)) = step.split_first() else { continue };
            if let Some((_, topic)) = topics.iter().find(|(name, _)| name == what) {
                let Some((who, data)) = rest.split_first() else { continue };
                let _ = self.hear(topic, *who, data);
            } else if let Some((_, method)) = commands.iter().find(|(name, _)| name == what) {
                let body = String::from_utf8_lossy(rest);
                let _ = self.host.command(&mut self.plugin, method, &body);
                // A question of any body has no effects and does no harm.
                let before = self.host.state();
                for method in ["get", "list", method] {
                    let _ = self.host.query(&self.plugin, method, &body);
                }
                assert!(before == self.host.state(), "a query has changed the state");
            } else {
                self.other(*what, rest);
            }
        }
    }

    /// Lets somebody speak on a topic, as one that a character stands for; returns whether that was taken in.
    pub fn hear(&mut self, topic: &str, who: u8, data: &[u8]) -> bool {
        let origin = match who.wrapping_sub(b'0') % 5 {
            0 => Origin::Host,
            1 => Origin::Plugin("heartbeat-watchdog".to_owned()),
            peer => Origin::Peer(PEERS[usize::from(peer) - 2].to_owned()),
        };
        let message = Message { topic: topic.to_owned(), data: data.to_vec(), origin };
        let handled = self.host.handle(&mut self.plugin, Event::Message(message));
        if let Err(Failure::Reject(why)) = &handled {
            assert!(!why.is_empty(), "refused, and not said why");
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
                let gap = Gap { topic: "heartbeats".to_owned(), since: until, until };
                self.host.handle(&mut self.plugin, Event::Gap(gap)).expect("a gap is no failure");
            }
            b'@' => self.plugin = start(&self.host, self.config),
            _ => {}
        }
    }

    /// Lets time pass, in which no timer may fail or fire for ever.
    pub fn pass(&mut self, time: Duration) {
        // The watchdog looks at a silent node every few seconds.
        let hour = Duration::from_secs(3_600);
        self.host.pass(&mut self.plugin, time.min(hour)).expect("a timer fails");
        if let Some(rest) = time.checked_sub(hour) {
            self.host.skip(rest);
            self.host.pass(&mut self.plugin, Duration::ZERO).expect("a timer fails");
        }
    }

    /// Asks.
    pub fn query(&self, method: &str, body: &str) -> serde_json::Value {
        let answer = self.host.query(&self.plugin, method, body).expect("it answers");
        serde_json::from_str(&answer).expect("an answer is JSON")
    }

    /// The document that a key points to.
    pub fn document(&mut self, key: &str) -> Option<serde_json::Value> {
        self.pass(Duration::from_secs(60));
        let document = self.host.document(key)?;
        Some(serde_json::from_slice(&document).expect("a document is JSON"))
    }
}

fn start<P: Plugin>(host: &Host, config: &str) -> P {
    host.start(config, 1).expect("it starts")
}
