//! Owns the wiring of a plugin. It receives the stored state of a plugin and its code, sets up the entry context as
//! of the cursor, and returns the actor that runs the plugin.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use dim_ipfs::Backend;
use dim_model::beginning::Beginning;
use dim_model::entry::{Generation, Kind, Offset};
use dim_model::error_chain::listed;
use dim_model::ident::{IpnsName, KeyName, PluginName, Topic};
use dim_model::live::Live;
use dim_network::encrypted_documents::DocumentCipher;
use dim_network::name_follower::Unresolved;
use dim_network::name_publisher::{CheckedNames, Failures};
use dim_network::reliable_topics::Reliable;
use dim_network::subscription::ListeningRecords;
use dim_runtime::{Actor, Engine, Fallback, Lines, Numbers, Parts, ProbationParts, Runnable, SessionParts};
use dim_store::catch_ups::KeptTopics;
use dim_store::checkpoint;
use dim_store::entry_context::EntryContext;
use dim_store::grants::{NameOrKey, Reach};
use dim_store::interest::{Interest, Subscriber};
use dim_store::outbox::Backlog;
use dim_store::plugin_registry::{self, Stored};
use dim_store::probation::Probation;
use dim_store::{PluginId, StoreError, names};
use tokio_util::sync::CancellationToken;

use super::candidate::Ready;
use super::{HostError, Loaded, Storage};
use crate::config::Config;

/// The maximum time to wait for the daemon's list of keys before the host creates new ones.
const KEYS_TIMEOUT: Duration = Duration::from_secs(5);

/// The parts of a host that a plugin is wired to.
#[derive(Debug)]
pub struct Loader {
    /// The config.
    pub config: Live<Config>,
    /// The settings of the exchange with the network, from the same config.
    pub network: Live<dim_network::Settings>,
    /// The identity of the host.
    pub identity: HostIdentity,
    /// The durable state of the host.
    pub storage: Storage,
    /// The connections of the host to the network.
    pub links: Links,
    /// The engine, which compiles components.
    pub engine: Arc<Engine>,
    /// The log lines of plugins.
    pub lines: Lines,
    /// The offset at which the intake of this host began.
    pub from: Offset,
    /// The subscriptions of new plugins. They are in the log from the first entry of this host, so that a plugin with
    /// a slow compilation misses nothing that the host acknowledged.
    pub announced: Mutex<BTreeSet<(PluginName, Topic)>>,
    /// Messages for the operator about keys whose files are gone.
    pub lost: Mutex<Vec<String>>,
}

/// The identity of a host, and the randomness that derives from it.
#[derive(Debug)]
pub struct HostIdentity {
    /// The host's identity.
    pub id: String,
    /// The seed of the random numbers of plugins.
    pub secret: [u8; 32],
    /// The numbers that random follows instead of the entries' offsets, for the comparison of two versions. Absent:
    /// the offsets.
    pub numbers: Option<Numbers>,
}

/// The connections of a host to the network, as its plugins use them.
#[derive(Clone, Debug)]
pub struct Links {
    /// The backend.
    pub backend: Backend,
    /// The topics and names that plugins need from the network.
    pub interest: Arc<Interest>,
    /// The number of waiting publishes of each plugin.
    pub backlog: Arc<Backlog>,
    /// The listening records of the topics.
    pub listening_records: Arc<ListeningRecords>,
    /// The reliable topics.
    pub reliable: Reliable,
    /// The topics whose writers keep their events.
    pub kept_topics: KeptTopics,
    /// The encryption of documents.
    pub cipher: DocumentCipher,
    /// The followed names that cannot be resolved.
    pub unresolved: Arc<Unresolved>,
    /// The reasons why names could not be published.
    pub failures: Arc<Failures>,
    /// The names whose published record the daemon was asked for.
    pub checked_names: Arc<CheckedNames>,
}

impl Links {
    /// Makes the links of a host that exchanges nothing with a network, as in trials of plugins.
    pub fn offline(
        backend: Backend,
        interest: Arc<Interest>,
        backlog: Arc<Backlog>,
        settings: Live<dim_network::Settings>,
    ) -> Self {
        let reliable = Reliable::default();
        Self {
            backend,
            interest,
            backlog,
            listening_records: Arc::default(),
            cipher: DocumentCipher { reliable: reliable.clone(), settings },
            reliable,
            kept_topics: KeptTopics::All,
            unresolved: Arc::default(),
            failures: Arc::default(),
            checked_names: Arc::default(),
        }
    }
}

/// The code that a plugin runs at the start.
pub struct ToRun {
    /// The code to run.
    pub ready: Ready,
    /// The code to run if probation of `ready` fails, if it is on probation.
    pub fallback: Option<Ready>,
    /// The reason why the code on probation has failed already.
    pub failed: Option<String>,
}

/// A plugin that is wired and does not run yet.
#[derive(Debug)]
pub struct Wired {
    /// The actor of the plugin.
    pub actor: Actor,
    /// The plugin as the rest of the host uses it.
    pub loaded: Loaded,
}

impl Loader {
    /// Restores the interest of known plugins in topics and names before any plugin is wired, so that messages reach
    /// them from the start. It also keeps the interest of the code before a probation.
    pub fn restore_interest<'a>(
        &self,
        names: impl IntoIterator<Item = &'a PluginName>,
    ) -> Result<(), StoreError> {
        for name in names {
            let Some(stored) = plugin_registry::read(&self.storage.store, name)? else { continue };
            self.links.interest.restore(name, &stored.context);
            self.restore_hearings(&stored.context);
            let snapshot = self.storage.store.snapshot()?;
            if let Some((place, _)) = checkpoint::of_probation(&snapshot, stored.row.id)?
                && let Some(context) = checkpoint::context(&snapshot, place)?
            {
                self.links.interest.keep(name, &context);
            }
        }
        Ok(())
    }

    /// Wires a plugin that is in the plugin registry. May block.
    pub fn wire(&self, name: &PluginName, stored: Stored, to_run: ToRun) -> Result<Wired, HostError> {
        let ToRun { ready, fallback, failed } = to_run;
        let missing = ready.allowance.missing();
        if !missing.is_empty() {
            let missing = listed(&missing);
            tracing::warn!(plugin = %name, "requests permissions that are not granted, so each use is refused: to {missing}");
        }
        let run = ready.into_runnable();
        let reach = run.reach.clone();
        let Stored { row, mut context, effects, .. } = stored;
        self.take_back(name, &reach, &mut context);
        // The time without the plugin is a gap.
        self.restore_hearings(&context);
        context.add_own_names(&self.storage.store.snapshot()?, self.storage.keys.names_of(reach.writes()))?;
        self.links.interest.restore(name, &context);
        self.subscribe_to_new(name, &run, &context);
        let (probation, fallback) = self.fallback(row.id, fallback)?;
        let session = SessionParts {
            plugin: name.clone(),
            id: row.id,
            reach,
            limits: run.limits,
            context,
            effects,
            store: self.storage.store.clone(),
            files: self.storage.store.clone(),
            keys: self.storage.keys.clone(),
            outbox_len: self.links.backlog.length(Some(name)),
            kept_topics: self.links.kept_topics.clone(),
            listeners: self.lines.clone(),
        };
        let parts = Parts {
            run,
            probation: ProbationParts {
                state: probation,
                fallback,
                rules: self.config.now().replacement.probation,
                failed,
                rates: row.rates,
            },
            is_paused: row.standing == plugin_registry::Standing::Paused,
            quarantine: row.quarantine,
            state_version: row.state_version,
            session,
            secret: self.identity.secret,
            numbers: self.identity.numbers.clone(),
            log: self.storage.log.clone(),
            commit: self.storage.commit.clone(),
            disk: self.storage.disk.clone(),
        };
        let (actor, handle) = Actor::new(parts)?;
        let loaded = Loaded { handle, stop: CancellationToken::new() };
        Ok(Wired { actor, loaded })
    }

    /// Restores the listening records of a plugin's topics.
    pub fn restore_hearings(&self, context: &EntryContext) {
        for (topic, until) in context.last_heard() {
            self.links.listening_records.restore(topic, until, !context.peers(topic).is_empty());
        }
    }

    /// Returns the state of a probation that began under an earlier host, and the code to run if it fails.
    fn fallback(
        &self,
        id: PluginId,
        fallback: Option<Ready>,
    ) -> Result<(Option<Probation>, Option<Fallback>), StoreError> {
        let Some((place, checkpoint)) = checkpoint::of_probation(&self.storage.store.snapshot()?, id)? else {
            return Ok((None, None));
        };
        let fallback = fallback.map(|ready| Fallback { run: Arc::new(ready.into_runnable()), to: place.1 });
        Ok((checkpoint.probation, fallback))
    }

    /// Ends subscriptions and followed names that the plugin is not granted any more.
    fn take_back(&self, name: &PluginName, reach: &Reach, context: &mut EntryContext) {
        let names = reach.reads().filter_map(|either| match either {
            NameOrKey::Name(name) => Some(name.clone()),
            NameOrKey::Key(key) => self.storage.keys.name(key),
        });
        let names: BTreeSet<IpnsName> = names.collect();
        for gone in
            context.follows().keys().filter(|name| !names.contains(*name)).cloned().collect::<Vec<_>>()
        {
            context.unfollow(&gone);
        }
        let revoked = |topic: &&Topic| !reach.may_subscribe(topic);
        for topic in context.subscriptions().iter().filter(revoked).cloned().collect::<Vec<_>>() {
            context.revoke(&topic);
            self.end_subscription(name, &topic);
        }
    }

    /// Subscribes to topics that are new in the manifest. The plugin may have unsubscribed from known topics.
    fn subscribe_to_new(&self, name: &PluginName, run: &Runnable, context: &EntryContext) {
        for topic in run.topics.iter().filter(|topic| context.is_new(topic)) {
            self.links.interest.want_topic(topic, Subscriber::Plugin(name.clone()), true);
            // The announcement is in the log already, and the plugin may end it there: a second one would begin it
            // again.
            if self.announced().remove(&(name.clone(), topic.clone())) {
                continue;
            }
            self.begin_subscription(name, topic, run.beginning(topic, self.storage.log.now()));
        }
    }

    fn end_subscription(&self, name: &PluginName, topic: &Topic) {
        self.append_subscription(name, topic, None);
    }

    fn begin_subscription(&self, name: &PluginName, topic: &Topic, beginning: Beginning) {
        self.append_subscription(name, topic, Some(self.links.kept_topics.beginning(topic, beginning)));
    }

    /// Appends the entry of a subscription with its beginning, or of its end.
    fn append_subscription(&self, name: &PluginName, topic: &Topic, beginning: Option<Beginning>) {
        let (plugin, topic, by) = (name.clone(), topic.clone(), Generation(0));
        let (subscribed, beginning) = (beginning.is_some(), beginning.unwrap_or_default());
        let entry = Kind::Subscription { plugin, topic, subscribed, beginning, own_too: subscribed, by };
        self.storage.log.append_now([entry]);
    }

    /// Subscribes a new plugin before the intake begins and long before the plugin runs.
    pub fn announce(&self, name: &PluginName, topics: Vec<(Topic, Beginning)>) {
        for (topic, beginning) in topics {
            self.links.interest.want_topic(&topic, Subscriber::Plugin(name.clone()), true);
            self.announced().insert((name.clone(), topic.clone()));
            // The plugin never reads the announcement of a start that was killed.
            self.end_subscription(name, &topic);
            self.begin_subscription(name, &topic, beginning);
        }
    }

    /// Removes the announcement of a plugin that is not loaded.
    pub fn withdraw(&self, name: &PluginName) {
        let withdrawn: Vec<_> = self.announced().extract_if(.., |(plugin, _)| plugin == name).collect();
        if !withdrawn.is_empty() {
            self.links.interest.forget(&Subscriber::Plugin(name.clone()));
        }
        for (_, topic) in withdrawn {
            self.end_subscription(name, &topic);
        }
    }

    /// Removes the announcements of plugins that do not run.
    pub fn withdraw_all(&self, runs: impl Fn(&PluginName) -> bool) {
        let names: BTreeSet<PluginName> = self.announced().iter().map(|(plugin, _)| plugin.clone()).collect();
        for name in names.iter().filter(|name| !runs(name)) {
            self.withdraw(name);
        }
    }

    /// Returns whether announced subscriptions of a plugin are not taken over yet.
    pub fn is_announced(&self, name: &PluginName) -> bool {
        self.announced().iter().any(|(plugin, _)| plugin == name)
    }

    fn announced(&self) -> MutexGuard<'_, BTreeSet<(PluginName, Topic)>> {
        self.announced.lock().expect("no one panics while holding what is announced")
    }

    /// Makes the granted keys that the host does not have, or adopts the daemon's keys with these names.
    pub async fn make_keys(&self, reach: &Reach) -> Result<(), HostError> {
        let missing: BTreeSet<KeyName> =
            reach.keys().filter(|key| self.storage.keys.get(key).is_none()).cloned().collect();
        if missing.is_empty() {
            return Ok(());
        }
        let existing = daemon_keys(self.links.backend.clone()).await;
        for key in &missing {
            if names::known(&self.storage.store.snapshot()?, key)?
                .is_some_and(|known| known.published.is_some())
            {
                let lost = format!(
                    "the file of key {key} is gone, so its name is another one now: stop the host and restore keys/{key} from a backup"
                );
                tracing::error!("{lost}");
                self.lost.lock().expect("no one panics while holding what is lost").push(lost);
            }
            match existing.iter().find(|(there, _)| there == key) {
                Some((_, name)) => {
                    tracing::info!(%key, %name, "adopted the key that the daemon has under this name");
                    self.storage.keys.adopt(key, name)?;
                }
                None => {
                    self.storage.keys.get_or_create(key)?;
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
            tracing::warn!("creating new keys without the list of the daemon's keys: {error}");
            Vec::new()
        }
        Err(_) => {
            tracing::warn!("creating new keys without the list of the daemon's keys: it does not answer");
            Vec::new()
        }
    }
}
