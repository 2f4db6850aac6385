//! Owns the manifest of a plugin: its name, version, requests and config. It receives the bytes of a component,
//! whose custom section contains the manifest, and returns an inspection without running the component.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::str::FromStr;

use dim_model::beginning::ReadFrom;
use dim_model::ident::{Digest, InvalidWord, KeyName, PeerName, PluginName, Topic};
use dim_model::signer::Signer;
use dim_model::suggestion::meant;
use dim_store::change::Version;
use dim_store::grants::{Grants, TopicPattern};
use dim_store::plugin_limits::SomeLimits;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;
use utoipa::ToSchema;
use wasmparser::{ComponentTypeRef, Parser, Payload};

use crate::instances;
use crate::signing::{SigningError, signer_of};

/// The custom section with the manifest.
const SECTION: &str = "dim-manifest";

/// Longest version, in bytes. Every list of plugins contains it.
const MAX_VERSION: usize = 256;

/// Longest manifest, in bytes.
const MAX_MANIFEST: usize = 64 << 10;

/// Most topics, keys and names that a manifest may request, including those from its config.
pub const MAX_WORDS: usize = 1_000;

/// Most bytes of all these words together.
pub const MAX_WORD_BYTES: usize = 64 << 10;

/// Longest text of a section that is shown, in bytes; a longer one is cut.
const MAX_TEXT: usize = 4 << 10;

/// Most bytes of the names of all imports of a component. The names of everything that a host offers have less
/// than 2,000.
const MAX_IMPORT_BYTES: usize = 64 << 10;

/// Largest component file, in bytes.
pub const MAX_COMPONENT: usize = 256 << 20;

/// The values of `${host.…}` in a config.
pub type HostValues<'a> = &'a [(&'a str, &'a str)];

/// The reason why a file is not a plugin, or a config does not fit its manifest.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// The file exceeds the limit.
    #[error("the file is too large: a component may have {MAX_COMPONENT} bytes")]
    TooLarge,
    /// The file is not WebAssembly.
    #[error("the file is not WebAssembly")]
    NotWasm,
    /// The file is a module, not a component.
    #[error(
        "the file is a core module, not a component: build it for wasm32-wasip2, or wrap it with `wasm-tools component new`"
    )]
    CoreModule,
    /// The file is damaged or truncated.
    #[error("the component is damaged or truncated: {0}")]
    Damaged(String),
    /// The component makes too many instances of its modules and components.
    #[error("the component makes {0} instances of the modules and components in it; {most} are the limit", most = instances::MOST)]
    TooManyInstances(u64),
    /// The component imports more than any host offers.
    #[error("the names of the component's imports have more than {MAX_IMPORT_BYTES} bytes")]
    TooManyImports,
    /// The component has no manifest.
    #[error(
        "the component has no `{SECTION}` section: export the plugin with a manifest, or append one with `wasm-tools`"
    )]
    Missing,
    /// The component has more than one manifest.
    #[error("the component has {0} `{SECTION}` sections at one depth: keep one")]
    Ambiguous(usize),
    /// The manifest cannot be decoded.
    #[error("the manifest cannot be read: {0}")]
    Unreadable(String),
    /// The component has an invalid signature.
    #[error(transparent)]
    Signature(#[from] SigningError),
    /// The manifest has no such config value.
    #[error("the plugin has no config value {key:?}{hint}")]
    UnknownValue {
        /// The name of the value.
        key: String,
        /// The most similar name, or the known names.
        hint: String,
    },
    /// The config value has the wrong type.
    #[error("config value {key:?} must be a {expected}")]
    WrongType {
        /// The name of the value.
        key: String,
        /// The expected type.
        expected: &'static str,
    },
    /// The config value is not one of the choices.
    #[error("config value {key:?} must be one of {choices}{meant}")]
    NoChoice {
        /// The name of the value.
        key: String,
        /// The choices.
        choices: String,
        /// The most similar choice, as a question.
        meant: String,
    },
    /// The config value contains an invalid peer.
    #[error("config value {key:?}: {why}")]
    Peer {
        /// The name of the value.
        key: String,
        /// The defect.
        why: String,
    },
    /// A config value without a default is not set.
    #[error("config value {0:?} is not set and has no default")]
    MissingValue(String),
    /// A `${…}` refers to no config value.
    #[error("{0:?} in the manifest refers to no config value")]
    UnknownReference(String),
    /// The manifest requests too many topics, keys and names.
    #[error(
        "the manifest asks for more than {MAX_WORDS} topics, keys and names, or for more than {MAX_WORD_BYTES} bytes of them, including those from its config: request `prefix.*` instead"
    )]
    TooManyWords,
    /// A beginning is for a topic to which the manifest does not subscribe.
    #[error("`topics.from` has {0:?}, which is not in `topics.subscribe`")]
    NotSubscribed(String),
    /// A beginning is for a prefix of topics, to which the host does not subscribe.
    #[error(
        "`topics.from` has {0:?}: a plugin says at its call of `subscribe` where a topic of a prefix begins"
    )]
    Prefix(String),
    /// A topic, key or name is invalid.
    #[error(transparent)]
    Word(#[from] InvalidWord),
}

impl ManifestError {
    /// The name of the config value that is wrong, if one is.
    pub fn key(&self) -> Option<&str> {
        match self {
            Self::UnknownValue { key, .. }
            | Self::WrongType { key, .. }
            | Self::NoChoice { key, .. }
            | Self::Peer { key, .. }
            | Self::MissingValue(key) => Some(key),
            _ => None,
        }
    }

    /// The defect in words, for a place that shows the name of the value already.
    pub fn why(&self) -> String {
        match self {
            Self::UnknownValue { hint, .. } => format!("the plugin has no such value{hint}"),
            Self::WrongType { expected, .. } => format!("it must be a {expected}"),
            Self::NoChoice { choices, meant, .. } => format!("it must be one of {choices}{meant}"),
            Self::Peer { why, .. } => why.clone(),
            Self::MissingValue(_) => "it is not set and has no default".to_owned(),
            other => other.to_string(),
        }
    }
}

/// The manifest of a plugin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Manifest {
    /// The name, unless the operator sets another.
    #[schema(value_type = String)]
    pub name: PluginName,
    /// The version, as in the `version` section.
    pub version: String,
    /// One line for the operator.
    #[serde(default)]
    pub description: String,
    /// The state version.
    #[serde(default = "first_state_version", alias = "state_version")]
    pub state_version: u32,
    /// The requested topics.
    #[serde(default)]
    pub topics: Topics,
    /// The requested IPNS keys and names.
    #[serde(default)]
    pub ipns: Names,
    /// The requested limits. A limit above the default needs a grant.
    #[serde(default, skip_serializing_if = "SomeLimits::is_empty")]
    pub limits: SomeLimits,
    /// The declared config values.
    #[serde(default)]
    pub config: BTreeMap<String, ConfigValue>,
}

fn first_state_version() -> u32 {
    1
}

/// Topics that a plugin requests. Each may be `${config.x}`; `prefix.*` covers all topics below the prefix.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Topics {
    /// Topics to subscribe to. The host subscribes at the installation, except to prefixes.
    pub subscribe: Vec<String>,
    /// Topics to publish on.
    pub publish: Vec<String>,
    /// The events with which the subscriptions begin, for topics of `subscribe`, as they are written there: `head`
    /// (the default), `earliest`, a time, or a duration before the installation.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(value_type = BTreeMap<String, String>)]
    pub from: BTreeMap<String, ReadFrom>,
}

/// IPNS keys and names that a plugin requests. Each may be `${config.x}`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Names {
    /// Keys to publish under.
    pub write: Vec<String>,
    /// Names to read; a key of the host represents its name.
    pub read: Vec<String>,
    /// Keys among `write` under which another plugin publishes as well.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub share: Vec<String>,
    /// Keys whose documents of another publisher the plugin takes over by its command `import`. Its later
    /// documents contain their content.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub import: Vec<String>,
}

/// The declaration of a config value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConfigValue {
    /// The type.
    #[serde(rename = "type")]
    pub kind: ConfigKind,
    /// The value if it is not set.
    #[serde(default)]
    pub default: Option<Value>,
    /// Whether it may be absent.
    #[serde(default)]
    pub optional: bool,
    /// The accepted texts; empty for any text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<String>,
    /// One line for the operator.
    #[serde(default)]
    pub description: String,
}

/// The type of a config value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ConfigKind {
    /// Text.
    String,
    /// A whole number.
    Integer,
    /// A number.
    Number,
    /// True or false.
    Boolean,
    /// A list of texts.
    Strings,
    /// A list of peer ids. The plugin receives each in base58, like the origin of a message.
    Peers,
    /// A list of peer ids with names, as in `NODE=PEER`; a name may occur several times.
    NamedPeers,
}

/// A manifest with the operator's config applied.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolved {
    /// The requested grants, without limits: only the host knows the defaults of limits.
    pub asks: Grants,
    /// The config as a JSON object.
    pub config: String,
}

impl ConfigKind {
    fn accepts(self, value: &Value) -> bool {
        match self {
            Self::String => value.is_string(),
            Self::Integer => value.is_i64() || value.is_u64(),
            Self::Number => value.is_number(),
            Self::Boolean => value.is_boolean(),
            Self::Strings | Self::Peers | Self::NamedPeers => {
                value.as_array().is_some_and(|items| items.iter().all(Value::is_string))
            }
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::String => "string",
            Self::Integer => "whole number",
            Self::Number => "number",
            Self::Boolean => "boolean",
            Self::Strings => "list of strings",
            Self::Peers => "list of peer ids",
            Self::NamedPeers => "list of NODE=PEER",
        }
    }
}

/// The words that YAML parsers read as `false` and as `true`.
const SWITCHES: [&[&str]; 2] = [&["false", "no", "off", "n"], &["true", "yes", "on", "y"]];

/// The words for the same boolean as `text`, if it is one.
fn switch_of(text: &str) -> Option<&'static [&'static str]> {
    let text = text.to_ascii_lowercase();
    SWITCHES.into_iter().find(|words| words.contains(&text.as_str()))
}

impl ConfigValue {
    /// Converts an operator's value to the form that the plugin receives.
    fn read(&self, key: &str, value: &Value) -> Result<Value, ManifestError> {
        let value = match (self.kind, value) {
            (ConfigKind::String, Value::Bool(value)) => {
                let word = SWITCHES[usize::from(*value)][0];
                Value::from(self.choice_like(word).unwrap_or(word))
            }
            (ConfigKind::String, Value::String(text)) if !self.choices.contains(text) => {
                Value::from(self.choice_like(text).unwrap_or(text))
            }
            (ConfigKind::Boolean, Value::String(text)) => {
                let switch = switch_of(text);
                switch.map_or_else(|| value.clone(), |words| Value::Bool(words == SWITCHES[1]))
            }
            _ => value.clone(),
        };
        if !self.kind.accepts(&value) {
            return Err(ManifestError::WrongType { key: key.to_owned(), expected: self.kind.name() });
        }
        match (&value, self.kind) {
            (Value::String(text), _) if !self.choices.is_empty() && !self.choices.contains(text) => {
                let (key, choices) = (key.to_owned(), self.choices.join(", "));
                let meant = meant(text, self.choices.iter().map(String::as_str));
                Err(ManifestError::NoChoice { key, choices, meant })
            }
            (Value::Array(items), ConfigKind::Peers | ConfigKind::NamedPeers) => {
                let items = items.iter().filter_map(Value::as_str).map(|item| self.peer(key, item));
                Ok(Value::Array(items.collect::<Result<_, _>>()?))
            }
            _ => Ok(value),
        }
    }

    /// The choice that YAML parsers read as the same boolean as `text`.
    fn choice_like(&self, text: &str) -> Option<&str> {
        let words = switch_of(text)?;
        self.choices.iter().map(String::as_str).find(|choice| words.contains(choice))
    }

    /// Normalizes a peer id, with its name if it has one.
    fn peer(&self, key: &str, item: &str) -> Result<Value, ManifestError> {
        let wrong = |why: String| ManifestError::Peer { key: key.to_owned(), why };
        let peer = |text: &str| text.parse::<PeerName>().map_err(|error| wrong(error.to_string()));
        if self.kind == ConfigKind::Peers {
            return Ok(Value::from(peer(item)?.as_str()));
        }
        let pair = item.rsplit_once('=').filter(|(name, _)| !name.is_empty());
        let (name, text) = pair.ok_or_else(|| wrong(format!("{item:?} is no pair, as in NODE=PEER")))?;
        Ok(Value::from(format!("{name}={}", peer(text)?)))
    }
}

impl Manifest {
    /// Parses a manifest.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        let manifest: Self =
            toml::from_str(text).map_err(|error| ManifestError::Unreadable(error.to_string()))?;
        if manifest.version.len() > MAX_VERSION {
            return Err(ManifestError::Unreadable(format!("its version is longer than {MAX_VERSION} bytes")));
        }
        Ok(manifest)
    }

    /// Applies the operator's values and those of the host (`${host.id}`) to the manifest.
    pub fn resolve(&self, set: &Map<String, Value>, host: HostValues<'_>) -> Result<Resolved, ManifestError> {
        let config = self.config_with(set, host)?;
        let left = &mut WordsLeft::default();
        let asks = Grants {
            publish: words(&self.topics.publish, &config, left)?,
            subscribe: words(&self.topics.subscribe, &config, left)?,
            write: words(&self.ipns.write, &config, left)?,
            read: words(&self.ipns.read, &config, left)?,
            share: words(&self.ipns.share, &config, left)?,
            limits: SomeLimits::default(),
        };
        // Checked here, so that [`Manifest::imports`] and [`Manifest::beginnings`] cannot fail.
        words::<KeyName>(&self.ipns.import, &config, left)?;
        if let Some(topic) = self.topics.from.keys().find(|topic| !self.topics.subscribe.contains(topic)) {
            return Err(ManifestError::NotSubscribed(topic.clone()));
        }
        self.all_beginnings(&config, left)?;
        Ok(Resolved { asks, config: Value::Object(config).to_string() })
    }

    /// The keys whose documents the plugin imports, for a config from [`Manifest::resolve`].
    pub fn imports(&self, config: &str) -> BTreeSet<KeyName> {
        let config = serde_json::from_str(config).unwrap_or_default();
        words(&self.ipns.import, &config, &mut WordsLeft::default()).unwrap_or_default()
    }

    /// The events with which the subscriptions of the manifest begin, for a config from [`Manifest::resolve`]. The
    /// others begin at the head.
    pub fn beginnings(&self, config: &str) -> BTreeMap<Topic, ReadFrom> {
        let config = serde_json::from_str(config).unwrap_or_default();
        self.all_beginnings(&config, &mut WordsLeft::default()).unwrap_or_default()
    }

    fn all_beginnings(
        &self,
        config: &Map<String, Value>,
        left: &mut WordsLeft,
    ) -> Result<BTreeMap<Topic, ReadFrom>, ManifestError> {
        let mut beginnings = BTreeMap::new();
        for (topic, from) in &self.topics.from {
            for pattern in words::<TopicPattern>(std::slice::from_ref(topic), config, left)? {
                let topic = pattern.exact().ok_or_else(|| ManifestError::Prefix(topic.clone()))?;
                beginnings.insert(topic.clone(), from.clone());
            }
        }
        Ok(beginnings)
    }

    fn config_with(
        &self,
        set: &Map<String, Value>,
        host: HostValues<'_>,
    ) -> Result<Map<String, Value>, ManifestError> {
        if let Some(key) = set.keys().find(|key| !self.config.contains_key(*key)) {
            let known = self.config.keys().map(String::as_str);
            let meant = meant(key, known.clone());
            let hint = match meant.is_empty() {
                true => format!("; it has {}", known.collect::<Vec<_>>().join(", ")),
                false => meant,
            };
            return Err(ManifestError::UnknownValue { key: key.clone(), hint });
        }
        let mut config = Map::new();
        for (key, declared) in &self.config {
            let value = set.get(key).filter(|value| !value.is_null()).or(declared.default.as_ref());
            match value {
                Some(value) => {
                    config.insert(key.clone(), with_host_values(&declared.read(key, value)?, host));
                }
                None if declared.optional => {}
                None => return Err(ManifestError::MissingValue(key.clone())),
            }
        }
        Ok(config)
    }
}

fn with_host_values(value: &Value, host: HostValues<'_>) -> Value {
    match value {
        Value::String(text) => {
            let filled = host
                .iter()
                .fold(text.clone(), |text, (name, value)| text.replace(&format!("${{host.{name}}}"), value));
            Value::String(filled)
        }
        other => other.clone(),
    }
}

/// The number of words, and of their bytes, that a manifest may still request.
struct WordsLeft {
    count: usize,
    bytes: usize,
}

impl Default for WordsLeft {
    fn default() -> Self {
        Self { count: MAX_WORDS, bytes: MAX_WORD_BYTES }
    }
}

impl WordsLeft {
    /// Subtracts a word before it is allocated.
    fn take(&mut self, bytes: usize) -> Result<(), ManifestError> {
        let left = self.count.checked_sub(1).zip(self.bytes.checked_sub(bytes));
        (self.count, self.bytes) = left.ok_or(ManifestError::TooManyWords)?;
        Ok(())
    }
}

/// Parses a list of words, with `${config.x}` replaced by the value or the values of `x`.
fn words<T: FromStr<Err = InvalidWord> + Ord>(
    texts: &[String],
    config: &Map<String, Value>,
    left: &mut WordsLeft,
) -> Result<BTreeSet<T>, ManifestError> {
    let mut words = BTreeSet::new();
    for text in texts {
        for expanded in expand(text, config, left)? {
            words.insert(expanded.parse()?);
        }
    }
    Ok(words)
}

fn expand(
    text: &str,
    config: &Map<String, Value>,
    left: &mut WordsLeft,
) -> Result<Vec<String>, ManifestError> {
    let Some((before, rest)) = text.split_once("${config.") else {
        left.take(text.len())?;
        return Ok(vec![text.to_owned()]);
    };
    let unknown = || ManifestError::UnknownReference(text.to_owned());
    let (key, after) = rest.split_once('}').ok_or_else(unknown)?;
    Ok(match config.get(key) {
        // An optional value that is not set requests nothing.
        None => Vec::new(),
        Some(Value::String(value)) if value.is_empty() => Vec::new(),
        Some(Value::String(value)) => {
            left.take(before.len() + value.len() + after.len())?;
            vec![format!("{before}{value}{after}")]
        }
        Some(Value::Array(values)) => {
            let mut expanded = Vec::new();
            for value in values.iter().filter_map(Value::as_str) {
                left.take(before.len() + value.len() + after.len())?;
                expanded.push(format!("{before}{value}{after}"));
            }
            expanded
        }
        Some(_) => return Err(unknown()),
    })
}

/// Appends custom sections to a component, each with its name, as any tool can.
pub fn with_sections(component: &[u8], sections: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = component.to_vec();
    for (name, data) in sections {
        bytes.extend(section(0, &[&leb128(name.len()), name.as_bytes(), data].concat()));
    }
    bytes
}

/// Encodes a section of a module or a component with the id `id`.
pub fn section(id: u8, content: &[u8]) -> Vec<u8> {
    [&[id], leb128(content.len()).as_slice(), content].concat()
}

/// Encodes a number as unsigned LEB128, as in WebAssembly.
pub fn leb128(mut number: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// The properties of a component file that are known without running it.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Inspection {
    /// The digest of the file.
    #[schema(value_type = String)]
    pub digest: Digest,
    /// The size of the file in bytes.
    pub size: usize,
    /// The signer, if the signature was checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub signer: Option<Signer>,
    /// The manifest.
    pub manifest: Manifest,
    /// The `authors` section. One of more than 4,096 bytes is cut and ends with `…`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub authors: Option<String>,
    /// The `licenses` section. One of more than 4,096 bytes is cut and ends with `…`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub licenses: Option<String>,
    /// The imported instances, with their versions.
    pub imports: Vec<String>,
}

impl Inspection {
    /// Adds the signer of the component. Signers in `known` are found even if the signature does not name them.
    pub fn signed<'a>(
        self,
        component: &[u8],
        known: impl IntoIterator<Item = &'a Signer>,
    ) -> Result<Self, ManifestError> {
        Ok(Self { signer: signer_of(component, known)?, ..self })
    }

    /// The version for announcements.
    pub fn as_version(&self) -> Version {
        Version {
            version: self.manifest.version.clone(),
            digest: self.digest.to_string(),
            state_version: Some(self.manifest.state_version),
        }
    }
}

/// Reads a component file, at most one byte more than a component may have.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    // Reading a pipe would wait for a writer, and a device may have no end.
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_COMPONENT as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Inspects a component file without checking its signature.
pub fn inspect(component: &[u8]) -> Result<Inspection, ManifestError> {
    if component.len() > MAX_COMPONENT {
        return Err(ManifestError::TooLarge);
    }
    if !component.starts_with(b"\0asm") {
        return Err(ManifestError::NotWasm);
    }
    if Parser::is_core_wasm(component) {
        return Err(ManifestError::CoreModule);
    }
    let made = instances::count(component).map_err(|error| ManifestError::Damaged(error.to_string()))?;
    if made > instances::MOST {
        return Err(ManifestError::TooManyInstances(made));
    }
    let sections = Sections::read(component)?;
    let manifest = Manifest::parse(sections.manifest()?)?;
    Ok(Inspection {
        digest: Digest::of(component),
        size: component.len(),
        signer: None,
        manifest,
        authors: sections.text("authors"),
        licenses: sections.text("licenses"),
        imports: sections.imports,
    })
}

/// The custom sections that the host uses, each with its depth.
#[derive(Default)]
struct Sections<'a> {
    custom: Vec<(usize, &'a str, &'a [u8])>,
    imports: Vec<String>,
}

impl<'a> Sections<'a> {
    fn read(component: &'a [u8]) -> Result<Self, ManifestError> {
        let damaged = |error: wasmparser::BinaryReaderError| ManifestError::Damaged(error.to_string());
        let mut sections = Self::default();
        let (mut depth, mut import_bytes) = (0, 0);
        for payload in Parser::new(0).parse_all(component) {
            match payload.map_err(damaged)? {
                Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
                Payload::End(_) if depth > 0 => depth -= 1,
                Payload::CustomSection(section) => {
                    if matches!(section.name(), SECTION | "authors" | "licenses") {
                        sections.custom.push((depth, section.name(), section.data()));
                    }
                }
                Payload::ComponentImportSection(imports) if depth == 0 => {
                    for import in imports {
                        let import = import.map_err(damaged)?;
                        // Types that the world uses are imports, too, but the host offers only instances.
                        if matches!(import.ty, ComponentTypeRef::Instance(_)) {
                            import_bytes += import.name.name.len();
                            if import_bytes > MAX_IMPORT_BYTES {
                                return Err(ManifestError::TooManyImports);
                            }
                            sections.imports.push(import.name.name.to_owned());
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(sections)
    }

    /// The outermost manifest; two manifests at that depth are an error.
    fn manifest(&self) -> Result<&'a str, ManifestError> {
        let found = || self.custom.iter().filter(|(_, name, _)| *name == SECTION);
        let outermost = found().map(|(depth, ..)| *depth).min().ok_or(ManifestError::Missing)?;
        let mut candidates = found().filter(|(depth, ..)| *depth == outermost);
        let (_, _, data) = candidates.next().ok_or(ManifestError::Missing)?;
        match candidates.count() {
            0 => {}
            more => return Err(ManifestError::Ambiguous(more + 1)),
        }
        if data.len() > MAX_MANIFEST {
            return Err(ManifestError::Unreadable(format!("it is longer than {MAX_MANIFEST} bytes")));
        }
        std::str::from_utf8(data).map_err(|_| ManifestError::Unreadable("it is not UTF-8".to_owned()))
    }

    fn text(&self, name: &str) -> Option<String> {
        let (_, _, data) =
            self.custom.iter().filter(|(_, found, _)| *found == name).min_by_key(|(depth, ..)| *depth)?;
        let shown = &data[..data.len().min(MAX_TEXT)];
        let text = String::from_utf8_lossy(shown);
        if shown.len() == data.len() {
            return Some(text.into_owned());
        }
        // The last character may be incomplete.
        Some(format!("{}…", text.trim_end_matches(char::REPLACEMENT_CHARACTER)))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use dim_store::grants::Reach;

    #[test]
    fn a_version_is_bounded() {
        let of = |length: usize| {
            let version = "1".repeat(length);
            Manifest::parse(&format!("name = \"a\"\nversion = \"{version}\"\nstate-version = 1\n"))
        };
        assert!(of(MAX_VERSION).is_ok());
        assert!(of(MAX_VERSION + 1).unwrap_err().to_string().contains("256 bytes"));
    }

    const MANIFEST: &str = r#"
        name = "counter"
        version = "1.2.3"
        [topics]
        subscribe = ["${config.topic}", "fixed.*"]
        publish = ["${config.more}"]
        [ipns]
        write = ["${config.key}-x"]
        read = ["${config.other}"]
        [config.topic]
        type = "string"
        default = "beats"
        [config.more]
        type = "strings"
        default = ["a", "b"]
        [config.key]
        type = "string"
        default = "dim"
        [config.other]
        type = "string"
        optional = true
    "#;

    #[test]
    fn config_values_are_put_in_where_the_manifest_refers_to_them() {
        let manifest = Manifest::parse(MANIFEST).unwrap();
        let resolved = manifest.resolve(&Map::new(), &[]).unwrap();
        let asks = Reach { granted: resolved.asks.clone(), ..Reach::default() };
        assert!(asks.may_subscribe(&"beats".parse().unwrap()));
        assert!(asks.may_subscribe(&"fixed.x".parse().unwrap()));
        assert_eq!(resolved.asks.publish.len(), 2);
        assert!(resolved.asks.write.contains(&"dim-x".parse().unwrap()));
        assert!(resolved.asks.read.is_empty());
    }

    #[test]
    fn a_manifest_is_limited() {
        let with = |manifest: &str| {
            let text = [b"\x0cdim-manifest", manifest.as_bytes()].concat();
            let length = [0, 7, 14].map(|shift| (text.len() >> shift) as u8 & 0x7f);
            let section = [&[0, length[0] | 0x80, length[1] | 0x80, length[2]], text.as_slice()].concat();
            inspect(&[b"\0asm\x0d\0\x01\0", section.as_slice()].concat())
        };
        let largest = format!("{MANIFEST}#{}", "x".repeat(MAX_MANIFEST - MANIFEST.len() - 1));
        assert_eq!(with(&largest).unwrap().manifest.version, "1.2.3");
        let why = with(&format!("{largest}x")).unwrap_err().to_string();
        assert!(why.contains("it is longer than 65536 bytes"), "{why}");
    }

    #[test]
    fn what_a_component_says_of_itself_is_bounded() {
        let empty = b"\0asm\x0d\0\x01\0";
        let of = |text: &[u8]| {
            let sections = [(SECTION, MANIFEST.as_bytes()), ("authors", text), ("licenses", text)];
            let inspection = inspect(&with_sections(empty, &sections)).unwrap();
            assert_eq!(inspection.authors, inspection.licenses);
            inspection.authors.unwrap()
        };
        let longest = "x".repeat(MAX_TEXT);
        assert_eq!(of(longest.as_bytes()), longest);
        assert_eq!(of(format!("{longest}x").as_bytes()), format!("{longest}…"));
        let wide = "ö".repeat(MAX_TEXT);
        assert_eq!(of(format!("x{wide}").as_bytes()), format!("x{}…", &wide[..MAX_TEXT - 2]));
        assert!(of(&vec![0xff; 1 << 20]).len() < 4 * MAX_TEXT);
        let importing = |length: usize| {
            let name = format!("a:b/c@1.0.0+{}", "x".repeat(length));
            let import = [&[1, 0], leb128(name.len()).as_slice(), name.as_bytes(), &[5, 0]].concat();
            let instance_type = section(7, &[1, 0x42, 0]);
            inspect(&[empty.as_slice(), &instance_type, &section(10, &import)].concat())
        };
        assert!(matches!(importing(1_000), Err(ManifestError::Missing)));
        assert!(matches!(importing(MAX_IMPORT_BYTES), Err(ManifestError::TooManyImports)));
    }

    #[test]
    fn unknown_and_mistyped_values_are_refused() {
        let manifest = Manifest::parse(MANIFEST).unwrap();
        let set = |key: &str, value: Value| Map::from_iter([(key.to_owned(), value)]);
        assert!(matches!(
            manifest.resolve(&set("topik", "x".into()), &[]),
            Err(ManifestError::UnknownValue { .. })
        ));
        assert!(matches!(
            manifest.resolve(&set("topic", 7.into()), &[]),
            Err(ManifestError::WrongType { .. })
        ));
        assert!(matches!(manifest.resolve(&set("topic", "a\nb".into()), &[]), Err(ManifestError::Word(_))));
    }

    #[test]
    fn words_that_yaml_readers_take_for_booleans_are_what_the_manifest_wants() {
        let value = |declared: &str, value: Value| {
            let text = format!("name = \"a\"\nversion = \"1\"\n[config.x]\n{declared}\n");
            let manifest = Manifest::parse(&text).unwrap();
            let resolved = manifest.resolve(&Map::from_iter([("x".to_owned(), value)]), &[]);
            resolved.map(|it| it.config).map_err(|error| error.to_string())
        };
        let choice = "type = \"string\"\nchoices = [\"no\", \"first\"]";
        for no in [json!(false), json!("no"), json!("No"), json!("off"), json!("FALSE")] {
            assert_eq!(value(choice, no), Ok(r#"{"x":"no"}"#.to_owned()));
        }
        let why = value(choice, json!("frist")).unwrap_err();
        assert!(why.contains("one of no, first; did you mean `first`?"), "{why}");
        assert!(value(choice, json!(true)).is_err() && value(choice, json!(1)).is_err());
        assert_eq!(value("type = \"string\"", json!(true)), Ok(r#"{"x":"true"}"#.to_owned()));
        assert_eq!(value("type = \"string\"", json!("No")), Ok(r#"{"x":"No"}"#.to_owned()));
        assert_eq!(value("type = \"boolean\"", json!("yes")), Ok(r#"{"x":true}"#.to_owned()));
        assert_eq!(value("type = \"boolean\"", json!("Off")), Ok(r#"{"x":false}"#.to_owned()));
        assert!(value("type = \"boolean\"", json!("maybe")).is_err());
    }

    #[test]
    fn what_is_not_a_component_is_told_apart() {
        assert!(matches!(inspect(b"hello"), Err(ManifestError::NotWasm)));
        assert!(matches!(inspect(b"\0asm\x01\0\0\0"), Err(ManifestError::CoreModule)));
        assert!(matches!(inspect(b"\0asm\x0d\0\x01\0"), Err(ManifestError::Missing)));
        assert!(matches!(inspect(b"\0asm\x0d\0\x01\0\x01\xff"), Err(ManifestError::Damaged(_))));
    }
}
