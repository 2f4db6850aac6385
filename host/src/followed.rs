//! Owns the names of others: each followed name is asked for at a bounded rate, its record and its
//! content are checked, and a change becomes an event.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backend::record::Record;
use crate::backend::{Backend, BackendError};
use crate::commit::{Commit, CommitError, NameChange};
use crate::config::Live;
use crate::entry::{Kind, Resolution};
use crate::ident::{ContentPath, IpnsName, KeyName};
use crate::interest::{Interest, Party};
use crate::keys::Keyring;
use crate::plugin::DOCUMENT_BYTES;
use crate::room::Room;
use crate::store::Store;
use crate::store::followed::{self, Followed};
use crate::time::Timestamp;
use crate::trouble::{Code, Trouble};

/// How long one name may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// How many names that one party follows are asked for at one time.
const AT_ONCE: usize = 4;

/// How long a name may be followed and not be found before the operator is told.
const LATE: Duration = Duration::from_secs(60);

/// How often it is noted that a name still has its value.
const CONFIRM_EVERY: Duration = Duration::from_secs(60);

/// The task that follows names.
#[derive(Debug)]
pub struct Follower {
    /// What is known is kept here.
    pub store: Arc<Store>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// Where names are asked for.
    pub backend: Backend,
    /// Who follows which.
    pub interest: Arc<Interest>,
    /// The host's own names are known without asking.
    pub keys: Arc<Keyring>,
    /// How long to wait before a name is asked for again, by the config of the moment.
    pub config: Live,
    /// Whether names are taken in.
    pub room: Arc<Room>,
    /// Which of them cannot be resolved.
    pub unresolved: Arc<Unresolved>,
}

/// The names of others that cannot be resolved.
#[derive(Debug, Default)]
pub struct Unresolved(Mutex<BTreeMap<IpnsName, Failing>>);

/// Since when a name cannot be resolved, and why.
#[derive(Debug)]
struct Failing {
    since: Timestamp,
    /// Why, the last time.
    why: String,
}

impl Unresolved {
    /// The names that cannot be resolved for longer than another host may take to publish one.
    pub fn troubles(&self, now: Timestamp) -> Vec<Trouble> {
        let failing = self.lock();
        let late = failing.iter().filter(|(_, failing)| now.since(failing.since) > LATE);
        let troubles = late.map(|(name, Failing { since, why })| {
            let message = format!("{name}, which is followed, cannot be resolved since {since:.0}: {why}");
            Trouble::warning(Code::NameNotFound, message).since(*since).about(name)
        });
        troubles.collect()
    }

    fn failed(&self, name: &IpnsName, why: String) {
        tracing::debug!(%name, "not resolved: {why}");
        let mut failing = self.lock();
        let since = failing.get(name).map_or_else(Timestamp::wall, |before| before.since);
        failing.insert(name.clone(), Failing { since, why });
    }

    fn resolved(&self, name: &IpnsName) {
        self.lock().remove(name);
    }

    fn retain(&self, followed: impl Fn(&IpnsName) -> bool) {
        self.lock().retain(|name, _| followed(name));
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<IpnsName, Failing>> {
        self.0.lock().expect("no one panics while holding the names")
    }
}

impl Follower {
    /// Follows until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            // The host has no writer any more.
            _closed = self.follow() => {}
        }
    }

    /// Asks for each followed name, again and again; returns what ended it.
    async fn follow(&self) -> CommitError {
        let mut turns = Turns::default();
        let mut asked = FuturesUnordered::new();
        loop {
            self.room.enough().await;
            if let Err(error @ CommitError::Closed) = self.tell_again(&mut turns).await {
                return error;
            }
            let followers = self.interest.followers();
            self.unresolved.retain(|name| followers.contains_key(name));
            for name in turns.take_due(&followers, Instant::now()) {
                asked.push(async move { (self.ask_in_time(&name).await, name) });
            }
            tokio::select! {
                Some((result, name)) = asked.next() => {
                    turns.end(&name, Instant::now() + self.config.now().follow_every());
                    if let Err(error @ CommitError::Closed) = result {
                        return error;
                    }
                }
                () = self.interest.names_changed() => {}
                () = at(turns.next()) => {}
            }
        }
    }

    /// Says again what is known of names that someone new follows; those of others are asked for at once.
    async fn tell_again(&self, turns: &mut Turns) -> Result<(), CommitError> {
        let fresh = self.interest.take_fresh();
        for name in &fresh {
            let key = self.own(name);
            turns.hasten(name);
            let told = self.commit.change_name(NameChange::Again { name: name.clone(), key }).await;
            if told.is_err() {
                // There is no room for it now.
                self.interest.stay_fresh(fresh);
                return told;
            }
        }
        Ok(())
    }

    /// Asks for one name. The host's own are in the log as they change.
    async fn ask_in_time(&self, name: &IpnsName) -> Result<(), CommitError> {
        if self.own(name).is_some() {
            self.unresolved.resolved(name);
            return Ok(());
        }
        match tokio::time::timeout(TIMEOUT, self.ask(name)).await {
            Ok(Ok(())) => self.unresolved.resolved(name),
            Ok(Err(FollowError::Commit(error))) => return Err(error),
            Ok(Err(FollowError::Backend(error))) => self.unresolved.failed(name, error.to_string()),
            Err(_) => self.unresolved.failed(name, format!("no answer within {TIMEOUT:?}")),
        }
        Ok(())
    }

    fn own(&self, name: &IpnsName) -> Option<KeyName> {
        self.keys.all().into_iter().find(|(_, key)| key.name() == *name).map(|(key, _)| key)
    }

    async fn ask(&self, name: &IpnsName) -> Result<(), FollowError> {
        let known = followed::known(&self.store.snapshot().map_err(CommitError::from)?, name)
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
        if let Some(before) = known.filter(|known| known.target == target) {
            let before = before.resolution;
            let is_fresh =
                before.valid_until == record.validity && now.since(before.confirmed_at) < CONFIRM_EVERY;
            if !is_fresh {
                self.confirm(Followed { resolution: told(before.path), target, record: record.bytes })
                    .await?;
            }
            return Ok(());
        }
        let (cid, data) = self.backend.content.file(&target, DOCUMENT_BYTES).await?;
        let known = Followed { resolution: told(ContentPath::of(&cid)), target, record: record.bytes };
        Ok(self.commit.change_name(NameChange::Followed { known, cid, data }).await?)
    }

    /// Notes that a name still has its value, for those who judge how stale it is.
    async fn confirm(&self, known: Followed) -> Result<(), CommitError> {
        let entry = Kind::NameConfirmed(known.resolution.clone());
        self.commit.append_and_write(vec![entry], move |write| followed::confirm(write, &known)).await
    }
}

/// Whether `record` comes before the one that is known, by the order of the specification: two hosts
/// with one key sign records of one sequence.
fn is_older(record: &Record, known: &[u8], name: &IpnsName) -> bool {
    // One that has ended since is still known.
    Record::verify(known, name, Timestamp(0)).is_ok_and(|known| record.compare(&known).is_lt())
}

/// Whose turn it is to be asked for. Names do not wait for each other, except for those of one follower: of these a few
/// are asked for at one time.
#[derive(Debug, Default)]
struct Turns {
    /// When each name is asked for next.
    due: BTreeMap<IpnsName, Instant>,
    /// The names that are being asked for, and who followed them then.
    asked: BTreeMap<IpnsName, BTreeSet<Party>>,
}

impl Turns {
    /// The names that are asked for now, of those that are followed. A name that is not known yet is due at once.
    fn take_due(&mut self, followers: &BTreeMap<IpnsName, BTreeSet<Party>>, now: Instant) -> Vec<IpnsName> {
        self.due.retain(|name, _| followers.contains_key(name));
        for name in followers.keys() {
            self.due.entry(name.clone()).or_insert(now);
        }
        let mut load: BTreeMap<Party, usize> = BTreeMap::new();
        for party in self.asked.values().flatten() {
            *load.entry(party.clone()).or_default() += 1;
        }
        // Who has waited longest comes first.
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

    /// A name was asked for, and will be again.
    fn end(&mut self, name: &IpnsName, next: Instant) {
        self.asked.remove(name);
        self.due.insert(name.clone(), next);
    }

    /// Has a name asked for as soon as can be.
    fn hasten(&mut self, name: &IpnsName) {
        self.due.remove(name);
    }

    /// When a name that nobody asks for is due, if that is not behind.
    fn next(&self) -> Option<Instant> {
        let idle = self.due.iter().filter(|(name, _)| !self.asked.contains_key(*name));
        let now = Instant::now();
        // What is due and was not taken waits for a place.
        idle.map(|(_, due)| *due).filter(|due| *due > now).min()
    }
}

/// Resolves at a moment, or never.
async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error(transparent)]
    Backend(#[from] BackendError),
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
        let party = |name: &str| Party::Plugin(name.parse().unwrap());
        let (names, now) = ((0..9).map(name).collect::<Vec<_>>(), Instant::now());
        let mut followers: BTreeMap<IpnsName, BTreeSet<Party>> =
            names[..8].iter().map(|name| (name.clone(), [party("slow")].into())).collect();
        followers.insert(names[8].clone(), [party("honest")].into());
        let mut turns = Turns::default();
        let taken = turns.take_due(&followers, now);
        assert_eq!(taken.len(), AT_ONCE + 1, "those of one follower wait for each other, a few at a time");
        assert!(taken.contains(&names[8]));
        assert!(turns.take_due(&followers, now).is_empty());
        assert_eq!(turns.next(), None, "a place has to become free");
        // Only the honest one is answered, and asked for again when it is due.
        let (soon, later) = (now + Duration::from_secs(3_600), now + Duration::from_secs(3_601));
        turns.end(&names[8], soon);
        assert!(turns.take_due(&followers, now).is_empty());
        assert_eq!(turns.next(), Some(soon));
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
