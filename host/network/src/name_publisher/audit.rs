//! Owns the audit of published names: whether the daemon still has the key, the pin and the record of each name, and
//! whether the record is the host's own. It receives the names and their committed values, and marks lost values for
//! publication. A value that one daemon accepted is missing in another.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use dim_ipfs::keys::Key;
use dim_ipfs::{BackendError, Current, Keeper};
use dim_model::ident::{ContentPath, IpnsName, KeyName};
use dim_model::time::Timestamp;
use dim_store::commit::{CommitError, NameChange};
use dim_store::effect::{LIFETIME, NameUpdate, NameValue};
use dim_store::names::{self, Accepted, Cause, Finding, ForeignValue, Known};
use dim_store::pins;
use futures::StreamExt as _;

use super::Publisher;
use super::encryption::Recognized;
use crate::encrypted_documents::{Document, MissingKey};

/// The time between two requests for the identity of the daemon. Another daemon may have replaced it, or it may have
/// been away.
const PRESENCE_EVERY: Duration = Duration::from_secs(2);

/// The time between two audits of each name while the daemon stays the same.
const AUDIT_EVERY: Duration = Duration::from_secs(60);

/// The time limit of the audit of one name.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The number of names that are audited at the same time.
const TOGETHER: usize = 4;

/// The time that a daemon may take until it returns a record that it accepted.
const SETTLING: Duration = Duration::from_secs(30);

/// The task that audits names.
pub struct Audit {
    publisher: Publisher,
    /// The keeper at the last check, or `None` if the daemon did not answer.
    keeper: Option<Keeper>,
    /// The time of the last new subscription. It is the only sign of a daemon that was away for a moment.
    subscribed: Option<Timestamp>,
    /// The time of the next audit of all names.
    next: Instant,
    /// The keys that were audited since the keeper changed: their names have no record, or one that is noted. They
    /// wait for the next audit of all names.
    looked_up: BTreeSet<KeyName>,
    /// The records of names on hold that are not the host's own.
    unreadable: Mutex<BTreeMap<KeyName, Unreadable>>,
}

/// The path in a record of another writer, and the key that the host lacks to read its document.
type Unreadable = (ContentPath, Option<MissingKey>);

/// A name to audit.
struct Subject {
    key: KeyName,
    name: IpnsName,
    known: Option<Known>,
    /// Whether a daemon had the key before the host.
    is_foreign: bool,
}

impl Audit {
    /// Makes an audit of the names of `publisher`.
    pub fn new(publisher: Publisher) -> Self {
        let next = publisher.clock.monotonic();
        Self {
            publisher,
            keeper: None,
            subscribed: None,
            next,
            looked_up: BTreeSet::new(),
            unreadable: Mutex::default(),
        }
    }

    /// Audits until the writer ended.
    pub async fn run(mut self) {
        loop {
            match self.look().await {
                Ok(()) => {}
                Err(CommitError::Closed) => return,
                Err(error) => tracing::error!("cannot audit the names: {error}"),
            }
            tokio::select! {
                () = self.publisher.clock.sleep(PRESENCE_EVERY) => {}
                () = self.publisher.looks.wanted() => {}
            }
        }
    }

    async fn look(&mut self) -> Result<(), CommitError> {
        let keeper = match self.publisher.backend.keeper().await {
            Ok(keeper) => {
                self.publisher.backend.connectivity.made();
                keeper
            }
            Err(error) => {
                self.publisher.backend.connectivity.failed(&error);
                self.keeper = None;
                return Ok(());
            }
        };
        if self.keeper.as_ref() != Some(&keeper) {
            self.next = self.publisher.clock.monotonic();
            self.looked_up.clear();
        }
        let is_first = self.keeper.replace(keeper.clone()).is_none();
        let subscribed =
            self.publisher.listening_records.all().values().filter_map(|it| it.connected_since).max();
        if subscribed != self.subscribed {
            self.subscribed = subscribed;
            self.next = self.publisher.clock.monotonic();
        }
        let subjects = self.subjects()?;
        let (is_due, network) =
            (self.next <= self.publisher.clock.monotonic(), self.publisher.backend.network);
        if is_first || is_due {
            self.lose_what_others_keep(&subjects, &keeper).await?;
        }
        if !network {
            return Ok(());
        }
        let subjects: Vec<_> = subjects
            .into_iter()
            .filter(|it| {
                let is_new = it.known.is_none() && !self.looked_up.contains(&it.key);
                is_due || is_new || !self.publisher.looks.has(&it.key)
            })
            .collect();
        if is_due {
            self.next = self.publisher.clock.monotonic() + AUDIT_EVERY;
        }
        self.audit(subjects).await
    }

    fn subjects(&self) -> Result<Vec<Subject>, CommitError> {
        let snapshot = self.publisher.store.snapshot()?;
        let subject = |(key, held): (KeyName, Key)| {
            let known = names::known(&snapshot, &key)?;
            let is_foreign = self.publisher.keys.is_foreign(&key);
            Ok(Subject { name: held.name(), key, known, is_foreign })
        };
        self.publisher.keys.all().into_iter().map(subject).collect()
    }

    /// Marks values as lost that another daemon or the embedded backend accepted.
    async fn lose_what_others_keep(&self, subjects: &[Subject], keeper: &Keeper) -> Result<(), CommitError> {
        for Subject { key, known, .. } in subjects {
            let accepted = known.as_ref().and_then(|known| known.published.as_ref());
            if let Some(accepted) = accepted.filter(|it| it.by.as_ref() != Some(keeper)) {
                self.lose(key, accepted, "another backend has accepted it").await?;
            }
        }
        Ok(())
    }

    async fn audit(&mut self, subjects: Vec<Subject>) -> Result<(), CommitError> {
        if subjects.is_empty() {
            return Ok(());
        }
        let keys = match self.publisher.backend.names.keys().await {
            Ok(keys) => keys,
            Err(error) => {
                tracing::debug!("cannot list the daemon's keys: {error}");
                return Ok(());
            }
        };
        let (this, keys) = (&*self, &keys);
        let audits = futures::stream::iter(subjects).map(|subject| async move {
            let is_listed = keys.iter().any(|(_, name)| *name == subject.name);
            let audited = tokio::time::timeout(TIMEOUT, this.audit_one(&subject, is_listed)).await;
            let outcome = match audited {
                Ok(outcome) => outcome,
                Err(_) => Err(BackendError::Timeout("name/get").into()),
            };
            (subject.key, outcome)
        });
        let outcomes: Vec<_> = audits.buffer_unordered(TOGETHER).collect().await;
        for (key, outcome) in outcomes {
            self.publisher.looks.note(&key);
            match outcome {
                Ok(()) => {
                    self.looked_up.insert(key);
                }
                Err(super::PublishError::Commit(error)) => return Err(error),
                Err(error) => {
                    tracing::debug!(%key, "cannot audit: {error}");
                    // The record is searched for again when the name is published, or in the next audit.
                    if matches!(&error, super::PublishError::Backend(error) if error.is_deadline_of_daemon())
                    {
                        self.looked_up.insert(key);
                    }
                }
            }
        }
        Ok(())
    }

    async fn audit_one(&self, subject: &Subject, is_listed: bool) -> Result<(), super::PublishError> {
        let Subject { key, name, known, is_foreign } = subject;
        let current = self.publisher.backend.names.current(name).await?;
        let Some(known) = known else {
            if let Some(current) = current {
                self.take_note(key, name, current).await?;
            }
            return Ok(());
        };
        if let Some(current) = &current
            && let Finding::Unknown(_) = known.compare(current)
        {
            return self.judge(subject, known, current).await;
        }
        let is_held_without = known.hold.as_ref().is_some_and(|hold| hold.cause == Cause::NoRecord);
        if is_held_without && current.is_some() {
            return Ok(self.recognize(key).await?);
        }
        if current.is_none() && *is_foreign && known.awaits_record() {
            return Ok(self.publisher.hold_without_record(key, name.clone()).await?);
        }
        let Some(accepted) = known.published.as_ref().filter(|it| it.of != 0 && known.hold.is_none()) else {
            return Ok(());
        };
        if let Some(lost) = self.lost(accepted, known, current.as_ref(), is_listed).await? {
            self.lose(key, accepted, lost).await?;
        }
        Ok(())
    }

    /// Puts a name on hold whose record the host does not know, or ends the hold if the host finds its own document there.
    async fn judge(
        &self,
        Subject { key, name, .. }: &Subject,
        known: &Known,
        current: &Current,
    ) -> Result<(), super::PublishError> {
        let is_held = known.hold.as_ref().is_some_and(|hold| hold.path == current.path);
        let seen = self.unreadable().get(key).filter(|(path, _)| *path == current.path).cloned();
        if is_held && let Some((_, missing)) = seen {
            // The file is not read again as long as its key is missing.
            let has_key = match missing {
                Some(missing) => self.publisher.cipher.has_key(&missing).await,
                None => false,
            };
            if !has_key {
                return Ok(());
            }
        }
        match self.publisher.recognize_document(key, known, name, current).await? {
            Recognized::Own if is_held => return Ok(self.recognize(key).await?),
            Recognized::Own => return Ok(()),
            Recognized::Foreign => self.unreadable().insert(key.clone(), (current.path.clone(), None)),
            Recognized::Unreadable(missing) => {
                self.unreadable().insert(key.clone(), (current.path.clone(), missing))
            }
        };
        Ok(self.publisher.hold(key, current.clone()).await?)
    }

    fn unreadable(&self) -> MutexGuard<'_, BTreeMap<KeyName, Unreadable>> {
        self.unreadable.lock().expect("no thread panics while it holds the records")
    }

    /// Returns what the daemon lost of a name, or `None` if it lost nothing.
    async fn lost(
        &self,
        accepted: &Accepted,
        known: &Known,
        current: Option<&Current>,
        is_listed: bool,
    ) -> Result<Option<&'static str>, super::PublishError> {
        if !is_listed {
            return Ok(Some("the daemon has lost its key"));
        }
        let is_settled = Timestamp::wall().since(Timestamp(accepted.at)) > SETTLING;
        match current {
            None if is_settled => return Ok(Some("the daemon has lost its record")),
            Some(current) if is_settled && known.compare(current) == Finding::Older => {
                return Ok(Some("the daemon has an older record"));
            }
            _ => {}
        }
        let Some(cid) = accepted.file() else { return Ok(None) };
        let is_noted = pins::is_noted(&self.publisher.store.snapshot()?, &cid)?;
        let is_lost = is_noted && !self.publisher.backend.content.is_pinned(&cid).await?;
        Ok(is_lost.then_some("the daemon has lost its document"))
    }

    /// Ends the hold on a name whose record appeared and has the host's own value.
    async fn recognize(&self, key: &KeyName) -> Result<(), CommitError> {
        let key = key.clone();
        self.publisher.commit.write(move |write| names::release(write, &key, Timestamp::wall())).await?;
        self.publisher.commit.names.notify_one();
        Ok(())
    }

    async fn lose(&self, key: &KeyName, accepted: &Accepted, why: &'static str) -> Result<(), CommitError> {
        let (lost, seen, now) = (key.clone(), accepted.clone(), Timestamp::wall());
        if self.publisher.commit.write(move |write| names::lose(write, &lost, &seen, now)).await? {
            tracing::warn!(%key, "the name is published again: {why}");
            self.publisher.commit.names.notify_one();
        }
        Ok(())
    }

    /// Records the value of a name that never had a value of this host, with its document if the document can be
    /// read. The value becomes the value of the name, and the name is on hold.
    async fn take_note(
        &self,
        key: &KeyName,
        name: &IpnsName,
        current: Current,
    ) -> Result<(), super::PublishError> {
        let Publisher { backend, cipher, .. } = &self.publisher;
        let by_path = || (NameValue::Path(current.path.clone()), None);
        let (value, encryption) = match cipher.document_behind(backend, name, &current.path).await {
            // Otherwise the host could publish the document for other readers.
            Ok(Document { encryption: Some(it), .. }) if cipher.group(key) != Some(it.group.clone()) => {
                by_path()
            }
            Ok(document) => document.into_value(),
            Err(_) => by_path(),
        };
        let update = NameUpdate { name: name.clone(), value, lifetime: LIFETIME };
        tracing::warn!(%key, path = %current.path, "the name has a value that this host has not published: the host publishes nothing under it until the operator decides with `dim ipns adopt {key}`");
        let (key, value) = (key.clone(), ForeignValue { update, current, encryption });
        Ok(self.publisher.commit.change_name(NameChange::Found { key, value }).await?)
    }
}
