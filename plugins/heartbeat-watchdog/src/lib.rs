//! Detects silent nodes and publishes verdicts. Only the time in which the host could receive heartbeats
//! counts as silence.
//!
//! Each node has a durable timer, set at its first heartbeat. When it fires, the watchdog checks the
//! node's last heartbeat and sets the timer again. So a heartbeat needs no timer write.

mod import;
mod silence;

use std::time::Duration;

use dim_guest::heartbeat::{Heartbeat, check_id};
use dim_guest::log::{self, Level};
use dim_guest::member::Members;
use dim_guest::speaker::{Binding, Speakers};
use dim_guest::time::Time;
use dim_guest::{DueTimer, Event, Failure, Message, Plugin, Refusal, export_plugin, json, pubsub, timers};
use serde::{Deserialize, Serialize};

use silence::{NODES, Node, Standing};

/// The config of the plugin. The manifest describes the fields.
#[derive(Debug, Deserialize)]
pub struct Config {
    heartbeat_topic: String,
    status_topic: String,
    observer: String,
    suspect_after_ms: u64,
    dead_after_ms: u64,
    mass_silence_min: usize,
    forget_after_days: u64,
    bind_nodes: Binding,
    node_peers: Vec<String>,
}

/// The plugin `heartbeat-watchdog`.
pub struct Watchdog {
    config: Config,
    speakers: Speakers,
}

/// A command body that names a node.
#[derive(Deserialize)]
struct Named {
    node_id: String,
}

/// A verdict on a node, as it is published.
#[derive(Serialize)]
struct Verdict<'a> {
    node_id: &'a str,
    status: Standing,
    observer: &'a str,
    timestamp: Time,
    last_seen: Time,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

impl Plugin for Watchdog {
    type Config = Config;

    fn start(config: Config, _: Option<u32>) -> Result<Self, String> {
        if config.suspect_after_ms == 0 || config.dead_after_ms <= config.suspect_after_ms {
            return Err(
                "suspect_after_ms must be greater than 0, and dead_after_ms greater than that".to_owned()
            );
        }
        let speakers = Speakers::new(config.bind_nodes, &config.node_peers)?;
        Ok(Self { config, speakers })
    }

    fn handle(&mut self, event: Event) -> Result<(), Failure> {
        match event {
            Event::Message(message) => self.heartbeat(&message),
            Event::Timer(timer) => self.look(&timer),
            Event::NameChanged(_) | Event::Gap(_) => Ok(()),
        }
    }

    fn command(&mut self, method: &str, body: &str) -> Result<String, Refusal> {
        match method {
            "import" => import::import(self, body),
            "unbind" => self.speakers.unbind(body),
            "remove" => self.remove(&json::read(body)?),
            _ => Err(Refusal::UnknownMethod),
        }
    }

    fn query(&self, method: &str, body: &str) -> Result<String, Refusal> {
        match method {
            "list" => silence::list(&json::read(body)?, |node| self.hint(node)),
            _ => Err(Refusal::UnknownMethod),
        }
    }
}

impl Watchdog {
    fn heartbeat(&self, message: &Message) -> Result<(), Failure> {
        let heartbeat = Heartbeat::parse(&message.data)?;
        // The node registry reports the other unreadable members.
        let every_ms = Members::default().read("every_ms", heartbeat.every_ms);
        let id = heartbeat.node_id;
        self.speakers.check(&id, &message.origin)?;
        let known = NODES.get(&id)?;
        let now = Time::now();
        // Reads the timer itself, because a timer whose event was rejected is gone and must be set again. The
        // timer of a dead node is the one that removes it.
        let is_back = known.as_ref().is_some_and(|node| node.standing == Standing::Dead);
        if is_back || timers::get(&id)?.is_none() {
            timers::set(&id, now.after(self.suspect_after()).timestamp())?;
        }
        let node = Node { last_seen: now, standing: Standing::Alive, every_ms, removed: false };
        if known.as_ref().is_some_and(|node| node.standing != Standing::Alive) {
            self.say(&id, Standing::Recovered, &node)?;
        }
        NODES.set(&id, &node)?;
        if every_ms.is_some() && known.is_none_or(|known| known.every_ms != every_ms) {
            self.warn_of_slowness(&id, &node);
        }
        silence::heard_someone(now)
    }

    /// Executes the command `remove`. The record of a dead node stays hidden until its timer fires, so that the
    /// watchdog publishes a verdict if the node returns.
    fn remove(&self, Named { node_id }: &Named) -> Result<String, Refusal> {
        check_id(node_id).map_err(Refusal::Invalid)?;
        let known = NODES.get(node_id)?.filter(|node| !node.removed);
        let known = known.ok_or_else(|| Refusal::NotFound(node_id.clone()))?;
        self.speakers.forget(node_id)?;
        if known.standing == Standing::Dead {
            NODES.set(node_id, &Node { removed: true, ..known.clone() })?;
        } else {
            NODES.delete(node_id)?;
            timers::clear(node_id).map_err(|error| Refusal::Other(format!("{error:?}")))?;
        }
        json::write(&known)
    }

    /// Returns a hint for the operator if a node's heartbeat interval is longer than the watchdog's limits.
    fn hint(&self, node: &Node) -> Option<String> {
        let every = Duration::from_millis(node.every_ms?);
        let (limit, becomes, option) = match () {
            () if every >= self.dead_after() => (self.dead_after(), "dead", "dead_after_ms"),
            () if every >= self.suspect_after() => (self.suspect_after(), "suspect", "suspect_after_ms"),
            () => return None,
        };
        Some(format!(
            "the node sends a heartbeat every {every:?} and is {becomes} after {limit:?} of silence: send \
             heartbeats more often, or raise {option}"
        ))
    }

    fn warn_of_slowness(&self, id: &str, node: &Node) {
        if let Some(hint) = self.hint(node) {
            let fields = [("node_id", id), ("hint", hint.as_str())];
            log::line(Level::Warn, "a node sends heartbeats too rarely", &fields);
        }
    }

    /// Handles the timer of a node: judges its silence and sets the timer to the next check. The timer of a dead node
    /// removes the node.
    fn look(&self, timer: &DueTimer) -> Result<(), Failure> {
        let id = timer.key.as_str();
        let Some(mut node) = NODES.get(id)? else { return Ok(()) };
        if node.standing == Standing::Dead {
            self.speakers.forget(id)?;
            return Ok(NODES.delete(id)?);
        }
        let hearing = pubsub::heard(&self.config.heartbeat_topic, node.last_seen.timestamp())?;
        let silent = Duration::from_nanos(hearing.listened);
        let standing = self.judge(silent)?;
        // If a limit refuses the verdict, the node keeps its status and is checked again soon.
        let is_news = standing.is_worse_than(node.standing);
        let is_said = is_news && self.say_if_there_is_room(id, standing, &node)?;
        if is_said {
            node.standing = standing;
        }
        if node.standing == Standing::Dead {
            timers::set(id, Time::now().after(self.forget_after()).timestamp())?;
        } else {
            let next = match () {
                () if is_news && !is_said => silent,
                () if silent < self.suspect_after() => self.suspect_after(),
                () => self.dead_after(),
            };
            // The silence does not grow while the host cannot receive messages, so the pause has a minimum.
            let pause =
                next.saturating_sub(silent).max(self.suspect_after() / 20).max(Duration::from_millis(50));
            timers::set(id, Time::now().after(pause).timestamp())?;
        }
        NODES.set(id, &node)?;
        Ok(())
    }

    fn judge(&self, silent: Duration) -> Result<Standing, Failure> {
        if silent < self.suspect_after() {
            return Ok(Standing::Alive);
        }
        // If all nodes fall silent together, the host itself is probably at fault: the limit is doubled.
        let doubted = silent < self.dead_after() * 2 && self.all_are_silent()?;
        if silent < self.dead_after() || doubted { Ok(Standing::Suspect) } else { Ok(Standing::Dead) }
    }

    /// Returns whether no node sent a heartbeat for `suspect_after_ms`, although at least `mass_silence_min` nodes are
    /// not dead.
    fn all_are_silent(&self) -> Result<bool, Failure> {
        let silence = Time::now().since(silence::last_heard()?);
        Ok(silence >= self.suspect_after() && silence::living_at_least(self.config.mass_silence_min)?)
    }

    /// Publishes a verdict. Returns false if a limit refuses the publish.
    fn say_if_there_is_room(&self, id: &str, standing: Standing, node: &Node) -> Result<bool, Failure> {
        match self.say(id, standing, node) {
            Ok(()) => Ok(true),
            Err(pubsub::Error::LimitExceeded(_)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn say(&self, node_id: &str, status: Standing, node: &Node) -> Result<(), pubsub::Error> {
        let verdict = Verdict {
            node_id,
            status,
            observer: &self.config.observer,
            timestamp: Time::now(),
            last_seen: node.last_seen,
            hint: self.hint(node),
        };
        let verdict = serde_json::to_vec(&verdict).expect("a verdict is plain data");
        pubsub::publish(&self.config.status_topic, &verdict)
    }

    fn forget_after(&self) -> Duration {
        Duration::from_secs(self.config.forget_after_days.saturating_mul(86_400))
    }

    fn suspect_after(&self) -> Duration {
        Duration::from_millis(self.config.suspect_after_ms)
    }

    fn dead_after(&self) -> Duration {
        Duration::from_millis(self.config.dead_after_ms)
    }
}

export_plugin!(Watchdog, manifest: "../plugin.toml");
