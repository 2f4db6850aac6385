//! Owns the followed names of other owners. It resolves each name at intervals, verifies its record and its content,
//! and commits each change as an event.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use dim_ipfs::ipns_record::Record;
use dim_ipfs::keys::Keyring;
use dim_ipfs::{Backend, BackendError};
use dim_model::entry::{Kind, Resolution};
use dim_model::health::{Code, HealthFinding};
use dim_model::ident::{ContentPath, IpnsName};
use dim_model::live::Live;
use dim_model::time::{Clock, Timestamp};
use dim_store::Store;
use dim_store::commit::{Commit, CommitError, NameChange};
use dim_store::disk_monitor::DiskMonitor;
use dim_store::followed_names::{self, Followed};
use dim_store::interest::{Interest, Subscriber};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio_util::sync::CancellationToken;

use crate::Settings;
use crate::encrypted_documents::{CipherError, Document, DocumentCipher, MissingKey};

/// The time limit of resolving one name.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The number of names of one follower that are resolved at the same time.
const AT_ONCE: usize = 4;

/// The time after which an unresolved name becomes a health finding.
const LATE: Duration = Duration::from_secs(60);

/// The time between two entries that confirm an unchanged value.
const CONFIRM_EVERY: Duration = Duration::from_secs(60);

/// The task that resolves followed names.
#[derive(Debug)]
pub struct NameFollower {
    /// The store with the last known values.
    pub store: Arc<Store>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// The backend that resolves names.
    pub backend: Backend,
    /// The followers of each name.
    pub interest: Arc<Interest>,
    /// The host's own keys. Their names are not resolved.
    pub keys: Arc<Keyring>,
    /// The settings, with the interval between two requests.
    pub settings: Live<Settings>,
    /// The state of the intake.
    pub disk: Arc<DiskMonitor>,
    /// The names that cannot be resolved.
    pub unresolved: Arc<Unresolved>,
    /// The decryption of documents.
    pub cipher: DocumentCipher,
    /// The clock that measures the interval.
    pub clock: Arc<dyn Clock>,
}

/// The followed names that cannot be resolved.
#[derive(Debug, Default)]
pub struct Unresolved(Mutex<BTreeMap<IpnsName, Failing>>);

/// The start and the reason of a failure.
#[derive(Debug)]
struct Failing {
    since: Timestamp,
    /// The reason of the last failure.
    why: String,
    /// The file at the end of the name's chain if it cannot be read, and the key that the host lacked.
    locked: Option<(ContentPath, Option<MissingKey>)>,
}

impl Unresolved {
    /// Returns a finding for each name that could not be resolved for longer than another host may need to publish
    /// it.
    pub fn troubles(&self, now: Timestamp) -> Vec<HealthFinding> {
        let failing = self.lock();
        let late = failing.iter().filter(|(_, failing)| now.since(failing.since) > LATE);
        let troubles = late.map(|(name, Failing { since, why, .. })| {
            let message = format!("the followed name {name} cannot be resolved since {since:.0}: {why}");
            HealthFinding::warning(Code::NameNotFound, message).since(*since).about(name)
        });
        troubles.collect()
    }

    fn failed(&self, name: &IpnsName, why: String) {
        self.note(name, why, None);
    }

    /// Records that the document in the file at `target` cannot be read.
    fn locked(&self, name: &IpnsName, target: ContentPath, why: &CipherError) {
        let missing = match why {
            CipherError::Unreadable(missing) => Some(missing.clone()),
            _ => None,
        };
        self.note(name, why.to_string(), Some((target, missing)));
    }

    fn note(&self, name: &IpnsName, why: String, locked: Option<(ContentPath, Option<MissingKey>)>) {
        tracing::debug!(%name, "not resolved: {why}");
        let mut failing = self.lock();
        let since = failing.get(name).map_or_else(Timestamp::wall, |before| before.since);
        failing.insert(name.clone(), Failing { since, why, locked });
    }

    /// Whether the file at `target` could not be read, with the key that the host lacked.
    fn unreadable(&self, name: &IpnsName, target: &ContentPath) -> Option<Option<MissingKey>> {
        let failing = self.lock();
        let (locked, missing) = failing.get(name)?.locked.as_ref()?;
        (locked == target).then(|| missing.clone())
    }

    fn resolved(&self, name: &IpnsName) {
        self.lock().remove(name);
    }

    fn retain(&self, followed: impl Fn(&IpnsName) -> bool) {
        self.lock().retain(|name, _| followed(name));
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<IpnsName, Failing>> {
        self.0.lock().expect("no thread panics while it holds the names")
    }
}

impl NameFollower {
    /// Resolves names until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            // The follower ends by itself only after the writer ended.
            _closed = self.follow() => {}
        }
    }

    /// Resolves the followed names without end. Returns the error that ended it.
    async fn follow(&self) -> CommitError {
        let mut turns = Turns::default();
        let mut asked = FuturesUnordered::new();
        loop {
            self.disk.enough().await;
            if let Err(error @ CommitError::Closed) = self.tell_again(&mut turns).await {
                return error;
            }
            let followers = self.interest.followers();
            self.unresolved.retain(|name| followers.contains_key(name));
            for name in turns.take_due(&followers, self.clock.monotonic()) {
                asked.push(async move { (self.ask_in_time(&name).await, name) });
            }
            tokio::select! {
                Some((result, name)) = asked.next() => {
                    turns.end(&name, self.clock.monotonic() + self.settings.now().follow_every);
                    if let Err(error @ CommitError::Closed) = result {
                        return error;
                    }
                }
                () = self.interest.names_changed() => {}
                () = self.until(&turns) => {}
            }
        }
    }

    /// Waits until a name is due, without end if none is.
    async fn until(&self, turns: &Turns) {
        let now = self.clock.monotonic();
        match turns.next(now) {
            Some(due) => self.clock.sleep(due.saturating_duration_since(now)).await,
            None => std::future::pending().await,
        }
    }

    /// Appends the known values of names with new followers again, and makes these names due at once.
    async fn tell_again(&self, turns: &mut Turns) -> Result<(), CommitError> {
        let fresh = self.interest.take_fresh();
        for name in &fresh {
            let key = self.keys.key_of(name);
            turns.hasten(name);
            let told = self.commit.change_name(NameChange::Again { name: name.clone(), key }).await;
            if told.is_err() {
                // The commit failed. The names stay marked for the next try.
                self.interest.stay_fresh(fresh);
                return told;
            }
        }
        Ok(())
    }

    /// Resolves one name. Values of the host's own names are appended to the log when they change.
    async fn ask_in_time(&self, name: &IpnsName) -> Result<(), CommitError> {
        if self.keys.key_of(name).is_some() {
            self.unresolved.resolved(name);
            return Ok(());
        }
        match tokio::time::timeout(TIMEOUT, self.ask(name)).await {
            Ok(Ok(())) => self.unresolved.resolved(name),
            Ok(Err(FollowError::Commit(error))) => return Err(error),
            Ok(Err(FollowError::Backend(error))) => self.unresolved.failed(name, error.to_string()),
            Ok(Err(FollowError::Cipher(error))) => self.unresolved.failed(name, error.to_string()),
            Ok(Err(FollowError::Locked(target, why))) => self.unresolved.locked(name, target, &why),
            Ok(Err(FollowError::StillLocked)) => {}
            Err(_) => self.unresolved.failed(name, format!("no answer within {TIMEOUT:?}")),
        }
        Ok(())
    }

    async fn ask(&self, name: &IpnsName) -> Result<(), FollowError> {
        let known = followed_names::known(&self.store.snapshot().map_err(CommitError::from)?, name)
            .map_err(CommitError::from)?;
        let record = self.backend.record(name).await?;
        if known.as_ref().is_some_and(|known| is_older(&record, &known.record, name)) {
            return Ok(());
        }
        let target = self.backend.end_of_chain(record.path).await?;
        let now = Timestamp::wall();
        let told = |path| Resolution {
            name: name.clone(),
            path,
            sequence: record.sequence,
            valid_until: record.validity,
            confirmed_at: now,
        };
        if let Some(before) = known.as_ref().filter(|known| known.target == target) {
            let Followed { resolution: before, encrypted, .. } = before.clone();
            let is_fresh =
                before.valid_until == record.validity && now.since(before.confirmed_at) < CONFIRM_EVERY;
            if !is_fresh {
                let resolution = told(before.path);
                self.confirm(Followed { resolution, target, record: record.bytes, encrypted }).await?;
            }
            return Ok(());
        }
        // A large file is not read again unless its key has come.
        match self.unresolved.unreadable(name, &target) {
            Some(Some(missing)) if self.cipher.has_key(&missing).await => {}
            Some(_) => return Err(FollowError::StillLocked),
            None => {}
        }
        let document = match self.cipher.document(&self.backend, name, &target).await {
            // The next attempt may succeed.
            Err(error @ (CipherError::Backend(_) | CipherError::Undecipherable)) => return Err(error.into()),
            Err(error) => return Err(FollowError::Locked(target, error)),
            Ok(document) => document,
        };
        let Document { cid, data, encryption } = document;
        let encrypted = encryption.is_some().then(|| target.clone());
        let resolution = told(ContentPath::of(&cid));
        let is_same = |known: Followed| encrypted.is_some() && known.resolution.path == resolution.path;
        let is_encrypted_anew = known.is_some_and(is_same);
        let known = Followed { resolution, target, record: record.bytes, encrypted };
        if is_encrypted_anew {
            return Ok(self.confirm(known).await?);
        }
        Ok(self.commit.change_name(NameChange::Followed { known, cid, data }).await?)
    }

    /// Records that a name still has its value, so that plugins can judge its age.
    async fn confirm(&self, known: Followed) -> Result<(), CommitError> {
        let entry = Kind::NameConfirmed(known.resolution.clone());
        self.commit.append_and_write(vec![entry], move |write| followed_names::confirm(write, &known)).await
    }
}

/// Returns whether `record` comes before the known one in the order of the specification. Two hosts with one key can
/// sign records with the same sequence number.
fn is_older(record: &Record, known: &[u8], name: &IpnsName) -> bool {
    // An expired record is valid for this comparison.
    Record::verify(known, name, Timestamp(0)).is_ok_and(|known| record.compare(&known).is_lt())
}

/// The schedule of requests. Names are independent of each other, but only a few names of one follower are resolved
/// at the same time.
#[derive(Debug, Default)]
struct Turns {
    /// The time of the next request for each name.
    due: BTreeMap<IpnsName, Instant>,
    /// The names with a request in progress, with their followers at its start.
    asked: BTreeMap<IpnsName, BTreeSet<Subscriber>>,
}

impl Turns {
    /// Returns the followed names to resolve now, and marks them as in progress. A new name is due at once.
    fn take_due(
        &mut self,
        followers: &BTreeMap<IpnsName, BTreeSet<Subscriber>>,
        now: Instant,
    ) -> Vec<IpnsName> {
        self.due.retain(|name, _| followers.contains_key(name));
        for name in followers.keys() {
            self.due.entry(name.clone()).or_insert(now);
        }
        let mut load: BTreeMap<Subscriber, usize> = BTreeMap::new();
        for party in self.asked.values().flatten() {
            *load.entry(party.clone()).or_default() += 1;
        }
        // The name that waited longest comes first.
        let mut waiting: Vec<_> = self.due.iter().filter(|(_, due)| **due <= now).collect();
        waiting.sort_by_key(|(_, due)| **due);
        let mut taken = Vec::new();
        for (name, _) in waiting {
            let parties = &followers[name];
            let has_place = parties.iter().any(|party| load.get(party).is_none_or(|load| *load < AT_ONCE));
            if has_place && !self.asked.contains_key(name) {
                for party in parties {
                    *load.entry(party.clone()).or_default() += 1;
                }
                self.asked.insert(name.clone(), parties.clone());
                taken.push(name.clone());
            }
        }
        taken
    }

    /// Ends the request for a name and sets the time of the next one.
    fn end(&mut self, name: &IpnsName, next: Instant) {
        self.asked.remove(name);
        self.due.insert(name.clone(), next);
    }

    /// Makes a name due at once.
    fn hasten(&mut self, name: &IpnsName) {
        self.due.remove(name);
    }

    /// Returns the earliest future time at which a name without a request is due.
    fn next(&self, now: Instant) -> Option<Instant> {
        let idle = self.due.iter().filter(|(name, _)| !self.asked.contains_key(*name));
        // A name that is due and was not taken waits until another request ends.
        idle.map(|(_, due)| *due).filter(|due| *due > now).min()
    }
}

#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Cipher(#[from] CipherError),
    #[error("the file at {0} cannot be read")]
    Locked(ContentPath, #[source] CipherError),
    #[error("the file still cannot be read")]
    StillLocked,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: u64) -> IpnsName {
        let key = cid::multihash::Multihash::<64>::wrap(0, &number.to_be_bytes()).unwrap();
        IpnsName::from_multihash(key)
    }

    #[test]
    fn a_name_that_is_never_found_is_told_with_the_reason_until_it_is_or_nobody_follows_it() {
        let unresolved = Unresolved::default();
        unresolved.failed(&name(1), "first".to_owned());
        let now = Timestamp::wall();
        unresolved.failed(&name(1), "last".to_owned());
        unresolved.failed(&name(2), "gone".to_owned());
        assert_eq!(unresolved.troubles(now), [], "it may be published in a moment");
        let later = now.after(LATE + Duration::from_secs(5));
        let troubles = unresolved.troubles(later);
        let told: Vec<_> = troubles.iter().map(|trouble| trouble.message.as_str()).collect();
        assert!(told.len() == 2 && told.iter().any(|message| message.ends_with(": last")), "{told:?}");
        unresolved.resolved(&name(1));
        unresolved.retain(|followed| *followed != name(2));
        assert_eq!(unresolved.troubles(later), []);
    }

    #[test]
    fn names_of_one_follower_do_not_hold_up_those_of_another() {
        let party = |name: &str| Subscriber::Plugin(name.parse().unwrap());
        let (names, now) = ((0..9).map(name).collect::<Vec<_>>(), Instant::now());
        let mut followers: BTreeMap<IpnsName, BTreeSet<Subscriber>> =
            names[..8].iter().map(|name| (name.clone(), [party("slow")].into())).collect();
        followers.insert(names[8].clone(), [party("honest")].into());
        let mut turns = Turns::default();
        let taken = turns.take_due(&followers, now);
        assert_eq!(taken.len(), AT_ONCE + 1, "those of one follower wait for each other, a few at a time");
        assert!(taken.contains(&names[8]));
        assert!(turns.take_due(&followers, now).is_empty());
        assert_eq!(turns.next(now), None, "a place has to become free");
        // Only the honest one is answered, and asked for again when it is due.
        let (soon, later) = (now + Duration::from_secs(3_600), now + Duration::from_secs(3_601));
        turns.end(&names[8], soon);
        assert!(turns.take_due(&followers, now).is_empty());
        assert_eq!(turns.next(now), Some(soon));
        assert_eq!(turns.take_due(&followers, later), [names[8].clone()]);
        // A place that becomes free goes to a name that has not been asked for yet.
        let slow = taken.iter().find(|name| **name != names[8]).unwrap();
        turns.end(slow, soon);
        let next = turns.take_due(&followers, later);
        assert!(next.len() == 1 && !taken.contains(&next[0]), "{next:?}");
        // A name that is followed by the honest one, too, has its place.
        let shared = names.iter().find(|name| !turns.asked.contains_key(*name)).unwrap().clone();
        followers.get_mut(&shared).unwrap().insert(party("honest"));
        assert_eq!(turns.take_due(&followers, later), std::slice::from_ref(&shared));
        turns.hasten(&names[8]);
        turns.end(&shared, later);
        followers.clear();
        assert!(turns.take_due(&followers, later).is_empty() && turns.due.is_empty());
    }
}
