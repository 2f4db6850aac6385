//! Owns the config file: the keys that an operator can set, and their defaults. It receives a path or a text and
//! returns a [`Config`] and findings. `tree` parses the YAML, `reader` deserializes it, and `findings` describes
//! errors and suspicious keys.

mod difference;
mod examined;
pub mod findings;
mod reader;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use dim_model::beginning::ReadFrom;
use dim_model::ident::{GroupName, InvalidWord, KeyName, PeerName, PluginName, Topic};
use dim_model::signer::Signer;
use dim_network::reliable_topics::{Deliveries, ReliableTopic};
use dim_store::commit::Durability;
use dim_store::event_log::TAIL_BYTES;
use dim_store::grants::{Grants, NameOrKey, TopicPattern};
use dim_store::plugin_limits::{LimitPolicy, SomeLimits};
use dim_store::probation::Rules;
use dim_store::retention::LogConfig;
use dim_store::retention::Undo;
use dim_store::{CACHE_BYTES, dead_letters};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::host::Adoption;
use crate::secret::{HeaderText, Secret};

pub use difference::{ConfigChange, changes};
pub use examined::Examined;

use findings::{Finding, Severity};

/// An error that prevents the use of a config.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the config file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// The file has errors.
    #[error("the config file {path} is wrong: {why}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// All errors, one on each line, with line and column.
        why: String,
    },
    /// An identifier in the file is invalid.
    #[error(transparent)]
    Word(#[from] InvalidWord),
}

/// The config file. The host ignores unknown sections, which belong to other programs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// The daemon, the names and the topics.
    pub ipfs: Ipfs,
    /// The settings of each plugin, by name. The bundled plugins run unless they are disabled.
    pub plugins: BTreeMap<PluginName, PluginConfig>,
    /// The settings of the store.
    pub store: StoreConfig,
    /// The settings of the outbox.
    pub outbox: OutboxConfig,
    /// A folder of components. The host installs a new file, replaces a plugin whose file changed, and unloads a
    /// plugin whose file is gone. The grants are in `plugins`. Absent: no folder.
    pub plugins_dir: Option<PathBuf>,
    /// The limits of plugins.
    pub limits: LimitPolicy,
    /// The settings for the replacement of plugins' code.
    pub replacement: ReplacementConfig,
    /// The settings of the HTTP API.
    pub api: ApiConfig,
    /// The fleet.
    pub fleet: FleetConfig,
    /// The settings of topics, by topic or by prefix, as in `jobs.*`.
    pub topics: BTreeMap<TopicPattern, TopicConfig>,
    /// The settings of the names of the host, by key.
    pub names: BTreeMap<KeyName, NameConfig>,
    /// The trusted signers, and the policy for other components.
    pub signing: SigningConfig,
    /// The export of log lines, in addition to standard error.
    pub telemetry: Telemetry,
    /// The suspicious parts of the file, for the operator.
    #[serde(skip)]
    notices: Vec<Finding>,
}

/// The section `replacement`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReplacementConfig {
    /// The rules of probation for new code.
    pub probation: Rules,
    /// Time for which a rollback stays possible, default 24 h; a bare number is in hours. During probation it is
    /// possible in any case.
    #[serde(alias = "undo_hours", with = "dim_model::time::in_hours")]
    pub undo_time: Duration,
    /// Bytes of rollback data of all plugins, default 256 MiB. Above it the oldest are dropped, except those of code
    /// on probation.
    pub undo_bytes: u64,
    /// `/ipfs/…` and `/ipns/…` paths whose components need no digest to be installed. A plugin that follows a name is
    /// replaced only if the name is in this list or its signer is trusted. Default: none.
    pub trusted: Vec<String>,
}

impl ReplacementConfig {
    /// Returns the limits on rollback data.
    pub fn undo(&self) -> Undo {
        Undo { time: self.undo_time, bytes: self.undo_bytes }
    }
}

impl Default for ReplacementConfig {
    fn default() -> Self {
        Self {
            probation: Rules::default(),
            undo_time: Duration::from_secs(24 * 3_600),
            undo_bytes: 256 << 20,
            trusted: Vec::new(),
        }
    }
}

/// The section `api`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ApiConfig {
    /// The token for callers over TCP, `{ env: NAME }` or `{ file: PATH }`. Absent: the host makes one and keeps it
    /// in `api-token` in the state directory.
    pub token: Option<Secret>,
    /// The maximum number of parallel connections, for the socket and for TCP each, default 512. Further connections
    /// wait.
    pub connections: usize,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self { token: None, connections: 512 }
    }
}

/// The section `fleet`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FleetConfig {
    /// The name of the fleet, default `dim`. Hosts share reliable topics with hosts of the same fleet. A host whose config
    /// states none can join a fleet with a roster while it runs.
    pub name: FleetName,
}

/// The name of a fleet in the config.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FleetName {
    name: String,
    is_stated: bool,
}

impl Default for FleetName {
    fn default() -> Self {
        Self { name: "dim".to_owned(), is_stated: false }
    }
}

impl FleetName {
    /// Whether the config states it. Otherwise the operator decides which fleet the host joins.
    pub fn is_stated(&self) -> bool {
        self.is_stated
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.name
    }
}

impl std::fmt::Display for FleetName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

impl Serialize for FleetName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.name)
    }
}

impl<'de> Deserialize<'de> for FleetName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self { name: String::deserialize(deserializer)?, is_stated: true })
    }
}

impl FleetConfig {
    /// Whether the fleet has a roster: its name is the IPNS name of the key of its first admin.
    pub fn has_roster(&self) -> bool {
        dim_network::reliable_topics::has_roster(self.name.as_str())
    }

    /// Whether the name has 1 to 64 letters, digits, points, hyphens and underscores.
    pub fn is_valid(&self) -> bool {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let name = self.name.as_str();
        (1..=64).contains(&name.len()) && name.chars().all(is_plain)
    }
}

/// The group of an encrypted topic or name whose config states none.
fn default_group() -> GroupName {
    "all".parse().expect("a valid name")
}

/// The section `topics.TOPIC`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TopicConfig {
    /// The peers whose messages on the topic are accepted; all others are refused. The daemon of this host is a peer
    /// like any other. Absent: every peer.
    #[serde(deserialize_with = "accepted", skip_serializing_if = "Option::is_none")]
    pub peers: Option<BTreeSet<PeerName>>,
    /// The delivery of messages on the topic. Absent: that of the closest wider pattern that states one, else plain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delivery: Option<Delivery>,
    /// The retention of the host's own events on a reliable topic, for members that are away or join late.
    #[serde(skip_serializing_if = "RetentionConfig::is_default")]
    pub retention: RetentionConfig,
    /// The event of a reliable topic with which the host begins when its first plugin or caller subscribes: `head`,
    /// `earliest`, a time, or a duration before now.
    #[serde(skip_serializing_if = "ReadFrom::is_head")]
    pub from: ReadFrom,
    /// Whether the daemon of this host keeps the events of the other hosts on a reliable topic, so that they can be read
    /// when the daemon of their host is gone.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub mirror: bool,
    /// Whether the events of a reliable topic are encrypted, in a fleet with a roster.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub encrypt: bool,
    /// The group of members that read and write an encrypted topic, default `all`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupName>,
}

/// The section `names.KEY`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NameConfig {
    /// Whether the documents that the host publishes under the name of the key are encrypted, in a fleet with a roster.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub encrypt: bool,
    /// The group of members that read encrypted documents, default `all`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupName>,
}

/// The section `topics.TOPIC.retention`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetentionConfig {
    /// The time for which events are kept, default 24 h; a bare number is in hours.
    #[serde(alias = "hours", with = "dim_model::time::in_hours")]
    pub time: Duration,
    /// The bytes of events of one topic that are kept, as they are compressed, default 256 MiB.
    pub bytes: u64,
}

impl Default for RetentionConfig {
    fn default() -> Self {
        Self { time: Duration::from_secs(24 * 3_600), bytes: 256 << 20 }
    }
}

impl RetentionConfig {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// The delivery of the messages of a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Delivery {
    /// Plain pubsub: messages can be lost. A gap reports times in which the host may have missed some.
    Plain,
    /// Each event of each host of the fleet is delivered once, in the order of its host.
    Reliable,
    /// Reliable between hosts, and plain for other programs: events are published as plain messages, too, and plain
    /// messages of other programs are delivered.
    Both,
}

/// The section `signing`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SigningConfig {
    /// The public keys of trusted signers, by name: PEM, or the base64 line of it.
    pub signers: BTreeMap<String, Signer>,
    /// The policy for components without a trusted signature.
    pub unsigned: Unsigned,
}

/// The policy for components without a trusted signature: one word for all, or one word each for components from the
/// network and from files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "UnsignedForm")]
pub struct Unsigned {
    /// The policy for components from URLs, `/ipfs/…` and `/ipns/…`. Default `ask`.
    pub network: Policy,
    /// The policy for components from files. Default `allow`.
    pub files: Policy,
}

/// The policy for a component.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// It runs.
    Allow,
    /// It runs if the operator vouches for its digest, or if the config names its source.
    Ask,
    /// It does not run.
    Refuse,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected one of allow, ask and refuse, or a section with `network` and `files`"
)]
enum UnsignedForm {
    Empty(()),
    All(Policy),
    Each(UnsignedEach),
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct UnsignedEach {
    network: Policy,
    files: Policy,
}

impl Default for UnsignedEach {
    fn default() -> Self {
        let Unsigned { network, files } = Unsigned::default();
        Self { network, files }
    }
}

impl From<UnsignedForm> for Unsigned {
    fn from(form: UnsignedForm) -> Self {
        match form {
            UnsignedForm::Empty(()) => Self::default(),
            UnsignedForm::All(policy) => Self { network: policy, files: policy },
            UnsignedForm::Each(UnsignedEach { network, files }) => Self { network, files },
        }
    }
}

impl Default for Unsigned {
    fn default() -> Self {
        Self { network: Policy::Ask, files: Policy::Allow }
    }
}

impl SigningConfig {
    /// Returns the policy for a component from `source`, signed by `signer` or unsigned.
    pub fn policy(&self, source: &str, signer: Option<&Signer>) -> Policy {
        if signer.is_some_and(|signer| self.name_of(signer).is_some()) {
            return Policy::Allow;
        }
        let is_remote = ["http://", "https://", "/ipfs/", "/ipns/"].iter().any(|it| source.starts_with(it));
        if is_remote { self.unsigned.network } else { self.unsigned.files }
    }

    /// Returns the name of a signer that the config trusts.
    pub fn name_of(&self, signer: &Signer) -> Option<&str> {
        self.signers.iter().find(|(_, trusted)| *trusted == signer).map(|(name, _)| name.as_str())
    }

    /// Returns the signer of a component as text for the operator.
    pub fn in_words(&self, signer: Option<&Signer>) -> String {
        match signer.map(|signer| (self.name_of(signer), signer)) {
            None => "nobody".to_owned(),
            Some((Some(name), _)) => name.to_owned(),
            Some((None, signer)) => format!("the key {signer}, which the config does not name"),
        }
    }
}

/// The section `telemetry`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Telemetry {
    /// The URL of an OpenTelemetry collector with OTLP over HTTP, as in `http://127.0.0.1:4318`. The host exports its
    /// log lines to it. Absent: no export. (Metrics are for Prometheus, at `/metrics`.)
    pub otlp_endpoint: Option<String>,
    /// The service name of the host in the export, default `dim`.
    pub service_name: String,
    /// Headers of each export, for example for authorisation.
    pub headers: BTreeMap<String, HeaderText>,
}

/// The section `ipfs`, in the form of existing fleets.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Ipfs {
    /// The RPC address of a Kubo daemon, a multiaddr or a URL. Absent: the embedded backend.
    pub api_url: Option<String>,
    /// The source of the header `Authorization`, which is `Bearer …` or `Basic …`. Absent: no such header.
    pub api_authorization: Option<Secret>,
    /// The key under which the node registry is published; jobs are published under KEY-jobs.
    pub ipns_key_name: String,
    /// The registry of another host, which is read and merged. Absent: none.
    pub registry_ipns: Option<String>,
    /// The names of other hosts' job trackers, whose jobs are merged. Absent: none.
    pub jobs_ipns: Vec<String>,
    /// The decision for a name on hold: a name under which this host has never published, or not since the backup
    /// that it was restored from, and that already points to something. `import` lets the plugins take over its
    /// content first, `replace` overwrites it. An adopted key without a visible record counts as a name whose record
    /// may come back. Absent: the host publishes nothing under the name until the operator decides with `dim ipns
    /// adopt`.
    pub adopt: Option<Adoption>,
    /// Time between two resolutions of a followed name, default 10 s, at least 1 s; a bare number is in seconds. A
    /// higher value causes less traffic and later notice of changes.
    #[serde(with = "dim_model::time::in_seconds")]
    pub follow_every: Duration,
    /// The topics.
    pub pubsub: Topics,
    /// Other keys of the section, which belong to other programs.
    #[serde(flatten, skip_serializing)]
    other: BTreeMap<String, IgnoredAny>,
}

/// The section `ipfs.pubsub`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Topics {
    /// Job events.
    pub job_updates: Topic,
    /// Heartbeats.
    pub node_heartbeat: Topic,
    /// Results.
    pub results_ready: Topic,
    /// Verdicts of watchdogs.
    pub node_status: Topic,
    /// Other keys of the section, which belong to other programs.
    #[serde(flatten, skip_serializing)]
    other: BTreeMap<String, IgnoredAny>,
}

/// The settings of one plugin.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PluginConfig {
    /// The component file. Absent: the bundled plugin of that name.
    pub file: Option<PathBuf>,
    /// Whether the plugin is disabled.
    pub disabled: bool,
    /// The values of its config keys; the manifest declares their names, types and defaults.
    pub config: Map<String, Value>,
    /// Its permissions. Absent: all that the manifest requests for a bundled plugin, nothing for others. Grants from
    /// the command line are added, and denials from the command line override them.
    #[serde(deserialize_with = "granted")]
    pub grants: Option<Grants>,
    /// Its limits, up to the ceiling. Absent: the default, or the request of the manifest if it is lower or was
    /// granted.
    pub limits: SomeLimits,
}

/// Deserializes the grants of the file; an empty section grants nothing.
fn granted<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Grants>, D::Error> {
    Grants::deserialize(deserializer).map(Some)
}

/// Deserializes the accepted peers of a topic; an empty section accepts nobody.
fn accepted<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<BTreeSet<PeerName>>, D::Error> {
    BTreeSet::deserialize(deserializer).map(Some)
}

/// The section `store`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// `immediate` (default): replies wait until the effects are on the disk. `eventual`: the host syncs the disk at
    /// intervals, and a crash of the machine can lose the latest effects.
    pub durability: Durability,
    /// The maximum size of the store, in bytes. From seven eighths of it the host drops handled entries and old
    /// documents. Above it the intake stops until there is space. Absent: no limit but the disk.
    pub max_bytes: Option<u64>,
    /// Bytes of the disk that must stay free, default 256 MiB. Below it the intake stops. Below a quarter of it
    /// plugins stop too, and only queries are answered.
    pub min_free_bytes: u64,
    /// Bytes of memory for the database's pages and the tail of the log, default 224 MiB, at least 1 MiB. A lower
    /// value slows down a host with much state or with plugins that lag.
    pub memory_bytes: usize,
    /// The retention of the event log.
    pub log: LogConfig,
    /// The maximum number of dead letters. Above it the oldest are dropped, and the host reports it.
    pub dead_letters: dead_letters::Quota,
}

/// The section `outbox`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OutboxConfig {
    /// Time after which a publish that no backend accepted expires, default one day, at least 1 s; a bare number is in
    /// seconds.
    #[serde(with = "dim_model::time::in_seconds")]
    pub expire_after: Duration,
}

impl Default for Ipfs {
    fn default() -> Self {
        Self {
            api_url: None,
            api_authorization: None,
            ipns_key_name: "dim-state-key".to_owned(),
            registry_ipns: None,
            jobs_ipns: Vec::new(),
            adopt: None,
            follow_every: Duration::from_secs(10),
            pubsub: Topics::default(),
            other: BTreeMap::new(),
        }
    }
}

impl Default for Topics {
    fn default() -> Self {
        let topic = |text: &str| text.parse().expect("a valid topic");
        Self {
            job_updates: topic("dim.jobs.updates"),
            node_heartbeat: topic("dim.nodes.heartbeat"),
            results_ready: topic("dim.results.ready"),
            node_status: topic("dim.nodes.status"),
            other: BTreeMap::new(),
        }
    }
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            durability: Durability::default(),
            max_bytes: None,
            min_free_bytes: 256 << 20,
            memory_bytes: CACHE_BYTES + TAIL_BYTES,
            log: LogConfig::default(),
            dead_letters: dead_letters::Quota::default(),
        }
    }
}

impl StoreConfig {
    /// Returns the bytes of memory for the database's pages and for the tail of the log, in the ratio of the
    /// defaults.
    pub fn memory(&self) -> (usize, usize) {
        let tail = self.memory_bytes / ((CACHE_BYTES + TAIL_BYTES) / TAIL_BYTES);
        (self.memory_bytes - tail, tail)
    }
}

impl Default for Telemetry {
    fn default() -> Self {
        Self { otlp_endpoint: None, service_name: "dim".to_owned(), headers: BTreeMap::new() }
    }
}

impl Default for OutboxConfig {
    fn default() -> Self {
        Self { expire_after: Duration::from_secs(86_400) }
    }
}

/// Reads the text of a config file.
pub fn read_text(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

/// Reads the text of a config file for a reload. It refuses anything but a regular file, because a pipe can be read
/// only once. It refuses an empty file, because its writer has not finished.
pub fn read_text_again(path: &Path) -> Result<String, ConfigError> {
    let refused = |why: &str| ConfigError::Read {
        path: path.to_owned(),
        source: std::io::Error::new(std::io::ErrorKind::InvalidInput, why),
    };
    if std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        return Err(refused("it is no regular file"));
    }
    let text = read_text(path)?;
    if text.trim().is_empty() { Err(refused("it is empty")) } else { Ok(text) }
}

impl Config {
    /// Reads a config file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = read_text(path)?;
        Self::parse(&text).map_err(|why| ConfigError::Parse { path: path.to_owned(), why })
    }

    /// Parses the text of a config file; the error lists all errors with their places.
    pub fn parse(text: &str) -> Result<Self, String> {
        let Examined { config, findings, .. } = Examined::of(text);
        let wrong: Vec<String> =
            findings.iter().filter(|it| it.severity == Severity::Error).map(Finding::to_string).collect();
        match config {
            Some(config) if wrong.is_empty() => Ok(Self { notices: findings, ..config }),
            _ => Err(wrong.join("\n")),
        }
    }

    /// Returns the findings that are no errors: suspicious keys, and keys of other programs.
    pub fn notices(&self) -> &[Finding] {
        &self.notices
    }

    /// Returns the registry to merge. An invalid name is logged and skipped: the host's own registry must stay
    /// available.
    fn registry(&self) -> Option<&str> {
        let name = self.ipfs.registry_ipns.as_deref().filter(|name| !name.trim().is_empty())?;
        to_merge(name, "ipfs.registry_ipns is left out, no registry is merged")
    }

    /// Returns the documents of jobs to merge. An invalid name is logged and skipped.
    fn jobs(&self) -> Vec<&str> {
        let left_out = "a name of ipfs.jobs_ipns is left out, its jobs are not merged";
        self.ipfs.jobs_ipns.iter().filter_map(|name| to_merge(name, left_out)).collect()
    }

    /// Returns the number of bytes of the log that are kept for a lagging plugin.
    pub fn queue_bytes(&self) -> u64 {
        self.limits.queue_bytes.min(self.store.max_bytes.map_or(u64::MAX, |most| most / 2))
    }

    /// The settings of the exchange with the network.
    pub fn network(&self) -> dim_network::Settings {
        let peers =
            self.topics.iter().filter_map(|(pattern, topic)| Some((pattern.clone(), topic.peers.clone()?)));
        let group_of = |(key, name): (&KeyName, &NameConfig)| {
            (key.clone(), name.group.clone().unwrap_or_else(default_group))
        };
        dim_network::Settings {
            accepted_peers: peers.collect(),
            follow_every: self.ipfs.follow_every.max(Duration::from_secs(1)),
            encrypted_names: self.names.iter().filter(|(_, name)| name.encrypt).map(group_of).collect(),
        }
    }

    /// Returns the delivery of the topics whose delivery is stated.
    pub fn deliveries(&self) -> Deliveries {
        let delivery = |topic: &TopicConfig| {
            let RetentionConfig { time, bytes } = topic.retention;
            let reliable = |is_plain_too| ReliableTopic {
                time,
                bytes,
                from: topic.from.clone(),
                is_plain_too,
                is_mirrored: topic.mirror,
                group: topic.encrypt.then(|| topic.group.clone().unwrap_or_else(default_group)),
            };
            topic.delivery.map(|delivery| match delivery {
                Delivery::Plain => None,
                Delivery::Reliable => Some(reliable(false)),
                Delivery::Both => Some(reliable(true)),
            })
        };
        let stated =
            self.topics.iter().filter_map(|(pattern, topic)| Some((pattern.clone(), delivery(topic)?)));
        stated.collect()
    }

    /// Returns the time after which a publish expires.
    pub fn outbox_expiry(&self) -> Duration {
        self.outbox.expire_after
    }

    /// Returns the config values of a bundled plugin: those from the section `ipfs`, overridden by the operator's.
    pub fn bundled_values(&self, plugin: &str, declared: impl Fn(&str) -> bool) -> Map<String, Value> {
        let topics = &self.ipfs.pubsub;
        let values = json!({
            "heartbeat_topic": topics.node_heartbeat,
            "status_topic": topics.node_status,
            "updates_topic": topics.job_updates,
            "results_topic": topics.results_ready,
            "ipns_key_name": self.ipfs.ipns_key_name,
            "jobs_ipns": if declared("jobs_ipns") { self.jobs() } else { Vec::new() },
            "registry_ipns": declared("registry_ipns").then(|| self.registry()).flatten(),
        });
        let Value::Object(values) = values else { unreachable!("an object was written") };
        let mut set: Map<String, Value> = values.into_iter().filter(|(key, _)| declared(key)).collect();
        let own =
            self.plugins.iter().find(|(name, _)| name.as_str() == plugin).map(|(_, own)| own.config.clone());
        set.extend(own.unwrap_or_default());
        set
    }
}

/// Returns a name whose document is merged; logs `left_out` if the name is invalid.
fn to_merge<'a>(name: &'a str, left_out: &str) -> Option<&'a str> {
    let name = name.trim();
    match name.parse::<NameOrKey>() {
        Ok(_) => Some(name),
        Err(error) => {
            tracing::warn!("{left_out}: {error}");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_config_of_an_existing_fleet_works_as_it_stands() {
        let config = Config::parse(
            "ipfs:
  api_url: /ip4/127.0.0.1/tcp/5001
  ipns_key_name: dim-state-key
  registry_ipns: /ipns/QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG  # optional
  pubsub:
    job_updates: dim.jobs.updates
    node_heartbeat: dim.nodes.heartbeat
    results_ready: dim.results.ready
orchestrator:
  grpc_address: localhost:50051
",
        )
        .unwrap();
        assert_eq!(config.ipfs.api_url.as_deref(), Some("/ip4/127.0.0.1/tcp/5001"));
        assert_eq!(config.ipfs.pubsub.node_status.as_str(), "dim.nodes.status");
    }

    #[test]
    fn a_wrong_config_says_where() {
        let why = Config::parse("ipfs:\n  pubsub:\n    job_updates: [1, 2]\n").unwrap_err();
        assert!(why.contains('3'), "{why}");
        assert!(Config::parse("ipfs:\n  ipns_key_name: ../../etc\n").is_err());
        assert!(Config::parse("plugins:\n  job-tracker:\n    typo: 1\n").unwrap_err().contains("typo"));
    }

    #[test]
    fn what_nobody_who_is_trusted_has_signed_is_judged_by_where_it_comes_from() {
        let policies = |text: &str| {
            let signing = Config::parse(text).unwrap().signing;
            let of = |source| signing.policy(source, None);
            (of("https://example.com/p.wasm"), of("/ipns/x"), of("./ipfs/p.wasm"))
        };
        assert_eq!(policies(""), (Policy::Ask, Policy::Ask, Policy::Allow));
        assert_eq!(
            policies("signing: { unsigned: refuse }"),
            (Policy::Refuse, Policy::Refuse, Policy::Refuse)
        );
        assert_eq!(
            policies("signing: { unsigned: { network: allow } }"),
            (Policy::Allow, Policy::Allow, Policy::Allow)
        );
        let known = "MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=";
        let config = Config::parse(&format!(
            "signing:\n  unsigned: refuse\n  signers:\n    acme: {known}\n    other: |\n      -----BEGIN PUBLIC KEY-----\n      MCowBQYDK2VwAyEAh6gBdM3TK8YfNgFKx5zmWMmIEO+CyrLEWaiT3A/BGe8=\n      -----END PUBLIC KEY-----\n"
        ));
        let signing = config.unwrap().signing;
        let signer = known.parse().unwrap();
        assert_eq!(signing.policy("/ipfs/x", Some(&signer)), Policy::Allow);
        assert_eq!(signing.in_words(Some(&signer)), "acme");
        assert_eq!(signing.signers.len(), 2);
        assert!(
            Config::parse("signing: { signers: { acme: nonsense } }").unwrap_err().contains("no Ed25519 key")
        );
        assert!(Config::parse("signing: { unsigned: maybe }").is_err());
    }

    #[test]
    fn a_registry_that_is_no_name_is_left_out() {
        for name in ["", "/ipns/Qm...", "../x"] {
            let config = Config::parse(&format!("ipfs:\n  registry_ipns: {name:?}\n")).unwrap();
            let values = config.bundled_values("node-registry", |_| true);
            assert_eq!(values["registry_ipns"], Value::Null, "{name}");
        }
    }

    #[test]
    fn an_empty_config_is_the_default() {
        assert!(Config::parse("").unwrap().ipfs.api_url.is_none());
    }
}
