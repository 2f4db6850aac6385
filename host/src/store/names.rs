//! Owns the rows of the host's own names: the value that was committed last, and what the backend
//! has accepted of it. Whose record stands under a name is `ownership`'s.

mod ownership;

use cid::Cid;
use redb::{ReadableTable, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::{NAMES, Snapshot, StoreError, documents, pins};
use crate::backend::Keeper;
use crate::effect::{NameUpdate, NameValue};
use crate::entry::Resolution;
use crate::ident::{ContentPath, IpnsName, KeyName};
use crate::time::{Timestamp, nanoseconds};

pub use ownership::{
    Cause, Finding, Hold, KeyUse, attempt, find, hold, hold_without_record, lose, release, take_over,
};

/// One of the host's names, as it was committed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Known {
    /// What it points to.
    pub path: ContentPath,
    /// Counts the values.
    pub sequence: u64,
    /// How long a record is valid, in nanoseconds.
    pub lifetime: u64,
    /// When it got this value, in nanoseconds since 1970.
    pub since: u64,
    /// Since when there is a value that the backend has not accepted, in nanoseconds since 1970: newer values do not
    /// change it. Absent: since the name got its value, or it does not wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<u64>,
    /// Bytes of the document, if the host holds it.
    pub document: Option<u64>,
    /// What the backend last accepted.
    pub published: Option<Accepted>,
    /// What was sent to the backend since, and may have been accepted without the host hearing of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attempts: Vec<ContentPath>,
    /// Whether the operator has had the host publish under an adopted key although there was no record of it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub claimed: bool,
    /// Why nothing is published under the name until the operator decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<Hold>,
}

/// What the backend accepted of a name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accepted {
    /// What the record points to.
    pub path: ContentPath,
    /// Whether its document was stored by the host and is held for those who read the record.
    pub is_held: bool,
    /// The count of the value.
    pub of: u64,
    /// The record's sequence.
    pub sequence: u64,
    /// When, in nanoseconds since 1970.
    pub at: u64,
    /// How long the record is valid, in nanoseconds.
    pub lifetime: u64,
    /// The signed record, where the host signs it.
    #[serde(default)]
    pub record: Option<Vec<u8>>,
    /// Who has accepted it. None if a host before 0.1.1 has noted it, or the keeper has lost it since.
    #[serde(default)]
    pub by: Option<Keeper>,
    /// The record's sequence as of the backup that the host was restored from; its own is higher since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backed_up: Option<u64>,
}

impl Accepted {
    /// The document that the host stored for it.
    pub fn document(&self) -> Option<Cid> {
        self.path.ipfs().map(|(cid, _)| cid).filter(|_| self.is_held)
    }

    /// Until when the record is valid.
    pub fn valid_until(&self) -> Timestamp {
        Timestamp(self.at.saturating_add(self.lifetime))
    }

    /// Whether it should have been signed anew a while ago.
    pub fn is_nearly_over(&self, now: Timestamp) -> bool {
        now.0 >= self.at.saturating_add(self.lifetime / 4 * 3)
    }

    /// When it must be signed anew: at half of its lifetime.
    fn renew_at(&self) -> Timestamp {
        Timestamp(self.at.saturating_add(self.lifetime / 2))
    }
}

impl Known {
    /// What plugins and the API are told.
    pub fn resolution(&self, name: IpnsName) -> Resolution {
        let published = self.published.as_ref();
        Resolution {
            name,
            path: self.path.clone(),
            sequence: self.sequence,
            valid_until: published.map_or(Timestamp(0), Accepted::valid_until),
            confirmed_at: Timestamp(published.map_or(0, |accepted| accepted.at)),
        }
    }

    /// Whether the backend has the newest value.
    pub fn is_published(&self) -> bool {
        self.published.as_ref().is_some_and(|accepted| accepted.of == self.sequence)
    }

    /// Whether there is a newer value than the backend has, and nothing keeps it from being published.
    pub fn is_waiting(&self) -> bool {
        !self.is_published() && self.hold.is_none()
    }

    /// Since when there is a value that the backend has not accepted; none if there is none.
    pub fn waiting_since(&self) -> Option<Timestamp> {
        (!self.is_published()).then(|| Timestamp(self.waiting.unwrap_or(self.since)))
    }

    /// The record that the host signed.
    pub fn record(&self) -> Option<&[u8]> {
        self.published.as_ref()?.record.as_deref()
    }

    /// When the name must be published: at once if the backend has not the newest value with the
    /// lifetime that was asked for, and again at half of that. Never while it is on hold.
    pub fn due_at(&self) -> Timestamp {
        match &self.published {
            _ if self.hold.is_some() => Timestamp(u64::MAX),
            Some(accepted) if accepted.of == self.sequence && accepted.lifetime == self.lifetime => {
                accepted.renew_at()
            }
            _ => Timestamp(0),
        }
    }

    /// What the name points to, and what the backend has or may have of it.
    fn paths(&self) -> impl Iterator<Item = &ContentPath> {
        [&self.path].into_iter().chain(self.published.as_ref().map(|it| &it.path)).chain(&self.attempts)
    }

    fn document_cid(&self) -> Option<Cid> {
        self.path.ipfs().map(|(cid, _)| cid).filter(|_| self.document.is_some())
    }
}

/// A name that has a new value.
#[derive(Debug)]
pub struct Changed {
    /// What followers are told.
    pub resolution: Resolution,
    /// The document that it pointed to before; the caller passes the hold on to the log.
    pub superseded: Option<Cid>,
}

/// Gives a name a new value at `now`, in the transaction of the commit; none if it has this value
/// already.
pub fn set(
    write: &WriteTransaction,
    key: &KeyName,
    update: &NameUpdate,
    now: Timestamp,
) -> Result<Option<Changed>, StoreError> {
    let before = read(&write.open_table(NAMES)?, key)?;
    let path = update.value.path();
    let lifetime = nanoseconds(update.lifetime);
    let is_path = matches!(update.value, NameValue::Path(_));
    // A file that the name pointed to already, but that the host does not hold, is news.
    let has_it = |known: &&Known| known.path == path && (is_path || known.document.is_some());
    if let Some(known) = before.as_ref().filter(has_it) {
        // Of two records with one sequence the one that is valid for longer counts.
        let sequence = known.sequence + u64::from(lifetime < known.lifetime);
        let waiting = Some(known.waiting_since().unwrap_or(now).0);
        put(write, key, &Known { lifetime, sequence, waiting, ..known.clone() })?;
        return Ok(None);
    }
    let document = match &update.value {
        NameValue::Document { cid, data } => {
            documents::keep(write, cid, data)?;
            Some(data.len() as u64)
        }
        NameValue::Path(_) => None,
    };
    let superseded = before.as_ref().and_then(Known::document_cid);
    let sequence = before.as_ref().map_or(1, |known| known.sequence + 1);
    let waiting = Some(before.as_ref().and_then(Known::waiting_since).unwrap_or(now).0);
    let (published, attempts, hold, claimed) = before
        .map_or_else(Default::default, |known| (known.published, known.attempts, known.hold, known.claimed));
    let since = now.0;
    let known =
        Known { path, sequence, lifetime, since, waiting, document, published, attempts, claimed, hold };
    put(write, key, &known)?;
    Ok(Some(Changed { resolution: known.resolution(update.name.clone()), superseded }))
}

/// Gives a name back the value `before`, whose document is held for it, if the value that it has is still the
/// one that counts `last`; returns what its followers are told, if it has changed.
pub fn restore(
    write: &WriteTransaction,
    key: &KeyName,
    (name, before): (IpnsName, Option<Known>),
    last: u64,
    now: Timestamp,
) -> Result<Option<Changed>, StoreError> {
    let Some(known) = read(&write.open_table(NAMES)?, key)? else { return Ok(None) };
    let Some(before) = before else {
        // There is no way to publish that a name has no value; what nobody has seen goes.
        if known.sequence == last && known.published.is_none() {
            release_document(write, &known)?;
            write.open_table(NAMES)?.remove(key.as_str())?;
        }
        return Ok(None);
    };
    if known.sequence != last || known.path == before.path {
        release_document(write, &before)?;
        return Ok(None);
    }
    let superseded = known.document_cid();
    let sequence = known.sequence + 1;
    let waiting = Some(known.waiting_since().unwrap_or(now).0);
    let Known { published, attempts, hold, claimed, .. } = known;
    let known = Known { sequence, since: now.0, waiting, published, attempts, hold, claimed, ..before };
    put(write, key, &known)?;
    Ok(Some(Changed { resolution: known.resolution(name), superseded }))
}

/// Holds the document of a name once more.
pub fn hold_document(write: &WriteTransaction, known: &Known) -> Result<(), StoreError> {
    known.document_cid().map_or(Ok(()), |cid| documents::hold(write, &cid).map(drop))
}

/// Lets go of the document of a name once.
pub fn release_document(write: &WriteTransaction, known: &Known) -> Result<(), StoreError> {
    known.document_cid().map_or(Ok(()), |cid| documents::release(write, &cid))
}

/// Forgets a name: its value, what was accepted of it and its hold. What the backend has of it stays as it is, pinned
/// and published.
pub fn forget(write: &WriteTransaction, key: &KeyName) -> Result<(), StoreError> {
    let Some(known) = read(&write.open_table(NAMES)?, key)? else { return Ok(()) };
    release_document(write, &known)?;
    if let Some(cid) = known.published.as_ref().and_then(Accepted::document) {
        documents::release(write, &cid)?;
    }
    write.open_table(NAMES)?.remove(key.as_str())?;
    let others = rows(&write.open_table(NAMES)?)?;
    let is_of_another =
        |path: &ContentPath| others.iter().any(|(_, other)| other.paths().any(|it| it == path));
    // What is noted and no name points to would be unpinned.
    for path in known.paths().filter(|path| !is_of_another(path)) {
        if let Some((cid, _)) = path.ipfs() {
            pins::forget(write, &cid)?;
        }
    }
    Ok(())
}

/// Notes that the backend has a value, whose document is held for those who read the record.
pub fn accept(write: &WriteTransaction, key: &KeyName, accepted: Accepted) -> Result<(), StoreError> {
    let Some(known) = read(&write.open_table(NAMES)?, key)? else { return Ok(()) };
    let is_held = match accepted.document() {
        Some(cid) => documents::hold(write, &cid)?,
        None => false,
    };
    if let Some(before) = known.published.as_ref().and_then(Accepted::document) {
        documents::release(write, &before)?;
    }
    let waiting = match accepted.of {
        of if of == known.sequence => None,
        // It stands for no value of the host.
        0 => known.waiting,
        // What was committed while this was published.
        _ => Some(known.since),
    };
    let published = Some(Accepted { is_held, ..accepted });
    put(write, key, &Known { published, waiting, attempts: Vec::new(), claimed: false, ..known })
}

/// After a restore from a backup: others may have seen records that are newer than what the backup knows
/// of. The value that it has is published again, with a sequence that is higher than theirs.
pub fn overtake(write: &WriteTransaction) -> Result<(), StoreError> {
    let all = rows(&write.open_table(NAMES)?)?;
    for (key, mut known) in all {
        if let Some(accepted) = &mut known.published {
            (accepted.of, accepted.by) = (0, None);
            accepted.backed_up.get_or_insert(accepted.sequence);
            accepted.sequence = accepted.sequence.saturating_add(OVERTAKING);
            known.waiting = Some(Timestamp::wall().0);
        }
        put(write, &key, &known)?;
    }
    Ok(())
}

/// More records than a host publishes of one name within years.
const OVERTAKING: u64 = 1 << 32;

/// What is committed under a key.
pub fn known(snapshot: &Snapshot, key: &KeyName) -> Result<Option<Known>, StoreError> {
    read(&snapshot.table(NAMES)?, key)
}

/// What is committed under a key by now, within the transaction of the commit.
pub fn known_within(write: &WriteTransaction, key: &KeyName) -> Result<Option<Known>, StoreError> {
    read(&write.open_table(NAMES)?, key)
}

/// Everything that is committed under keys.
pub fn all(snapshot: &Snapshot) -> Result<Vec<(KeyName, Known)>, StoreError> {
    rows(&snapshot.table(NAMES)?)
}

fn rows(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
) -> Result<Vec<(KeyName, Known)>, StoreError> {
    table
        .iter()?
        .map(|row| {
            let (key, known) = row?;
            let key = key.value().parse().map_err(|error| StoreError::corrupt("names", error))?;
            Ok((key, decode(known.value())?))
        })
        .collect()
}

fn read(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    key: &KeyName,
) -> Result<Option<Known>, StoreError> {
    table.get(key.as_str())?.map(|row| decode(row.value())).transpose()
}

fn decode(bytes: &[u8]) -> Result<Known, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::corrupt("names", error))
}

fn put(write: &WriteTransaction, key: &KeyName, known: &Known) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec(known).expect("a name is plain data");
    write.open_table(NAMES)?.insert(key.as_str(), bytes.as_slice())?;
    Ok(())
}
