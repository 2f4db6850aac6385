//! Owns the wiring of a plugin: puts it into the world as of its cursor and makes the actor that runs it, at
//! the start of a host or while it runs.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::candidate::Ready;
use super::{HostError, Loaded};
use crate::backend::Backend;
use crate::cause::listed;
use crate::commit::Commit;
use crate::config::Live;
use crate::entry::{Generation, Kind, Offset};
use crate::followed::Unresolved;
use crate::ident::{IpnsName, KeyName, PluginName, Topic};
use crate::interest::{Interest, Party};
use crate::keys::Keyring;
use crate::log::EventLog;
use crate::names::{Failures, Looks};
use crate::plugin::mark;
use crate::plugin::roster::{self, Stored};
use crate::plugin::{
    Actor, Engine, Fallback, Lines, NameOrKey, Numbers, Parts, Probation, Reach, SessionParts, World,
};
use crate::room::Room;
use crate::store::outbox::Backlog;
use crate::store::{PluginId, Store, StoreError, names};
use crate::subscription::Hearings;

/// How long the daemon may take to say which keys it has, when the host makes new ones.
const KEYS_TIMEOUT: Duration = Duration::from_secs(5);

/// What a plugin is wired to.
#[derive(Debug)]
pub struct Loader {
    /// The config.
    pub config: Live,
    /// The host's identity.
    pub id: String,
    /// What random follows from.
    pub secret: [u8; 32],
    /// What random goes by in place of the entries' offsets, if it does.
    pub numbers: Option<Numbers>,
    /// The store.
    pub store: Arc<Store>,
    /// The keys.
    pub keys: Arc<Keyring>,
    /// What stands behind the host.
    pub backend: Backend,
    /// What is wanted from outside.
    pub interest: Arc<Interest>,
    /// How many publishes wait.
    pub backlog: Arc<Backlog>,
    /// What is listened to.
    pub hearings: Arc<Hearings>,
    /// The names of others that cannot be resolved.
    pub unresolved: Arc<Unresolved>,
    /// Why names could not be published.
    pub failures: Arc<Failures>,
    /// Which names the daemon was asked about.
    pub looks: Arc<Looks>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// The log.
    pub log: Arc<EventLog>,
    /// Whether there is room for more.
    pub room: Arc<Room>,
    /// What compiles components.
    pub engine: Arc<Engine>,
    /// Where the lines of the plugins' logs go by.
    pub lines: Lines,
    /// The offset from which on this host takes in what comes.
    pub from: Offset,
    /// The subscriptions of plugins that were never here: in the log from its first entry on, so that a plugin that
    /// takes long to be compiled misses nothing that the host has acknowledged.
    pub announced: Mutex<BTreeSet<(PluginName, Topic)>>,
    /// What was there once and is gone, for the operator.
    pub lost: Mutex<Vec<String>>,
}

/// What a plugin goes on with.
pub struct ToRun {
    /// What runs.
    pub ready: Ready,
    /// What runs again if that fails on probation, if it is on one.
    pub fallback: Option<Ready>,
    /// Why it has failed there already.
    pub failed: Option<String>,
}

/// A plugin that is wired and does not run yet.
#[derive(Debug)]
pub struct Wired {
    /// What runs it.
    pub actor: Actor,
    /// How it is known to the rest of the host.
    pub loaded: Loaded,
}

impl Loader {
    /// Wants from outside what the plugins wanted that have been here before, and keeps what those on probation
    /// may want again, before any of them is wired: what comes meanwhile is for them.
    pub fn restore_interest<'a>(
        &self,
        names: impl IntoIterator<Item = &'a PluginName>,
    ) -> Result<(), StoreError> {
        for name in names {
            let Some(stored) = roster::read(&self.store, name)? else { continue };
            self.interest.restore(name, &stored.world);
            self.restore_hearings(&stored.world);
            let snapshot = self.store.snapshot()?;
            if let Some((place, _)) = mark::of_probation(&snapshot, stored.row.id)?
                && let Some(world) = mark::world(&snapshot, place)?
            {
                self.interest.keep(name, &world);
            }
        }
        Ok(())
    }

    /// Wires a plugin that was entered into the roster, and makes the keys that it is granted. May block.
    pub fn wire(&self, name: &PluginName, stored: Stored, to_run: ToRun) -> Result<Wired, HostError> {
        let ToRun { ready, fallback, failed } = to_run;
        let missing = ready.allowance.missing();
        if !missing.is_empty() {
            let missing = listed(&missing);
            tracing::warn!(plugin = %name, "is refused what it asks for and is not granted, when it uses it: to {missing}");
        }
        let run = ready.into_runnable();
        let reach = run.reach.clone();
        let Stored { row, mut world, effects, .. } = stored;
        self.take_back(name, &reach, &mut world);
        // What it did not hear while it was away is a gap.
        self.restore_hearings(&world);
        world.add_own_names(&self.store.snapshot()?, self.keys.names_of(reach.writes()))?;
        self.interest.restore(name, &world);
        self.subscribe_to_new(name, &run.topics, &world);
        let (probation, fallback) = self.fallback(row.id, fallback)?;
        let session = SessionParts {
            plugin: name.clone(),
            id: row.id,
            reach,
            limits: run.limits,
            world,
            effects,
            store: self.store.clone(),
            files: self.store.clone(),
            keys: self.keys.clone(),
            outbox_len: self.backlog.length(Some(name)),
            listeners: self.lines.clone(),
        };
        let parts = Parts {
            run,
            probation,
            fallback,
            rules: self.config.now().replacement.probation,
            failed,
            is_paused: row.standing == roster::Standing::Paused,
            quarantine: row.quarantine,
            rates: row.rates,
            state_version: row.state_version,
            session,
            secret: self.secret,
            numbers: self.numbers.clone(),
            log: self.log.clone(),
            commit: self.commit.clone(),
            room: self.room.clone(),
        };
        let (actor, handle) = Actor::new(parts)?;
        let loaded = Loaded { handle, stop: CancellationToken::new() };
        Ok(Wired { actor, loaded })
    }

    /// Takes in until when listening was proven on the topics of a plugin.
    pub fn restore_hearings(&self, world: &World) {
        for (topic, until) in world.last_heard() {
            self.hearings.restore(topic, until, !world.peers(topic).is_empty());
        }
    }

    /// How a plugin's probation stands that the host before this one did not end, and what runs if it fails.
    fn fallback(
        &self,
        id: PluginId,
        fallback: Option<Ready>,
    ) -> Result<(Option<Probation>, Option<Fallback>), StoreError> {
        let Some((place, mark)) = mark::of_probation(&self.store.snapshot()?, id)? else {
            return Ok((None, None));
        };
        let fallback = fallback.map(|ready| Fallback { run: Arc::new(ready.into_runnable()), to: place.1 });
        Ok((mark.probation, fallback))
    }

    /// Ends what the plugin had and is not granted any more.
    fn take_back(&self, name: &PluginName, reach: &Reach, world: &mut World) {
        let names = reach.reads().filter_map(|either| match either {
            NameOrKey::Name(name) => Some(name.clone()),
            NameOrKey::Key(key) => self.keys.name(key),
        });
        let names: BTreeSet<IpnsName> = names.collect();
        for gone in world.follows().keys().filter(|name| !names.contains(*name)).cloned().collect::<Vec<_>>()
        {
            world.unfollow(&gone);
        }
        let revoked = |topic: &&Topic| !reach.may_subscribe(topic);
        for topic in world.subscriptions().iter().filter(revoked).cloned().collect::<Vec<_>>() {
            world.revoke(&topic);
            let (plugin, by) = (name.clone(), Generation(0));
            self.log.append_now([Kind::Subscription { plugin, topic, subscribed: false, by }]);
        }
    }

    /// Subscribes to the topics of the manifest that are new, from the head of the log. From others
    /// the plugin may have unsubscribed.
    fn subscribe_to_new(&self, name: &PluginName, topics: &[Topic], world: &World) {
        for topic in topics.iter().filter(|topic| world.is_new(topic)) {
            self.interest.want_topic(topic, Party::Plugin(name.clone()), true);
            // The plugin reads what was announced, and may end it: it must not begin again.
            if self.announced().remove(&(name.clone(), topic.clone())) {
                continue;
            }
            let (plugin, topic, by) = (name.clone(), topic.clone(), Generation(0));
            self.log.append_now([Kind::Subscription { plugin, topic, subscribed: true, by }]);
        }
    }

    /// Subscribes a plugin that was never here, before anything is taken in and long before it runs.
    pub fn announce(&self, name: &PluginName, topics: Vec<Topic>) {
        for topic in topics {
            self.interest.want_topic(&topic, Party::Plugin(name.clone()), true);
            self.announced().insert((name.clone(), topic.clone()));
            let (plugin, by) = (name.clone(), Generation(0));
            self.log.append_now([Kind::Subscription { plugin, topic, subscribed: true, by }]);
        }
    }

    /// Forgets what was announced of a plugin that is not loaded after all.
    pub fn withdraw(&self, name: &PluginName) {
        let mut announced = self.announced();
        let before = announced.len();
        announced.retain(|(plugin, _)| plugin != name);
        if announced.len() < before {
            self.interest.forget(&Party::Plugin(name.clone()));
        }
    }

    /// Forgets what was announced of plugins that do not run.
    pub fn withdraw_all(&self, runs: impl Fn(&PluginName) -> bool) {
        let names: BTreeSet<PluginName> = self.announced().iter().map(|(plugin, _)| plugin.clone()).collect();
        for name in names.iter().filter(|name| !runs(name)) {
            self.withdraw(name);
        }
    }

    /// Whether subscriptions of a plugin were announced that it has not taken over yet.
    pub fn is_announced(&self, name: &PluginName) -> bool {
        self.announced().iter().any(|(plugin, _)| plugin == name)
    }

    fn announced(&self) -> MutexGuard<'_, BTreeSet<(PluginName, Topic)>> {
        self.announced.lock().expect("no one panics while holding what is announced")
    }

    /// Makes the keys that a plugin is granted and the host has not, or adopts those that the daemon has under
    /// these names.
    pub async fn make_keys(&self, reach: &Reach) -> Result<(), HostError> {
        let missing: BTreeSet<KeyName> =
            reach.keys().filter(|key| self.keys.get(key).is_none()).cloned().collect();
        if missing.is_empty() {
            return Ok(());
        }
        let existing = daemon_keys(self.backend.clone()).await;
        for key in &missing {
            if names::known(&self.store.snapshot()?, key)?.is_some_and(|known| known.published.is_some()) {
                let lost = format!(
                    "the file of key {key} is gone, so its name is another one now: stop the host and restore keys/{key} from a backup"
                );
                tracing::error!("{lost}");
                self.lost.lock().expect("no one panics while holding what is lost").push(lost);
            }
            match existing.iter().find(|(there, _)| there == key) {
                Some((_, name)) => {
                    tracing::info!(%key, %name, "adopted the key that the daemon has under this name");
                    self.keys.adopt(key, name)?;
                }
                None => {
                    self.keys.get_or_create(key)?;
                }
            }
        }
        Ok(())
    }
}

async fn daemon_keys(backend: Backend) -> Vec<(KeyName, IpnsName)> {
    match tokio::time::timeout(KEYS_TIMEOUT, backend.names.keys()).await {
        Ok(Ok(keys)) => keys,
        Ok(Err(error)) => {
            tracing::warn!("making new keys without knowing those of the daemon: {error}");
            Vec::new()
        }
        Err(_) => {
            tracing::warn!("making new keys without knowing those of the daemon: it does not answer");
            Vec::new()
        }
    }
}
