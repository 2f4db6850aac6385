//! Owns the names of others: each followed name is asked for at a bounded rate, its record and its
//! content are checked, and a change becomes an event.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::backend::record::Record;
use crate::backend::{Backend, BackendError};
use crate::commit::{Commit, CommitError, NameChange};
use crate::config::Live;
use crate::entry::{Kind, Resolution};
use crate::ident::{ContentPath, IpnsName, KeyName};
use crate::interest::Interest;
use crate::keys::Keyring;
use crate::plugin::DOCUMENT_BYTES;
use crate::room::Room;
use crate::store::Store;
use crate::store::followed::{self, Followed};
use crate::time::Timestamp;

/// How long one name may take.
const TIMEOUT: Duration = Duration::from_secs(60);

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
    /// How long to wait between two rounds.
    pub config: Live,
    /// Whether names are taken in.
    pub room: Arc<Room>,
}

impl Follower {
    /// Follows until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let work = async {
            loop {
                self.room.enough().await;
                if let Err(CommitError::Closed) = self.round().await {
                    return;
                }
                tokio::select! {
                    () = tokio::time::sleep(self.config.now().follow_every()) => {}
                    () = self.interest.names_changed() => {}
                }
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// Asks for each followed name once.
    async fn round(&self) -> Result<(), CommitError> {
        let fresh = self.interest.take_fresh();
        for name in self.interest.names() {
            let key = self.own(&name);
            let is_own = key.is_some();
            if fresh.contains(&name) {
                self.commit.change_name(NameChange::Again { name: name.clone(), key }).await?;
            }
            // The host's own are in the log as they change.
            if is_own {
                continue;
            }
            match tokio::time::timeout(TIMEOUT, self.ask(&name)).await {
                Ok(Ok(())) => {}
                Ok(Err(FollowError::Commit(error))) => return Err(error),
                Ok(Err(FollowError::Backend(error))) => tracing::debug!(%name, "not resolved: {error}"),
                Err(_) => tracing::debug!(%name, "not resolved in {TIMEOUT:?}"),
            }
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

#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error(transparent)]
    Backend(#[from] BackendError),
}
