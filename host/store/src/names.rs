//! Owns the rows of the host's own names: the value that was committed last, and the value that the backend
//! accepted last. `ownership` decides whether a published record is the host's own.

mod ownership;

use cid::Cid;
use dim_ipfs::Keeper;
use dim_model::entry::Resolution;
use dim_model::ident::{ContentPath, GroupName, IpnsName, KeyName};
use dim_model::time::{Timestamp, nanoseconds};
use redb::{ReadableTable, WriteTransaction};
use serde::{Deserialize, Serialize};

use crate::effect::{NameUpdate, NameValue};
use crate::{NAMES, Snapshot, StoreError, documents, pins};

pub use ownership::{
    Cause, Finding, ForeignValue, Hold, KeyUse, attempt, find, hold, hold_without_record, lose, release,
    take_over,
};

/// The committed state of an own name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Known {
    /// The path that the name points to.
    pub path: ContentPath,
    /// The number of the value; each new value increments it.
    pub sequence: u64,
    /// The lifetime of a record, in nanoseconds.
    pub lifetime: u64,
    /// The time at which the name got this value, in nanoseconds since 1970.
    pub since: u64,
    /// The time since which a value waits for the backend, in nanoseconds since 1970; newer values do not
    /// change it. Absent if the name waits since `since`, or does not wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<u64>,
    /// The size of the document in bytes, if the host stores it.
    pub document: Option<u64>,
    /// The value that the backend accepted last.
    pub published: Option<Accepted>,
    /// Values sent to the backend since, which it may have accepted without a confirmation to the host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attempts: Vec<ContentPath>,
    /// Whether the operator has let the host publish under an adopted key although it had no record.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub claimed: bool,
    /// The hold under which nothing is published until the operator decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<Hold>,
}

/// The value of a name that the backend accepted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accepted {
    /// The path in the record.
    pub path: ContentPath,
    /// Whether the host stored the document, and keeps it for readers of the record.
    pub is_held: bool,
    /// The number of the value, as in [`Known::sequence`]; 0 for no value of the host.
    pub of: u64,
    /// The sequence number of the record.
    pub sequence: u64,
    /// The time of the acceptance, in nanoseconds since 1970.
    pub at: u64,
    /// The lifetime of the record, in nanoseconds.
    pub lifetime: u64,
    /// The signed record, if the host signs it.
    #[serde(default)]
    pub record: Option<Vec<u8>>,
    /// The keeper that accepted it. `None` if a host before 0.1.1 has written the row, or the keeper has lost
    /// the record since.
    #[serde(default)]
    pub by: Option<Keeper>,
    /// The sequence number of the record in the backup that the host was restored from; `sequence` is higher since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backed_up: Option<u64>,
    /// The encryption of the document, if the file at the path encrypts one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<Encryption>,
}

/// The encryption of a published document. The store keeps the document, not the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Encryption {
    /// The path that the document has without encryption.
    pub document: ContentPath,
    /// The fleet.
    #[serde(default)]
    pub fleet: String,
    /// The group that reads it.
    pub group: GroupName,
    /// The identity of the key epoch, in hexadecimal digits.
    pub epoch: String,
}

impl Accepted {
    /// The document that the host stored for the record.
    pub fn document(&self) -> Option<Cid> {
        let path = self.encryption.as_ref().map_or(&self.path, |it| &it.document);
        path.ipfs().map(|(cid, _)| cid).filter(|_| self.is_held)
    }

    /// The file that the daemon has for the record, if the host stored its document.
    pub fn file(&self) -> Option<Cid> {
        self.path.ipfs().map(|(cid, _)| cid).filter(|_| self.is_held)
    }

    /// The end of the record's validity.
    pub fn valid_until(&self) -> Timestamp {
        Timestamp(self.at.saturating_add(self.lifetime))
    }

    /// Whether the record is overdue for renewal: three quarters of its lifetime have passed.
    pub fn is_nearly_over(&self, now: Timestamp) -> bool {
        now.0 >= self.at.saturating_add(self.lifetime / 4 * 3)
    }

    /// The time of the next renewal: half of the record's lifetime.
    fn renew_at(&self) -> Timestamp {
        Timestamp(self.at.saturating_add(self.lifetime / 2))
    }
}

impl Known {
    /// The resolution for plugins and the API.
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

    /// The path that readers find under the name: the path in the record, once the backend has the newest value.
    pub fn visible_path(&self) -> &ContentPath {
        self.published
            .as_ref()
            .filter(|accepted| accepted.of == self.sequence)
            .map_or(&self.path, |it| &it.path)
    }

    /// The encryption of the document that readers find under the name.
    pub fn encryption(&self) -> Option<&Encryption> {
        self.published.as_ref()?.encryption.as_ref()
    }

    /// Whether the backend lacks the newest value, and no hold prevents the publication.
    pub fn is_waiting(&self) -> bool {
        !self.is_published() && self.hold.is_none()
    }

    /// The time since which a value waits for the backend; `None` if none waits.
    pub fn waiting_since(&self) -> Option<Timestamp> {
        (!self.is_published()).then(|| Timestamp(self.waiting.unwrap_or(self.since)))
    }

    /// The record that the host signed.
    pub fn record(&self) -> Option<&[u8]> {
        self.published.as_ref()?.record.as_deref()
    }

    /// The time at which the name must be published: at once if the backend lacks the newest value with the
    /// requested lifetime, and again at half of that lifetime. Never while the name is on hold.
    pub fn due_at(&self) -> Timestamp {
        match &self.published {
            _ if self.hold.is_some() => Timestamp(u64::MAX),
            Some(accepted) if accepted.of == self.sequence && accepted.lifetime == self.lifetime => {
                accepted.renew_at()
            }
            _ => Timestamp(0),
        }
    }

    /// Whether the published record must be renewed, whatever value the name has.
    pub fn is_record_due(&self, now: Timestamp) -> bool {
        self.published.as_ref().is_some_and(|it| it.of != 0 && it.renew_at() <= now)
    }

    /// The path of the name, and the paths that the backend has or may have.
    fn paths(&self) -> impl Iterator<Item = &ContentPath> {
        [&self.path].into_iter().chain(self.published.as_ref().map(|it| &it.path)).chain(&self.attempts)
    }

    fn document_cid(&self) -> Option<Cid> {
        self.path.ipfs().map(|(cid, _)| cid).filter(|_| self.document.is_some())
    }
}

/// A name with a new value.
#[derive(Debug)]
pub struct Changed {
    /// The resolution for followers.
    pub resolution: Resolution,
    /// The document that the name pointed to before. The caller passes its hold to the log.
    pub superseded: Option<Cid>,
}

/// Sets a new value of a name at `now`, in the transaction of the commit. Returns `None` if the name has this
/// value already.
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
    // A file that the name pointed to already, but that the host did not store, counts as a new value.
    let has_it = |known: &&Known| known.path == path && (is_path || known.document.is_some());
    if let Some(known) = before.as_ref().filter(has_it) {
        // Of two records with the same sequence number, readers prefer the one that is valid for longer.
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

/// Restores the value `before` of a name, whose document is held for this purpose, if the current value still
/// has the number `last`. Returns the change, if there is one.
pub fn restore(
    write: &WriteTransaction,
    key: &KeyName,
    (name, before): (IpnsName, Option<Known>),
    last: u64,
    now: Timestamp,
) -> Result<Option<Changed>, StoreError> {
    let Some(known) = read(&write.open_table(NAMES)?, key)? else { return Ok(None) };
    let Some(before) = before else {
        // A record cannot say that a name has no value. So the row is removed only if nothing was published.
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

/// Adds a hold on the document of a name.
pub fn hold_document(write: &WriteTransaction, known: &Known) -> Result<(), StoreError> {
    known.document_cid().map_or(Ok(()), |cid| documents::hold(write, &cid).map(drop))
}

/// Removes a hold on the document of a name.
pub fn release_document(write: &WriteTransaction, known: &Known) -> Result<(), StoreError> {
    known.document_cid().map_or(Ok(()), |cid| documents::release(write, &cid))
}

/// Removes the row of a name: its value, its accepted record and its hold. The backend keeps its record and its pins.
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
    // A recorded pin that no name points to would be removed from the backend.
    for path in known.paths().filter(|path| !is_of_another(path)) {
        if let Some((cid, _)) = path.ipfs() {
            pins::forget(write, &cid)?;
        }
    }
    Ok(())
}

/// Records that the backend has accepted a value, and holds its document for readers of the record.
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
        // The accepted record is no value of the host.
        0 => known.waiting,
        // The record of an earlier value was renewed.
        of if known.published.as_ref().is_some_and(|before| before.of == of) => known.waiting,
        // A newer value was committed while this one was published.
        _ => Some(known.since),
    };
    let published = Some(Accepted { is_held, ..accepted });
    put(write, key, &Known { published, waiting, attempts: Vec::new(), claimed: false, ..known })
}

/// Prepares all names after a restore from a backup. Other hosts may have seen records that are newer than
/// those in the backup, so the host publishes its values again with a higher sequence number.
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

/// More records than a host publishes under one name within years.
const OVERTAKING: u64 = 1 << 32;

/// The committed state of a key's name.
pub fn known(snapshot: &Snapshot, key: &KeyName) -> Result<Option<Known>, StoreError> {
    read(&snapshot.table(NAMES)?, key)
}

/// The state of a key's name within the transaction of the commit.
pub fn known_within(write: &WriteTransaction, key: &KeyName) -> Result<Option<Known>, StoreError> {
    read(&write.open_table(NAMES)?, key)
}

/// The committed states of all names.
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
