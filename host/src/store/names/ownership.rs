//! Owns whose record stands under an own name: what the host knows to be its own, what it has to leave alone until the
//! operator decides, and what the backend has lost.

use redb::WriteTransaction;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Accepted, Changed, Known, accept, put, read, set};
use crate::backend::Current;
use crate::effect::NameUpdate;
use crate::ident::{ContentPath, IpnsName, KeyName};
use crate::store::{NAMES, StoreError};
use crate::time::Timestamp;

/// A record under one of the host's names that the host has not published. Nothing is published over it until the
/// operator decides: what a fleet has published is never replaced by what a host does not know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hold {
    /// Why the host does not know the record.
    pub cause: Cause,
    /// What the record points to; the name itself where there is no record.
    pub path: ContentPath,
    /// The record's sequence, where the backend shows it.
    pub sequence: Option<u64>,
    /// When it was found, in nanoseconds since 1970.
    pub since: u64,
    /// When the record was last seen to change, in nanoseconds since 1970.
    pub changed: u64,
}

impl Hold {
    /// Says why the name is on hold and what the operator can do.
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

/// Who uses a key on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyUse {
    /// A running plugin publishes under it, and imports its documents.
    Importer,
    /// A plugin publishes under it.
    Publisher,
    /// No plugin publishes under it.
    Nobody,
}

/// Why a host does not know what is published under its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The host has never published under the name: its key was adopted, or its state directory is new.
    NeverPublished,
    /// The host was restored from a backup that is older than the record.
    Restored,
    /// Another writer has published under the name since the host did.
    OtherWriter,
    /// The daemon has the key, which the host has adopted, and shows no record of it: it may have expired, and come
    /// back when the daemon signs it anew.
    NoRecord,
}

/// Values that may have been accepted without the host hearing of it, at most.
const ATTEMPTS: usize = 16;

/// What is published under a name, compared with what the host knows of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The host has published it, or has at least sent it.
    Own,
    /// It is older than what the host has published: the backend has lost that.
    Older,
    /// The host does not know it.
    Unknown(Cause),
}

impl Known {
    /// Finds out whether what is published under the name is the host's own. See [`Finding`].
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

    /// Whether the value is what somebody else had published under the name: the host has given it none of its own.
    pub fn is_of_another(&self) -> bool {
        self.is_published() && self.published.as_ref().is_some_and(|accepted| accepted.by.is_none())
    }

    /// Whether nothing may be published while the backend shows no record: nothing was ever sent or seen under the
    /// name, and the operator has not decided. It counts for an adopted key, of which there may be a record that has
    /// expired.
    pub fn awaits_record(&self) -> bool {
        self.published.is_none() && self.attempts.is_empty() && !self.claimed
    }
}

/// Notes that a value is about to be sent to the backend, which may accept it without the host hearing of it.
pub fn attempt(write: &WriteTransaction, key: &KeyName, path: &ContentPath) -> Result<(), StoreError> {
    let Some(mut known) = read(&write.open_table(NAMES)?, key)? else { return Ok(()) };
    if !known.attempts.contains(path) {
        let surplus = (known.attempts.len() + 1).saturating_sub(ATTEMPTS);
        known.attempts.drain(..surplus);
        known.attempts.push(path.clone());
        put(write, key, &known)?;
    }
    Ok(())
}

/// Notes at `now` that the backend has lost what it had accepted of a name, so that it is published again at once;
/// nothing if something was accepted since `seen`.
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

/// Stops publishing under a name that points to what the host does not know, unless the host has come to know it;
/// returns whether that is news.
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

/// Stops publishing under a name of whose adopted key the backend shows no record, unless the host has published under
/// it or the operator has decided; returns whether that is news.
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

/// Takes note of what is published under a name that the host has never given a value: it is the name's value from
/// then on, and on hold. Returns what its followers are told. A name that has a value meanwhile is held as it is.
pub fn find(
    write: &WriteTransaction,
    key: &KeyName,
    (update, current): (&NameUpdate, &Current),
    now: Timestamp,
) -> Result<Option<Changed>, StoreError> {
    if read(&write.open_table(NAMES)?, key)?.is_some() {
        hold(write, key, current, now)?;
        return Ok(None);
    }
    let changed = take_over(write, key, (update, current), now)?;
    let known = read(&write.open_table(NAMES)?, key)?;
    if let Some(known) = known {
        let Current { path, sequence } = current.clone();
        let cause = Cause::NeverPublished;
        let hold = Some(Hold { cause, path, sequence, since: now.0, changed: now.0 });
        put(write, key, &Known { hold, ..known })?;
    }
    Ok(changed)
}

/// Gives a name the value that someone else has published; returns what its followers are told. A hold stays, and what
/// was committed under the name before is void.
pub fn take_over(
    write: &WriteTransaction,
    key: &KeyName,
    (update, current): (&NameUpdate, &Current),
    now: Timestamp,
) -> Result<Option<Changed>, StoreError> {
    let changed = set(write, key, update, now)?;
    let known = read(&write.open_table(NAMES)?, key)?;
    if let Some(known) = known {
        accept(write, key, Accepted::elsewhere(current, known.sequence, &known, now))?;
    }
    Ok(changed)
}

/// Ends the hold on a name: from `now` on the host publishes over what was there.
pub fn release(write: &WriteTransaction, key: &KeyName, now: Timestamp) -> Result<(), StoreError> {
    let Some(mut known) = read(&write.open_table(NAMES)?, key)? else { return Ok(()) };
    let hold = known.hold.take();
    known.claimed = known.published.is_none();
    // Until now it has waited for the operator.
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
    /// What someone else has published in place of the host: it stands for the value that counts `of`.
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
        }
    }
}
