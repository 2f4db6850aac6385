//! Owns dead letters: events that a plugin could not handle, set aside with the reason and the
//! plugin's log, to be listed, replayed or dropped by the operator.

use serde::{Deserialize, Serialize};

use crate::commit::{Commit, CommitError};
use crate::ident::PluginName;
use crate::log::{Event, Kind, Offset};
use crate::store::{DEAD, Store, StoreError};

/// How many letters are kept; beyond it the oldest go, with a warning.
pub const MAX_LETTERS: u64 = 10_000;

/// Held while a letter is replayed or dropped.
static TAKING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// An event that was set aside.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeadLetter {
    /// Which plugin could not handle it.
    pub plugin: PluginName,
    /// The plugin's version.
    pub version: String,
    /// The entry that the event came from.
    pub offset: u64,
    /// The time of the entry that set it aside, in nanoseconds since 1970.
    pub time: u64,
    /// How often it was tried.
    pub attempts: u32,
    /// Why it was set aside.
    pub reason: String,
    /// What the plugin logged meanwhile.
    pub log: Vec<String>,
    /// The event, in the form of the log.
    #[serde(with = "base64url")]
    pub event: Vec<u8>,
}

impl DeadLetter {
    /// The event.
    pub fn event(&self) -> Result<Event, StoreError> {
        Event::from_bytes(&self.event)
    }

    /// The stored form.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a dead letter is plain data")
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, StoreError> {
        serde_json::from_slice(bytes).map_err(|error| StoreError::corrupt("dead letter", error))
    }
}

/// The dead letters from `after` on, at most `limit`, those of `plugin` if it is given.
pub fn list(
    store: &Store,
    plugin: Option<&PluginName>,
    after: Option<u64>,
    limit: usize,
) -> Result<Vec<(u64, DeadLetter)>, StoreError> {
    let table = store.snapshot()?.table(DEAD)?;
    let mut letters = Vec::new();
    for row in table.range(after.map_or(0, |id| id.saturating_add(1))..)? {
        let (id, bytes) = row?;
        let letter = DeadLetter::from_bytes(bytes.value())?;
        if plugin.is_none_or(|name| *name == letter.plugin) {
            letters.push((id.value(), letter));
        }
        if letters.len() == limit {
            break;
        }
    }
    Ok(letters)
}

/// One dead letter.
pub fn get(store: &Store, id: u64) -> Result<Option<DeadLetter>, StoreError> {
    let table = store.snapshot()?.table(DEAD)?;
    let Some(bytes) = table.get(id)? else { return Ok(None) };
    DeadLetter::from_bytes(bytes.value()).map(Some)
}

/// How many dead letters there are.
pub fn count(store: &Store) -> Result<u64, StoreError> {
    use redb::ReadableTableMetadata as _;
    Ok(store.snapshot()?.table(DEAD)?.len()?)
}

/// Gives a dead letter's event to its plugin again, in place of the letter.
/// Returns false if there is no such letter.
pub async fn replay(store: &Store, commit: &Commit, id: u64) -> Result<bool, CommitError> {
    // Each letter is taken once, however many ask at the same time.
    let _turn = TAKING.lock().await;
    let Some(letter) = get(store, id)? else { return Ok(false) };
    let event = letter.event()?;
    let again = Kind::Again { plugin: letter.plugin, attempt: 0, first: Offset(letter.offset), event };
    commit.append_and_write(vec![again], move |write| Ok(write.open_table(DEAD)?.remove(id)?.is_some())).await
}

/// Forgets a dead letter. Returns false if there is no such letter.
pub async fn drop_letter(commit: &Commit, id: u64) -> Result<bool, CommitError> {
    let _turn = TAKING.lock().await;
    commit.write(move |write| Ok(write.open_table(DEAD)?.remove(id)?.is_some())).await
}

/// Bytes in JSON as base64url without padding.
mod base64url {
    use multibase::Base;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&Base::Base64Url.encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        Base::Base64Url.decode(text).map_err(D::Error::custom)
    }
}
