//! Owns the question whose record is published under an own name. It receives the published record and the row
//! of the name, and decides: the host's own record, a record on hold until the operator decides, or a record
//! that the backend has lost.

use dim_ipfs::Current;
use dim_model::ident::{ContentPath, IpnsName, KeyName};
use dim_model::time::Timestamp;
use redb::WriteTransaction;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Accepted, Changed, Encryption, Known, accept, put, read, set};
use crate::effect::NameUpdate;
use crate::{NAMES, StoreError};

/// A record under one of the host's names that the host has not published. The host publishes nothing over it
/// until the operator decides: it never replaces a publication of the fleet that it does not know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hold {
    /// The reason why the host does not know the record.
    pub cause: Cause,
    /// The path in the record; the name itself if there is no record.
    pub path: ContentPath,
    /// The sequence number of the record, if the backend shows it.
    pub sequence: Option<u64>,
    /// The time at which the record was found, in nanoseconds since 1970.
    pub since: u64,
    /// The time of the last change of the record that the host has seen, in nanoseconds since 1970.
    pub changed: u64,
}

impl Hold {
    /// Explains why the name is on hold and what the operator can do.
    pub fn explain(&self, key: &KeyName, used: KeyUse) -> String {
        let forget = format!("`dim ipns forget {key}` leaves it to others");
        let why = match self.cause {
            Cause::NeverPublished => "this host has never published under it",
            Cause::Restored => "it was published after the backup that this host was restored from",
            Cause::OtherWriter => "another writer has published it since",
            Cause::NoRecord => {
                let later = match used {
                    KeyUse::Importer => "then `import` is possible",
                    KeyUse::Publisher => "then the hold shows what it points to",
                    KeyUse::Nobody => &forget,
                };
                return format!(
                    "the daemon holds this key and shows no record of it: it may have expired, and the daemon may sign it anew within minutes; {later}. If nothing was ever published under the key, `dim ipns adopt {key} replace` publishes"
                );
            }
        };
        let sequence = self.sequence.map(|sequence| format!(" (sequence {sequence})")).unwrap_or_default();
        let instead = match used {
            KeyUse::Importer => format!("`dim ipns adopt {key} import` takes its content over first, "),
            KeyUse::Publisher => String::new(),
            KeyUse::Nobody => format!("no running plugin publishes under the key: {forget}, "),
        };
        format!(
            "the name points to {}{sequence}, and {why}; {instead}`dim ipns adopt {key} replace` overwrites it",
            self.path
        )
    }
}

/// The use of a key by the plugins of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyUse {
    /// A running plugin publishes under the key, and imports its documents.
    Importer,
    /// A plugin publishes under the key.
    Publisher,
    /// No plugin publishes under the key.
    Nobody,
}

/// The reason why a host does not know the record that is published under its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The host has never published under the name: its key was adopted, or its state directory is new.
    NeverPublished,
    /// The host was restored from a backup that is older than the record.
    Restored,
    /// Another writer has published under the name since the host did.
    OtherWriter,
    /// The daemon has the key, which the host has adopted, and shows no record of it. The record may have
    /// expired, and the daemon may sign it anew later.
    NoRecord,
}

/// Most values that the backend may have accepted without a confirmation to the host.
const ATTEMPTS: usize = 16;

/// The result of comparing a published record with the row of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The host has published the record, or has at least sent it.
    Own,
    /// The record is older than the host's last one, which the backend has lost.
    Older,
    /// The host does not know the record.
    Unknown(Cause),
}

impl Known {
    /// Compares a published record with the row of the name. See [`Finding`].
    pub fn compare(&self, current: &Current) -> Finding {
        let is_sent = |path: &ContentPath| self.attempts.contains(path) || self.path == *path;
        let Some(accepted) = &self.published else {
            return if is_sent(&current.path) {
                Finding::Own
            } else {
                Finding::Unknown(Cause::NeverPublished)
            };
        };
        if is_sent(&current.path) || accepted.path == current.path {
            return Finding::Own;
        }
        let last = accepted.backed_up.unwrap_or(accepted.sequence);
        match current.sequence {
            Some(sequence) if sequence < last => Finding::Older,
            _ if accepted.backed_up.is_some() => Finding::Unknown(Cause::Restored),
            _ => Finding::Unknown(Cause::OtherWriter),
        }
    }

    /// Whether the current value was published by another writer: the host has set none of its own.
    pub fn is_of_another(&self) -> bool {
        self.is_published() && self.published.as_ref().is_some_and(|accepted| accepted.by.is_none())
    }

    /// Whether nothing may be published while the backend shows no record: the host has sent and seen nothing
    /// under the name, and the operator has not decided. It applies to an adopted key, which may have a record
    /// that has expired.
    pub fn awaits_record(&self) -> bool {
        self.published.is_none() && self.attempts.is_empty() && !self.claimed
    }
}

/// A value that another writer has published under an own name.
#[derive(Clone, Debug, PartialEq)]
pub struct ForeignValue {
    /// The value, as one of the name.
    pub update: NameUpdate,
    /// The published record.
    pub current: Current,
    /// The encryption of the published document, if it was encrypted.
    pub encryption: Option<Encryption>,
}

/// Records that the host is about to send a value to the backend, which may accept it without a confirmation to
/// the host. The last value sent becomes the last one in the list.
pub fn attempt(write: &WriteTransaction, key: &KeyName, path: &ContentPath) -> Result<(), StoreError> {
    let Some(mut known) = read(&write.open_table(NAMES)?, key)? else { return Ok(()) };
    if known.attempts.last() == Some(path) {
        return Ok(());
    }
    known.attempts.retain(|before| before != path);
    let surplus = (known.attempts.len() + 1).saturating_sub(ATTEMPTS);
    known.attempts.drain(..surplus);
    known.attempts.push(path.clone());
    put(write, key, &known)
}

/// Records at `now` that the backend has lost the accepted record of a name, so that the host publishes it
/// again at once. Does nothing if the backend has accepted another record since `seen`. Returns whether it did.
pub fn lose(
    write: &WriteTransaction,
    key: &KeyName,
    seen: &Accepted,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let Some(mut known) = read(&write.open_table(NAMES)?, key)? else { return Ok(false) };
    let Some(accepted) = known.published.as_mut().filter(|accepted| *accepted == seen && accepted.of != 0)
    else {
        return Ok(false);
    };
    let is_published = accepted.of == known.sequence;
    (accepted.of, accepted.by) = (0, None);
    if is_published {
        known.waiting = Some(now.0);
    }
    put(write, key, &known)?;
    Ok(true)
}

/// Puts a name on hold that points to an unknown record, unless the host knows the record by now. Returns
/// whether the hold is new.
pub fn hold(
    write: &WriteTransaction,
    key: &KeyName,
    current: &Current,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let Some(mut known) = read(&write.open_table(NAMES)?, key)? else { return Ok(false) };
    let Finding::Unknown(cause) = known.compare(current) else { return Ok(false) };
    let Current { path, sequence } = current.clone();
    let held = known.hold.take().filter(|held| held.cause != Cause::NoRecord);
    let is_news = held.is_none();
    known.hold = Some(match held {
        Some(held) if (&held.path, held.sequence) == (&path, sequence) => return Ok(false),
        Some(held) => Hold { path, sequence, changed: now.0, ..held },
        None => Hold { cause, path, sequence, since: now.0, changed: now.0 },
    });
    put(write, key, &known)?;
    Ok(is_news)
}

/// Puts a name on hold if the backend shows no record of its adopted key, unless the host has published under
/// it or the operator has decided. Returns whether the hold is new.
pub fn hold_without_record(
    write: &WriteTransaction,
    key: &KeyName,
    name: &IpnsName,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let Some(mut known) = read(&write.open_table(NAMES)?, key)? else { return Ok(false) };
    if known.hold.is_some() || !known.awaits_record() {
        return Ok(false);
    }
    let (path, cause) = (ContentPath::of_name(name), Cause::NoRecord);
    known.hold = Some(Hold { cause, path, sequence: None, since: now.0, changed: now.0 });
    put(write, key, &known)?;
    Ok(true)
}

/// Adopts the published value of a name for which the host has no value, and puts the name on hold. A name that
/// has a value by now is only put on hold. Returns the change for the name's followers.
pub fn find(
    write: &WriteTransaction,
    key: &KeyName,
    value: &ForeignValue,
    now: Timestamp,
) -> Result<Option<Changed>, StoreError> {
    if read(&write.open_table(NAMES)?, key)?.is_some() {
        hold(write, key, &value.current, now)?;
        return Ok(None);
    }
    let changed = take_over(write, key, value, now)?;
    let known = read(&write.open_table(NAMES)?, key)?;
    if let Some(known) = known {
        let Current { path, sequence } = value.current.clone();
        let cause = Cause::NeverPublished;
        let hold = Some(Hold { cause, path, sequence, since: now.0, changed: now.0 });
        put(write, key, &Known { hold, ..known })?;
    }
    Ok(changed)
}

/// Sets a name to the value that another writer has published; values that were committed before are replaced.
/// A hold stays. Returns the change for the name's followers.
pub fn take_over(
    write: &WriteTransaction,
    key: &KeyName,
    value: &ForeignValue,
    now: Timestamp,
) -> Result<Option<Changed>, StoreError> {
    let changed = set(write, key, &value.update, now)?;
    let known = read(&write.open_table(NAMES)?, key)?;
    if let Some(known) = known {
        let encryption = value.encryption.clone();
        let accepted = Accepted::elsewhere(&value.current, known.sequence, &known, now);
        accept(write, key, Accepted { encryption, ..accepted })?;
    }
    Ok(changed)
}

/// Ends the hold on a name: from `now` on the host publishes over the unknown record.
pub fn release(write: &WriteTransaction, key: &KeyName, now: Timestamp) -> Result<(), StoreError> {
    let Some(mut known) = read(&write.open_table(NAMES)?, key)? else { return Ok(()) };
    let hold = known.hold.take();
    known.claimed = known.published.is_none();
    // Until now the name waited for the operator, not for the backend.
    if hold.is_some() && !known.is_published() {
        known.waiting = Some(now.0);
    }
    put(write, key, &known)?;
    let Some(hold) = hold.filter(|hold| hold.cause != Cause::NoRecord) else { return Ok(()) };
    let is_taken_over = known.published.as_ref().is_some_and(|accepted| accepted.path == hold.path);
    if is_taken_over {
        return Ok(());
    }
    let last = known.published.as_ref().map_or(0, |accepted| accepted.sequence);
    let sequence = Some(hold.sequence.unwrap_or_default().max(last));
    let current = Current { path: hold.path, sequence };
    accept(write, key, Accepted::elsewhere(&current, 0, &known, Timestamp(hold.changed)))
}

impl Accepted {
    /// Makes the accepted state of a record that another writer has published. `of` is the number of the host's
    /// value that it represents.
    fn elsewhere(current: &Current, of: u64, known: &Known, at: Timestamp) -> Self {
        Self {
            path: current.path.clone(),
            is_held: false,
            of,
            sequence: current.sequence.unwrap_or_default(),
            at: at.0,
            lifetime: known.lifetime,
            record: None,
            by: None,
            backed_up: None,
            encryption: None,
        }
    }
}
