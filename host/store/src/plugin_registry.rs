//! Owns the plugin registry: the rows of the plugins in the store, with their numbers, components, grants and keys.

use std::collections::{BTreeMap, BTreeSet};

use dim_model::entry::{Generation, Offset};
use dim_model::ident::{KeyName, PluginName};
use dim_model::signer::Signer;
use dim_model::time::Timestamp;
use redb::{ReadableTable, Table, WriteTransaction};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::batch::{Batch, Effects, Timers};
use crate::change::Version;
use crate::entry_context::EntryContext;
use crate::grants::{Grants, Reach};
use crate::probation::Rates;
use crate::{CURSORS, PLUGINS, PluginId, STATE, Snapshot, StateKey, Store, StoreError, TIMERS, WORLDS};

/// The row of a plugin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The plugin's number in keys.
    pub id: PluginId,
    /// The component that ran last.
    #[serde(flatten)]
    pub code: Code,
    /// The state version; `None` before the first start.
    pub state_version: Option<u32>,
    /// The number of the current code, counted from the first one.
    #[serde(default)]
    pub generation: Generation,
    /// Whether the plugin is to run.
    #[serde(default)]
    pub standing: Standing,
    /// The measurements of the code since it was confirmed, written from time to time: new code is compared
    /// with them.
    #[serde(default)]
    pub rates: Rates,
    /// The grants and denials of the operator beside the config.
    #[serde(default, skip_serializing_if = "Setup::is_empty")]
    pub setup: Setup,
    /// The keys that the plugin owns.
    #[serde(default)]
    pub claim: Claim,
    /// A component that waits for the grants that it requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<Pending>,
    /// The quarantine, if the plugin has failed too often. It ends when the plugin is resumed or gets other code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quarantine: Option<Quarantine>,
    /// The file or the IPNS name that the component comes from. When it changes, the host replaces the component.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub follows: Option<String>,
}

/// Whether a plugin is to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// The plugin runs.
    #[default]
    Runs,
    /// The plugin is loaded and handles nothing until it is resumed.
    Paused,
    /// The plugin is not loaded; the host keeps its state and its grants.
    Removed,
}

/// The grants and denials that the operator has set while a host ran. They belong to the plugin's name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Setup {
    /// The grants beside those of the config.
    #[serde(alias = "grants")]
    pub granted: Grants,
    /// The denials, which override grants from any source.
    pub denied: Grants,
    /// The signer of the code that the grants are for; without one they are for any code.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signer: Option<Signer>,
}

impl Setup {
    /// Grants all requested permissions except denied ones: a denial ends only when the operator grants that
    /// permission by name.
    pub fn grant_all(&mut self, asks: &Grants) {
        let mut open = asks.clone();
        open.take(&self.denied);
        self.granted.add(&open);
    }

    /// The permissions in `grants` that are denied, in words.
    pub fn denied_of(&self, grants: &Grants) -> Vec<String> {
        Reach { granted: grants.clone(), denied: self.denied.clone() }.missing(grants)
    }

    /// Whether the grants are for code that `signer` has signed.
    pub fn is_for(&self, signer: Option<&Signer>) -> bool {
        self.signer.is_none() || self.signer.as_ref() == signer
    }

    /// The setup for code that `signer` has signed.
    pub fn of(&self, signer: Option<&Signer>) -> Self {
        let granted = if self.is_for(signer) { self.granted.clone() } else { Grants::default() };
        Self { granted, ..self.clone() }
    }

    /// The setup of earlier code after a rollback; `before` is its setup from then. It keeps the current grants
    /// if they are for its signer, else it gets those from then. Denials from since then stay.
    pub fn going_back(&self, before: &Self) -> Self {
        if self.is_for(before.signer.as_ref()) {
            return Self { signer: before.signer.clone(), ..self.clone() };
        }
        Self { denied: self.denied.clone(), ..before.clone() }
    }

    /// Whether the operator has granted and denied nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The keys that a plugin writes. No other plugin writes them, unless both share the key.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Claim {
    /// The keys.
    pub keys: BTreeSet<KeyName>,
    /// The keys among them that another plugin may own as well.
    pub shared: BTreeSet<KeyName>,
}

impl Claim {
    /// The claim of a plugin with the permissions in `reach`.
    pub fn of(reach: &Reach) -> Self {
        Self { keys: reach.writes().cloned().collect(), shared: reach.shares().cloned().collect() }
    }

    /// The union of two claims.
    pub fn and(mut self, other: Self) -> Self {
        self.keys.extend(other.keys);
        self.shared.extend(other.shared);
        self
    }

    /// The first key that both plugins claim without sharing it.
    pub fn conflict<'a>(&'a self, other: &'a Self) -> Option<&'a KeyName> {
        let is_shared = |key: &KeyName| self.shared.contains(key) && other.shared.contains(key);
        self.keys.intersection(&other.keys).find(|key| !is_shared(key))
    }
}

/// A quarantine of a plugin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantine {
    /// The reason of the last failure to start.
    pub reason: String,
    /// The time at which the quarantine began.
    pub since: Timestamp,
}

/// A component that waits for the grants that it requests. The store keeps it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Pending {
    /// The version.
    pub version: String,
    /// The digest, in hex.
    pub digest: String,
    /// The source of the component. A URL is shown without parts that may be secret.
    #[serde(serialize_with = "crate::change::shown")]
    pub source: String,
    /// The requester of the change.
    pub by: String,
    /// The time since which the component waits.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
    /// The requested permissions that the plugin is not granted, in words.
    pub missing: Vec<String>,
    /// The signer of the component.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub signer: Option<Signer>,
    /// The source that the host follows once the component runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub follows: Option<String>,
}

impl Row {
    /// The version for announcements.
    pub fn as_version(&self) -> Version {
        let Code { version, digest, .. } = self.code.clone();
        Version { version, digest, state_version: self.state_version }
    }
}

/// The component that a plugin runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Code {
    /// The version.
    pub version: String,
    /// The digest, in hex.
    pub digest: String,
    /// The source of a component that was installed while the host ran; the store keeps its file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub installed: Option<String>,
}

impl Code {
    /// The source of the component, in words.
    pub fn source(&self) -> String {
        self.installed.clone().unwrap_or_else(|| "the config".to_owned())
    }
}

/// A plugin as read from the store.
#[derive(Debug)]
pub struct Stored {
    /// The row.
    pub row: Row,
    /// The cursor.
    pub cursor: Offset,
    /// The context as of the cursor.
    pub context: EntryContext,
    /// An empty set of effects, with the plugin's timers and the size of its state.
    pub effects: Effects,
}

/// The row of a plugin that is loaded with a component. A new plugin has no number yet.
pub fn entered(known: Option<Row>, code: Code) -> Row {
    let Some(known) = known else {
        return Row {
            // A placeholder: the first number that is assigned is 1.
            id: PluginId(0),
            code,
            state_version: None,
            generation: Generation(1),
            standing: Standing::Runs,
            rates: Rates::default(),
            setup: Setup::default(),
            claim: Claim::default(),
            pending: None,
            quarantine: None,
            follows: None,
        };
    };
    let same = known.code.digest == code.digest;
    let generation = if same { known.generation } else { known.generation.next() };
    let rates = if same { known.rates } else { Rates::default() };
    let quarantine = known.quarantine.filter(|_| same);
    // The waiting component was to follow the code that ran before.
    let pending = known.pending.filter(|pending| same && pending.digest != code.digest);
    Row { code, generation, rates, quarantine, pending, ..known }
}

/// Writes the row of a plugin. A plugin without a number gets the next one, and a cursor at `head`.
pub fn enter(
    write: &WriteTransaction,
    name: &PluginName,
    mut row: Row,
    head: Offset,
) -> Result<(), StoreError> {
    if row.id == PluginId(0) {
        let number = u32::try_from(crate::next_numbers(write, "plugins", 1)?);
        let number = number.map_err(|_| StoreError::corrupt("plugins", "their numbers are used up"))?;
        row.id = PluginId(number);
        write.open_table(CURSORS)?.insert(number, (head.0, 0))?;
    }
    put_within(write, name, &row)
}

/// The row of a plugin, if there is one.
pub fn known_row(snapshot: &Snapshot, name: &PluginName) -> Result<Option<Row>, StoreError> {
    row(&snapshot.table(PLUGINS)?, name)
}

/// Deletes the data of a plugin except its names, its waiting publishes and the source of its component. If it
/// is installed again it is new.
pub fn purge(write: &WriteTransaction, name: &PluginName, row: Row) -> Result<(), StoreError> {
    let id = row.id;
    let (from, to) = (StateKey::new(id, b""), StateKey::new(PluginId(id.0 + 1), b""));
    write.open_table(STATE)?.retain_in(from.as_bytes()..to.as_bytes(), |_, _| false)?;
    write.open_table(TIMERS)?.retain_in(from.as_bytes()..to.as_bytes(), |_, _| false)?;
    write.open_table(WORLDS)?.remove(id.0)?;
    write.open_table(CURSORS)?.remove(id.0)?;
    put_within(
        write,
        name,
        &Row {
            id: PluginId(0),
            state_version: None,
            setup: Setup::default(),
            pending: None,
            quarantine: None,
            ..row
        },
    )
}

/// The number and the cursor of a plugin, if there is one.
pub fn known(snapshot: &Snapshot, name: &PluginName) -> Result<Option<(PluginId, Offset)>, StoreError> {
    let Some(row) = row(&snapshot.table(PLUGINS)?, name)? else { return Ok(None) };
    let cursor = snapshot.table(CURSORS)?.get(row.id.0)?.map(|cursor| cursor.value().0);
    Ok(cursor.map(|cursor| (row.id, Offset(cursor))))
}

/// The plugin with the lowest cursor among these, and the cursor.
pub fn furthest_behind<'a>(
    snapshot: &Snapshot,
    names: impl IntoIterator<Item = &'a PluginName>,
) -> Result<Option<(Offset, &'a PluginName)>, StoreError> {
    let mut least = None;
    for name in names {
        if let Some((_, cursor)) = known(snapshot, name)?
            && least.is_none_or(|(before, _)| cursor < before)
        {
            least = Some((cursor, name));
        }
    }
    Ok(least)
}

fn stored(store: &Store, name: &PluginName, row: Row) -> Result<Stored, StoreError> {
    let snapshot = store.snapshot()?;
    let id = row.id;
    let cursor = snapshot.table(CURSORS)?.get(id.0)?.map(|cursor| cursor.value());
    let (cursor, size) = cursor.ok_or_else(|| StoreError::corrupt("cursors", format!("{name} has none")))?;
    let cursor = Offset(cursor);
    let context = match snapshot.table(WORLDS)?.get(id.0)? {
        Some(bytes) => EntryContext::from_bytes(bytes.value())?,
        None => EntryContext::default(),
    };
    let timers = timers(&snapshot, id)?;
    let batch = Batch::new(name.clone(), id, row.generation, 1, cursor);
    Ok(Stored { row, cursor, context, effects: Effects::new(batch, timers, size) })
}

/// The timers of a plugin that are set.
pub fn timers(snapshot: &Snapshot, id: PluginId) -> Result<Timers, StoreError> {
    let mut timers = Timers::default();
    let prefix = StateKey::new(id, b"");
    for stored in snapshot.table(TIMERS)?.range(prefix.as_bytes()..)? {
        let (key, at) = stored?;
        let Some(key) = StateKey::strip(id, key.value()) else { break };
        timers.put(&String::from_utf8_lossy(key), Some(Timestamp(at.value())));
    }
    Ok(timers)
}

fn row(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    name: &PluginName,
) -> Result<Option<Row>, StoreError> {
    let Some(bytes) = table.get(name.as_str())? else { return Ok(None) };
    let row = serde_json::from_slice(bytes.value()).map_err(|error| StoreError::corrupt("plugins", error))?;
    Ok(Some(row))
}

fn put_row(
    table: &mut Table<'_, &'static str, &'static [u8]>,
    name: &PluginName,
    row: &Row,
) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec(row).expect("a row is plain data");
    table.insert(name.as_str(), bytes.as_slice())?;
    Ok(())
}

/// The committed row, cursor, context and timers of a plugin.
pub fn read(store: &Store, name: &PluginName) -> Result<Option<Stored>, StoreError> {
    match row(&store.snapshot()?.table(PLUGINS)?, name)?.filter(|row| row.id != PluginId(0)) {
        Some(row) => stored(store, name, row).map(Some),
        None => Ok(None),
    }
}

/// The rows of all plugins.
pub fn rows(snapshot: &Snapshot) -> Result<BTreeMap<PluginName, Row>, StoreError> {
    let mut rows = BTreeMap::new();
    for entry in snapshot.table(PLUGINS)?.iter()? {
        let (name, bytes) = entry?;
        let name = name.value().parse().map_err(|error| StoreError::corrupt("plugins", error))?;
        let row =
            serde_json::from_slice(bytes.value()).map_err(|error| StoreError::corrupt("plugins", error))?;
        rows.insert(name, row);
    }
    Ok(rows)
}

/// The plugins whose component was installed while a host ran.
pub fn installed(snapshot: &Snapshot) -> Result<BTreeMap<PluginName, Code>, StoreError> {
    let rows = rows(snapshot)?.into_iter();
    let installed = rows.filter(|(_, row)| row.code.installed.is_some());
    Ok(installed.map(|(name, row)| (name, row.code)).collect())
}

/// The row of a plugin within the transaction of the commit.
pub fn row_within(write: &WriteTransaction, name: &PluginName) -> Result<Row, StoreError> {
    let row = row(&write.open_table(PLUGINS)?, name)?;
    row.ok_or_else(|| StoreError::corrupt("plugins", format!("{name} has no row")))
}

/// The number of a plugin, within the transaction of the commit; `None` if it has no row.
pub fn id_within(write: &WriteTransaction, name: &PluginName) -> Result<Option<PluginId>, StoreError> {
    Ok(row(&write.open_table(PLUGINS)?, name)?.map(|row| row.id))
}

/// Writes the row of a plugin.
pub fn put_within(write: &WriteTransaction, name: &PluginName, row: &Row) -> Result<(), StoreError> {
    put_row(&mut write.open_table(PLUGINS)?, name, row)
}

/// Writes the measurements of a plugin's code.
pub fn set_rates(write: &WriteTransaction, name: &PluginName, rates: Rates) -> Result<(), StoreError> {
    let row = row_within(write, name)?;
    put_within(write, name, &Row { rates, ..row })
}

/// Writes the state version after a start.
pub fn set_state_version(
    table: &mut Table<'_, &'static str, &'static [u8]>,
    name: &PluginName,
    version: u32,
) -> Result<(), StoreError> {
    if let Some(mut row) = row(table, name)? {
        row.state_version = Some(version);
        put_row(table, name, &row)?;
    }
    Ok(())
}
