//! Owns the rows of the plugins in the store: which there are, their numbers and versions.

use std::collections::{BTreeMap, BTreeSet};

use redb::{ReadableTable, Table, WriteTransaction};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Batch, Effects, Grants, Rates, Reach, Timers, World};
use crate::change::Version;
use crate::entry::{Generation, Offset};
use crate::ident::{KeyName, PluginName};
use crate::signing::Signer;
use crate::store::{
    self, CURSORS, PLUGINS, PluginId, STATE, Snapshot, StateKey, Store, StoreError, TIMERS, WORLDS,
};
use crate::time::Timestamp;

/// What the store knows of a plugin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Its number in keys.
    pub id: PluginId,
    /// The component that ran last.
    #[serde(flatten)]
    pub code: Code,
    /// The version of its state's layout; none before its first start.
    pub state_version: Option<u32>,
    /// Counts the codes that it has run.
    #[serde(default)]
    pub generation: Generation,
    /// Whether it is to run.
    #[serde(default)]
    pub standing: Standing,
    /// What its code has handled since it was confirmed, as of a while ago: what new code is measured against.
    #[serde(default)]
    pub rates: Rates,
    /// What it was given and denied beside what the config says.
    #[serde(default, skip_serializing_if = "Setup::is_empty")]
    pub setup: Setup,
    /// The keys that are its own.
    #[serde(default)]
    pub claim: Claim,
    /// A component that waits until it is granted what it asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<Pending>,
    /// Why it is not started until it is resumed or has other code, if it has failed too often.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quarantine: Option<Quarantine>,
    /// The file or the IPNS name that its component comes from; when that changes, it is replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub follows: Option<String>,
}

/// Whether a plugin is to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// It is.
    #[default]
    Runs,
    /// It is loaded and handles nothing until it is resumed.
    Paused,
    /// It is not loaded; what it has is kept.
    Removed,
}

/// What the operator gave a plugin and denied it while a host ran. It goes with the plugin's name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Setup {
    /// What it may reach beside what the config grants.
    #[serde(alias = "grants")]
    pub granted: Grants,
    /// What it may not reach, whoever grants it.
    pub denied: Grants,
    /// Who has signed the code that this is for; none if nobody has, and then it is for any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signer: Option<Signer>,
}

impl Setup {
    /// Grants what is asked for, but for what was denied: only who names it lifts that.
    pub fn grant_all(&mut self, asks: &Grants) {
        let mut open = asks.clone();
        open.take(&self.denied);
        self.granted.add(&open);
    }

    /// What of these grants is denied, in words.
    pub fn denied_of(&self, grants: &Grants) -> Vec<String> {
        Reach { granted: grants.clone(), denied: self.denied.clone() }.missing(grants)
    }

    /// Whether it is for code that `signer` has signed.
    pub fn is_for(&self, signer: Option<&Signer>) -> bool {
        self.signer.is_none() || self.signer.as_ref() == signer
    }

    /// What code is given and denied that `signer` has signed.
    pub fn of(&self, signer: Option<&Signer>) -> Self {
        let granted = if self.is_for(signer) { self.granted.clone() } else { Grants::default() };
        Self { granted, ..self.clone() }
    }

    /// What code has that goes on again, which had `before` then: what goes with its signer still, or what it had;
    /// and what was denied since is denied to it.
    pub fn going_back(&self, before: &Self) -> Self {
        if self.is_for(before.signer.as_ref()) {
            return Self { signer: before.signer.clone(), ..self.clone() };
        }
        Self { denied: self.denied.clone(), ..before.clone() }
    }

    /// Whether nothing was given or denied.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The keys that a plugin writes under. No other does, unless both share the key.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Claim {
    /// The keys.
    pub keys: BTreeSet<KeyName>,
    /// Those of which another plugin may have the same.
    pub shared: BTreeSet<KeyName>,
}

impl Claim {
    /// What a plugin claims that may reach so much.
    pub fn of(reach: &Reach) -> Self {
        Self { keys: reach.writes().cloned().collect(), shared: reach.shares().cloned().collect() }
    }

    /// What both claim.
    pub fn and(mut self, other: Self) -> Self {
        self.keys.extend(other.keys);
        self.shared.extend(other.shared);
        self
    }

    /// The first key that two plugins would have by accident.
    pub fn conflict<'a>(&'a self, other: &'a Self) -> Option<&'a KeyName> {
        let is_shared = |key: &KeyName| self.shared.contains(key) && other.shared.contains(key);
        self.keys.intersection(&other.keys).find(|key| !is_shared(key))
    }
}

/// Why a plugin is not started any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantine {
    /// Why it did not start last.
    pub reason: String,
    /// Since when.
    pub since: Timestamp,
}

/// A component that waits until it is granted what it asks for; it lies in the store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Pending {
    /// Its version.
    pub version: String,
    /// Its digest, in hex.
    pub digest: String,
    /// Where it came from; of a URL without what may be a secret.
    #[serde(serialize_with = "crate::change::shown")]
    pub source: String,
    /// Who asked for it.
    pub by: String,
    /// Since when it waits.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
    /// What it asks for that the plugin is not granted, in words.
    pub missing: Vec<String>,
    /// Who has signed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub signer: Option<Signer>,
    /// What is followed once it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub follows: Option<String>,
}

impl Row {
    /// What is told of it.
    pub fn as_version(&self) -> Version {
        let Code { version, digest, .. } = self.code.clone();
        Version { version, digest, state_version: self.state_version }
    }
}

/// Which component a plugin runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Code {
    /// Its version.
    pub version: String,
    /// Its digest, in hex.
    pub digest: String,
    /// Where it was installed from, if it was while the host ran: then it lies in the store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub installed: Option<String>,
}

impl Code {
    /// Where it came from.
    pub fn source(&self) -> String {
        self.installed.clone().unwrap_or_else(|| "the config".to_owned())
    }
}

/// A plugin as it stands in the store.
#[derive(Debug)]
pub struct Stored {
    /// Its row.
    pub row: Row,
    /// The next entry that it will read.
    pub cursor: Offset,
    /// Its world as of the cursor.
    pub world: World,
    /// Its effects: none, on top of its timers and the size of its state.
    pub effects: Effects,
}

/// The row of a plugin that is loaded with a component; one that was not known has no number yet.
pub fn entered(known: Option<Row>, code: Code) -> Row {
    let Some(known) = known else {
        return Row {
            // The first number that is given is 1.
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
    // What waited was meant to go on after what ran.
    let pending = known.pending.filter(|pending| same && pending.digest != code.digest);
    Row { code, generation, rates, quarantine, pending, ..known }
}

/// Writes the row of a plugin; one without a number gets the next one, and starts at `head`.
pub fn enter(
    write: &WriteTransaction,
    name: &PluginName,
    mut row: Row,
    head: Offset,
) -> Result<(), StoreError> {
    if row.id == PluginId(0) {
        let number = u32::try_from(store::next_numbers(write, "plugins", 1)?);
        let number = number.map_err(|_| StoreError::corrupt("plugins", "their numbers are used up"))?;
        row.id = PluginId(number);
        write.open_table(CURSORS)?.insert(number, (head.0, 0))?;
    }
    put_within(write, name, &row)
}

/// The row of a plugin, if it was ever entered.
pub fn known_row(snapshot: &Snapshot, name: &PluginName) -> Result<Option<Row>, StoreError> {
    row(&snapshot.table(PLUGINS)?, name)
}

/// Forgets all that a plugin has, but for its names, what waits to be sent and where it came from. If it comes
/// again it is new.
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

/// The number and the cursor of a plugin, if it was ever entered.
pub fn known(snapshot: &Snapshot, name: &PluginName) -> Result<Option<(PluginId, Offset)>, StoreError> {
    let Some(row) = row(&snapshot.table(PLUGINS)?, name)? else { return Ok(None) };
    let cursor = snapshot.table(CURSORS)?.get(row.id.0)?.map(|cursor| cursor.value().0);
    Ok(cursor.map(|cursor| (row.id, Offset(cursor))))
}

/// Which of these plugins has read least of the log, and how far.
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
    let world = match snapshot.table(WORLDS)?.get(id.0)? {
        Some(bytes) => World::from_bytes(bytes.value())?,
        None => World::default(),
    };
    let mut timers = Timers::default();
    let prefix = StateKey::new(id, b"");
    for stored in snapshot.table(TIMERS)?.range(prefix.as_bytes()..)? {
        let (key, at) = stored?;
        let Some(key) = StateKey::strip(id, key.value()) else { break };
        timers.put(&String::from_utf8_lossy(key), Some(Timestamp(at.value())));
    }
    let batch = Batch::new(name.clone(), id, row.generation, 1, cursor);
    Ok(Stored { row, cursor, world, effects: Effects::new(batch, timers, size) })
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

/// What the store knows of a plugin, as of what is committed.
pub fn read(store: &Store, name: &PluginName) -> Result<Option<Stored>, StoreError> {
    match row(&store.snapshot()?.table(PLUGINS)?, name)?.filter(|row| row.id != PluginId(0)) {
        Some(row) => stored(store, name, row).map(Some),
        None => Ok(None),
    }
}

/// All plugins that were ever entered.
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

/// What the store knows of a plugin by now, within the transaction of the commit.
pub fn row_within(write: &WriteTransaction, name: &PluginName) -> Result<Row, StoreError> {
    let row = row(&write.open_table(PLUGINS)?, name)?;
    row.ok_or_else(|| StoreError::corrupt("plugins", format!("{name} has no row")))
}

/// Notes what is known of a plugin from now on.
pub fn put_within(write: &WriteTransaction, name: &PluginName, row: &Row) -> Result<(), StoreError> {
    put_row(&mut write.open_table(PLUGINS)?, name, row)
}

/// Notes what a plugin's code has handled.
pub fn set_rates(write: &WriteTransaction, name: &PluginName, rates: Rates) -> Result<(), StoreError> {
    let row = row_within(write, name)?;
    put_within(write, name, &Row { rates, ..row })
}

/// Notes the version of the state's layout after a start.
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
