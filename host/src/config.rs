//! Owns the config file: what the operator may write, with its defaults. `tree` reads the YAML, `reader` makes the
//! config of it, and `findings` tells what is wrong or suspicious.

mod difference;
mod examined;
pub mod findings;
mod live;
mod reader;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::commit::Durability;
use crate::host::Adoption;
use crate::ident::{InvalidWord, PeerName, PluginName, Topic};
use crate::log::TAIL_BYTES;
use crate::plugin::{Grants, LimitPolicy, NameOrKey, Rules, SomeLimits, TopicPattern};
use crate::retention::Undo;
use crate::secret::{HeaderText, Secret};
use crate::signing::Signer;
use crate::store::{CACHE_BYTES, dead};

pub use difference::{Change, changes};
pub use examined::Examined;
pub use live::Live;

use findings::{Finding, Severity};

/// Why a config cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the config file {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not what a config is.
    #[error("the config file {path} is wrong: {why}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// All that is wrong with it, a line each, with line and column.
        why: String,
    },
    /// A word in it is none.
    #[error(transparent)]
    Word(#[from] InvalidWord),
}

/// The config file. Sections that it does not know belong to other programs and are left alone.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// The daemon, the names and the topics.
    pub ipfs: Ipfs,
    /// How plugins are set up, by name; the bundled ones run unless they are disabled.
    pub plugins: BTreeMap<PluginName, PluginConfig>,
    /// How the store works.
    pub store: StoreConfig,
    /// What is published.
    pub outbox: OutboxConfig,
    /// A folder whose components are plugins: a file that appears is installed, one that changes replaces, one
    /// that goes is unloaded. What they may stands under `plugins`. Absent: none.
    pub plugins_dir: Option<PathBuf>,
    /// What a plugin may take.
    pub limits: LimitPolicy,
    /// How plugins' code is replaced while the host runs.
    pub replacement: ReplacementConfig,
    /// The host's API.
    pub api: ApiConfig,
    /// Who may speak on a topic, or on all below a prefix, as in `jobs.*`. On any other everyone may.
    pub topics: BTreeMap<TopicPattern, TopicConfig>,
    /// Whose components run here.
    pub signing: SigningConfig,
    /// Where the log goes beside standard error.
    pub telemetry: Telemetry,
    /// What is suspicious about the file, for the operator.
    #[serde(skip)]
    notices: Vec<Finding>,
}

/// The section `replacement`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReplacementConfig {
    /// How new code is watched.
    pub probation: Rules,
    /// Hours for which there is a way back to what ran before, default 24. While new code is on probation
    /// there is one in any case.
    pub undo_hours: u64,
    /// Bytes of what plugins had before, default 256 MiB. Beyond it the oldest ways back are given up, but not
    /// those of code on probation.
    pub undo_bytes: u64,
    /// `/ipfs/…` and `/ipns/…` whose components are installed without a digest being given; a plugin
    /// that follows a name is replaced only if the name is one of these. Default none.
    pub trusted: Vec<String>,
}

impl ReplacementConfig {
    /// For how long there is a way back.
    pub fn undo(&self) -> Undo {
        Undo { time: Duration::from_secs(self.undo_hours.saturating_mul(3600)), bytes: self.undo_bytes }
    }
}

impl Default for ReplacementConfig {
    fn default() -> Self {
        Self { probation: Rules::default(), undo_hours: 24, undo_bytes: 256 << 20, trusted: Vec::new() }
    }
}

/// The section `api`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ApiConfig {
    /// The token for callers over TCP, `{ env: NAME }` or `{ file: PATH }`. Absent: one that is made and lies in the
    /// state directory, in `api-token`.
    pub token: Option<Secret>,
    /// How many connections there may be at a time, on the socket and over TCP each, default 512; one more waits.
    pub connections: usize,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self { token: None, connections: 512 }
    }
}

/// The section `topics.TOPIC`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TopicConfig {
    /// The peers that may speak on it; what others say is refused. This host's own daemon is a peer like any other.
    pub peers: BTreeSet<PeerName>,
}

/// The section `signing`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SigningConfig {
    /// The public keys of those who are trusted, each under a name: PEM, or its line of base64.
    pub signers: BTreeMap<String, Signer>,
    /// What becomes of components that none of them has signed.
    pub unsigned: Unsigned,
}

/// What becomes of components that nobody who is trusted has signed: one word for all of them, or one each for
/// those from the network and from files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "UnsignedForm")]
pub struct Unsigned {
    /// Those from URLs, `/ipfs/…` and `/ipns/…`. Default `ask`.
    pub network: Policy,
    /// Those from files. Default `allow`.
    pub files: Policy,
}

/// What becomes of a component.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// It runs.
    Allow,
    /// It runs if the operator vouches for its digest, or the config names where it comes from.
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
    /// What becomes of a component from `source` that `signer` has signed, or nobody.
    pub fn policy(&self, source: &str, signer: Option<&Signer>) -> Policy {
        if signer.is_some_and(|signer| self.name_of(signer).is_some()) {
            return Policy::Allow;
        }
        let is_remote = ["http://", "https://", "/ipfs/", "/ipns/"].iter().any(|it| source.starts_with(it));
        if is_remote { self.unsigned.network } else { self.unsigned.files }
    }

    /// What a signer is called who is trusted.
    pub fn name_of(&self, signer: &Signer) -> Option<&str> {
        self.signers.iter().find(|(_, trusted)| *trusted == signer).map(|(name, _)| name.as_str())
    }

    /// Who has signed a component, in words.
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
    /// An OpenTelemetry collector that takes OTLP over HTTP, as in `http://127.0.0.1:4318`: the log is
    /// exported there too. Absent: it is not. (Counts are for Prometheus, at `/metrics`.)
    pub otlp_endpoint: Option<String>,
    /// What the host is called there, default `dim`.
    pub service_name: String,
    /// Headers of each export, as for authorisation.
    pub headers: BTreeMap<String, HeaderText>,
}

/// The section `ipfs`, as existing fleets have it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Ipfs {
    /// The RPC of a Kubo daemon, a multiaddr or a URL. Absent: the embedded backend.
    pub api_url: Option<String>,
    /// Where that stands which is sent as `Authorization`: `Bearer …` or `Basic …`. Absent: nothing is sent.
    pub api_authorization: Option<Secret>,
    /// The key under which the node registry is published; jobs lie under KEY-jobs.
    pub ipns_key_name: String,
    /// Another host's registry, read and merged. Absent: none.
    pub registry_ipns: Option<String>,
    /// The names under which the job trackers of other hosts publish: what they know of jobs is merged. Absent: none.
    pub jobs_ipns: Vec<String>,
    /// What becomes of a name that this host has never published under, or not since the backup that it was restored
    /// from, and that points to something already: `import` has the plugins take its content over first, `replace`
    /// overwrites it. A key that the daemon had first and of which it shows no record counts as one whose record may come
    /// back. Absent: nothing is published under it until the operator decides with `dim ipns adopt`.
    pub adopt: Option<Adoption>,
    /// Seconds between two questions for a followed name. Default 10; higher is kinder to the
    /// network and notices changes later.
    pub follow_every: u64,
    /// The topics.
    pub pubsub: Topics,
    /// What else stands there: other programs may read it.
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
    /// What else stands there.
    #[serde(flatten, skip_serializing)]
    other: BTreeMap<String, IgnoredAny>,
}

/// How one plugin is set up.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PluginConfig {
    /// The component file. Absent: the bundled plugin of that name.
    pub file: Option<PathBuf>,
    /// Whether it stays away.
    pub disabled: bool,
    /// Its config values; the manifest has their names, types and defaults.
    pub config: Map<String, Value>,
    /// What it may reach. Absent: what the manifest asks, for a bundled plugin; nothing otherwise. What is
    /// granted at the command line is added, and what is denied there is denied.
    #[serde(deserialize_with = "granted")]
    pub grants: Option<Grants>,
    /// What it may take, up to the ceiling. Absent ones: the default, or what the manifest asks for if that is
    /// less or was granted.
    pub limits: SomeLimits,
}

/// Grants that stand in the file; an empty section grants nothing.
fn granted<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Grants>, D::Error> {
    Grants::deserialize(deserializer).map(Some)
}

/// The section `store`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// `immediate` (default): replies come when effects are on the disk. `eventual`: the disk is
    /// synced now and then; a crash of the machine may lose what came since.
    pub durability: Durability,
    /// Bytes that all of it may hold. Beyond it what was kept for looking back goes; if that is not
    /// enough, the intake stops until there is room. Absent: as many as the disk takes.
    pub max_bytes: Option<u64>,
    /// Bytes of the disk that must stay free, default 256 MiB. When there are fewer the intake stops;
    /// with less than a quarter of it plugins stand still too, and only questions are answered.
    pub min_free_bytes: u64,
    /// Bytes of memory for the database's pages and the end of the log, default 224 MiB, at least 1 MiB. Less makes a
    /// host slower that has much state, or plugins that lag.
    pub memory_bytes: usize,
    /// What the event log keeps for plugins that lag and for looking back.
    pub log: LogConfig,
    /// How many dead letters are kept. Beyond it the oldest go, and that is told.
    pub dead_letters: dead::Quota,
}

/// The section `store.log`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// Bytes, default 1 GiB. What lies beyond is trimmed, but not past a plugin's cursor, unless that is further
    /// behind than `limits.queue-bytes`.
    pub max_bytes: u64,
    /// Hours, default 168. Older entries are trimmed, but never past a plugin's cursor.
    pub max_age_hours: u64,
    /// Bytes, default 256 MiB: documents that names pointed to before, kept for as long as the
    /// entries from that time. Beyond it the oldest go, but never past a plugin's cursor; entries
    /// from before can then be handled again, but not read these documents.
    pub max_document_bytes: u64,
}

/// The section `outbox`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OutboxConfig {
    /// Seconds after which a publish that no backend accepted is given up. Default one day.
    pub expire_after: u64,
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
            follow_every: 10,
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
            dead_letters: dead::Quota::default(),
        }
    }
}

impl StoreConfig {
    /// Bytes of memory for the database's pages, and for the end of the log: in the ratio of the defaults.
    pub fn memory(&self) -> (usize, usize) {
        let tail = self.memory_bytes / ((CACHE_BYTES + TAIL_BYTES) / TAIL_BYTES);
        (self.memory_bytes - tail, tail)
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { max_bytes: 1 << 30, max_age_hours: 168, max_document_bytes: 256 << 20 }
    }
}

impl Default for Telemetry {
    fn default() -> Self {
        Self { otlp_endpoint: None, service_name: "dim".to_owned(), headers: BTreeMap::new() }
    }
}

impl Default for OutboxConfig {
    fn default() -> Self {
        Self { expire_after: 86_400 }
    }
}

/// Reads the text of a config file.
pub fn read_text(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

/// Reads the text of a config file once more. What is no file is refused: a pipe is read once. So is an empty one: who
/// writes it has not finished.
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

    /// Reads the text of a config file; the error says all that is wrong with it, and where.
    pub fn parse(text: &str) -> Result<Self, String> {
        let Examined { config, findings, .. } = Examined::of(text);
        let wrong: Vec<String> =
            findings.iter().filter(|it| it.severity == Severity::Error).map(Finding::to_string).collect();
        match config {
            Some(config) if wrong.is_empty() => Ok(Self { notices: findings, ..config }),
            _ => Err(wrong.join("\n")),
        }
    }

    /// What is suspicious about the file, or belongs to other programs.
    pub fn notices(&self) -> &[Finding] {
        &self.notices
    }

    /// The registry to merge. What is no name is told and left out: the host's own registry is
    /// worth more than another's.
    fn registry(&self) -> Option<&str> {
        let name = self.ipfs.registry_ipns.as_deref().filter(|name| !name.trim().is_empty())?;
        to_merge(name, "ipfs.registry_ipns is left out, no registry is merged")
    }

    /// The documents of jobs to merge; what is no name is told and left out.
    fn jobs(&self) -> Vec<&str> {
        let left_out = "a name of ipfs.jobs_ipns is left out, its jobs are not merged";
        self.ipfs.jobs_ipns.iter().filter_map(|name| to_merge(name, left_out)).collect()
    }

    /// How long to wait between two rounds of questions for followed names.
    pub fn follow_every(&self) -> Duration {
        Duration::from_secs(self.ipfs.follow_every.max(1))
    }

    /// How many bytes of the log wait for a plugin.
    pub fn queue_bytes(&self) -> u64 {
        self.limits.queue_bytes.min(self.store.max_bytes.map_or(u64::MAX, |most| most / 2))
    }

    /// Who may speak on a topic; none if everyone may. What names the topic itself counts, else the longest prefix.
    pub fn speakers(&self, topic: &Topic) -> Option<&BTreeSet<PeerName>> {
        let covering = self.topics.iter().filter(|(pattern, _)| pattern.covers(topic));
        let closest = covering.max_by_key(|(pattern, _)| (pattern.exact().is_some(), pattern.bytes()));
        closest.map(|(_, topic)| &topic.peers)
    }

    /// How long a publish is tried.
    pub fn outbox_expiry(&self) -> Duration {
        Duration::from_secs(self.outbox.expire_after)
    }

    /// The config values that a bundled plugin has from the section `ipfs`, under the operator's.
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

/// A name whose document is merged; of what is no name, `left_out` is told.
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
