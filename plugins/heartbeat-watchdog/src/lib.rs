//! Who has gone silent, judged only for time in which the host could hear.
//!
//! Each node has a durable timer, armed when the node is first heard. When it fires, the watchdog
//! looks at the node's last heartbeat and arms it again, so that a heartbeat costs no timer write.

mod import;
mod silence;

use std::time::Duration;

use dim_guest::speaker::{Binding, Speakers};
use dim_guest::time::Time;
use dim_guest::{DueTimer, Event, Failure, Message, Plugin, Refusal, export_plugin, json, pubsub, timers};
use serde::{Deserialize, Serialize};

use silence::{NODES, Node, Standing};

/// The watchdog's config; the manifest describes it.
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

/// The watchdog.
pub struct Watchdog {
    config: Config,
    speakers: Speakers,
}

#[derive(Deserialize)]
struct Heartbeat {
    node_id: String,
}

/// What the watchdog says of a node.
#[derive(Serialize)]
struct Verdict<'a> {
    node_id: &'a str,
    status: Standing,
    observer: &'a str,
    timestamp: Time,
    last_seen: Time,
}

impl Plugin for Watchdog {
    type Config = Config;

    fn start(config: Config, _: Option<u32>) -> Result<Self, String> {
        if config.suspect_after_ms == 0 || config.dead_after_ms <= config.suspect_after_ms {
            return Err("dead_after_ms must be more than suspect_after_ms, and that more than 0".to_owned());
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
            _ => Err(Refusal::UnknownMethod),
        }
    }

    fn query(&self, method: &str, body: &str) -> Result<String, Refusal> {
        match method {
            "list" => silence::list(&json::read(body)?),
            _ => Err(Refusal::UnknownMethod),
        }
    }
}

impl Watchdog {
    fn heartbeat(&self, message: &Message) -> Result<(), Failure> {
        let heartbeat: Heartbeat = serde_json::from_slice(&message.data)
            .map_err(|error| Failure::Reject(format!("not a heartbeat: {error}")))?;
        let id = heartbeat.node_id;
        dim_guest::id::check("a node_id", &id, 256).map_err(Failure::Reject)?;
        self.speakers.check(&id, &message.origin)?;
        let known = NODES.get(&id)?;
        let now = Time::now();
        // Asked of the timers themselves: one whose firing failed is gone and must be set anew. A dead
        // node's is the one that forgets it.
        let is_back = known.as_ref().is_some_and(|node| node.standing == Standing::Dead);
        if is_back || timers::get(&id)?.is_none() {
            timers::set(&id, now.after(self.suspect_after()).timestamp())?;
        }
        if known.is_some_and(|node| node.standing != Standing::Alive) {
            self.say(&id, Standing::Recovered, now)?;
        }
        NODES.set(&id, &Node { last_seen: now, standing: Standing::Alive })?;
        silence::heard_someone(now)
    }

    /// A node's timer fired: judges its silence and arms the timer for when there is more to say. One
    /// that has been dead for long is forgotten.
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
        // While there is no room for a verdict, the node stands as it was said last, and is looked at again soon.
        let is_news = standing.is_worse_than(node.standing);
        let is_said = is_news && self.say_if_there_is_room(id, standing, node.last_seen)?;
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
            // While the host is deaf the silence does not grow: look again in a while.
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
        // When all fall silent in the same moment it is rather the host that is deaf: that takes
        // twice as long to believe.
        let doubted = silent < self.dead_after() * 2 && self.all_are_silent()?;
        if silent < self.dead_after() || doubted { Ok(Standing::Suspect) } else { Ok(Standing::Dead) }
    }

    /// Whether no node at all was heard for a while, of several that are not dead.
    fn all_are_silent(&self) -> Result<bool, Failure> {
        let silence = Time::now().since(silence::last_heard()?);
        Ok(silence >= self.suspect_after() && silence::living_at_least(self.config.mass_silence_min)?)
    }

    fn say_if_there_is_room(&self, id: &str, standing: Standing, last_seen: Time) -> Result<bool, Failure> {
        match self.say(id, standing, last_seen) {
            Ok(()) => Ok(true),
            Err(pubsub::Error::LimitExceeded(_)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn say(&self, node_id: &str, status: Standing, last_seen: Time) -> Result<(), pubsub::Error> {
        let verdict =
            Verdict { node_id, status, observer: &self.config.observer, timestamp: Time::now(), last_seen };
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
