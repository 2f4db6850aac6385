//! Owns the IPNS name of the fleet, with which a host finds the roster without another member. It receives the record of
//! the operator, hands it to the daemon again and again, and fetches the roster of a newer record.

use std::cmp::Ordering;
use std::time::Duration;

use bytes::Bytes;
use dim_ipfs::ipns_record::{Record, RecordError};
use dim_model::ident::IpnsName;
use dim_model::time::Timestamp;
use dim_topics::identity::Digest;
use thiserror::Error;
use tokio::sync::oneshot;

use super::ReliableTopics;
use super::channel::Input;
use super::membership::BlockKind;

/// The pause between lookups of the name while the host has no roster.
const WITHOUT_ROSTER: Duration = Duration::from_secs(20);

/// The pause between lookups of the name. Usually a host learns of a new roster from the heads of another member.
const WITH_ROSTER: Duration = Duration::from_secs(1_800);

/// The number of lookups after which a record is handed over again that the daemon finds. The network forgets it after two
/// days.
const LOOKUPS: u32 = 8;

/// The reason why a record of the fleet's name is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NameError {
    /// The fleet of this host has no roster.
    #[error("the fleet of this host has no roster: join one with `dim fleet join`")]
    NoFleet,
    /// The record is not valid.
    #[error("{0}")]
    Record(String),
    /// The record does not lead to a roster.
    #[error("the record does not point to the block of a roster")]
    Target,
    /// This host has a newer record.
    #[error("this host has a newer record, with sequence number {0}")]
    Older(u64),
}

impl From<RecordError> for NameError {
    fn from(error: RecordError) -> Self {
        Self::Record(error.to_string())
    }
}

/// What is stored of the name: its newest record, and the block to which it points.
#[derive(Debug, Default)]
pub struct StoredName {
    /// The record.
    pub record: Option<Vec<u8>>,
    /// The block.
    pub target: Option<Vec<u8>>,
}

/// The name of the fleet and its newest record.
#[derive(Debug)]
pub(super) struct RosterName {
    name: IpnsName,
    record: Option<Record>,
    /// The block to which the record points, if it was found.
    target: Option<Bytes>,
    lookups: u32,
}

impl RosterName {
    /// The name of a fleet, with the stored record.
    pub fn new(name: IpnsName, stored: StoredName, now: Timestamp) -> Self {
        let StoredName { record, target } = stored;
        let record = record.and_then(|bytes| Record::verify(&bytes, &name, now).ok());
        let mut it = Self { name, record, target: None, lookups: 0 };
        if let Some(block) = target {
            it.keep_target(&Bytes::from(block));
        }
        it
    }

    /// Keeps a block if it is the one to which the record points. Returns whether it is new.
    fn keep_target(&mut self, block: &Bytes) -> bool {
        let is_target = self.record.as_ref().is_some_and(|record| target(record) == Ok(Digest::of(block)));
        let is_new = is_target && self.target.as_ref() != Some(block);
        if is_new {
            self.target = Some(block.clone());
        }
        is_new
    }

    /// Takes in a record that is valid. Returns whether it is newer.
    fn take(&mut self, record: Record) -> Result<bool, NameError> {
        target(&record)?;
        match self.record.as_ref().map(|known| known.compare(&record)) {
            Some(Ordering::Greater) => {
                return Err(NameError::Older(self.record.as_ref().map_or(0, |known| known.sequence)));
            }
            Some(Ordering::Equal) => return Ok(false),
            None | Some(Ordering::Less) => {}
        }
        self.record = Some(record);
        self.target = None;
        Ok(true)
    }
}

/// The digest of the block to which a record points.
fn target(record: &Record) -> Result<Digest, NameError> {
    let (cid, below) = record.path.ipfs().ok_or(NameError::Target)?;
    let digest = Digest::of_text(&cid.to_string()).map_err(|_| NameError::Target)?;
    if below.is_empty() { Ok(digest) } else { Err(NameError::Target) }
}

impl ReliableTopics {
    /// Looks up the name of the fleet, and again later.
    pub(super) fn look_up_name(&mut self) {
        let Some(name) = self.roster_name.as_ref().filter(|_| self.parts.backend.network) else { return };
        let (name, backend) = (name.name.clone(), self.parts.backend.clone());
        let (clock, sender) = (self.parts.log.clock().clone(), self.parts.reliable.sender());
        let has_roster = self.member.membership().is_some_and(|it| it.roster().is_some());
        let pause = if has_roster { WITH_ROSTER } else { WITHOUT_ROSTER };
        self.spawn_until_stop(async move {
            let found = backend.record(&name).await;
            let found = found.inspect_err(|why| tracing::debug!("the name of the fleet is not found: {why}"));
            let _ = sender.send(Input::NameFound(found.ok().map(Box::new))).await;
            clock.sleep(pause).await;
            let _ = sender.send(Input::NameDue).await;
        });
    }

    /// Takes in the record that the daemon finds. The own record is handed over if it is newer.
    pub(super) fn name_found(&mut self, found: Option<Record>) {
        let Some(it) = &mut self.roster_name else { return };
        let sequence = found.as_ref().map(|record| record.sequence);
        let taken = found.map(|record| (record.bytes.clone(), it.take(record)));
        it.lookups += 1;
        let is_due = it.lookups % LOOKUPS == 1;
        let is_behind =
            it.record.as_ref().is_some_and(|own| sequence.is_none_or(|found| found < own.sequence));
        match taken {
            Some((bytes, Ok(true))) => self.store_record(bytes),
            Some((_, Err(why @ NameError::Target))) => {
                tracing::warn!("the name of the fleet is refused: {why}");
            }
            _ if is_behind || is_due => self.put_record(),
            _ => {}
        }
        self.fetch_target();
    }

    /// Fetches the roster to which the name points if it is newer than that of this host, or if nobody provides it.
    fn fetch_target(&self) {
        let Some(RosterName { record: Some(record), target: kept, .. }) = &self.roster_name else { return };
        let version = self.member.membership().and_then(|it| it.roster()).map(|it| it.roster.version);
        let is_news = version.is_none_or(|version| version < record.sequence);
        if let Ok(digest) = target(record)
            && (is_news || kept.is_none())
        {
            self.fetch_membership(digest, BlockKind::Roster);
        }
    }

    /// Keeps the block of a roster if the name points to it.
    pub(super) fn keep_target(&mut self, block: &Bytes) {
        if self.roster_name.as_mut().is_some_and(|it| it.keep_target(block)) {
            let block = block.clone();
            self.change_files("the roster of the fleet's name", move |files| files.write_target(&block));
        }
    }

    /// Takes in a record of the operator.
    pub(super) fn offered_record(&mut self, bytes: Vec<u8>, to: oneshot::Sender<Result<(), NameError>>) {
        let wall = self.now().wall;
        let taken = match &mut self.roster_name {
            None => Err(NameError::NoFleet),
            Some(it) => Record::verify(&bytes, &it.name, wall)
                .map_err(NameError::from)
                .and_then(|record| it.take(record)),
        };
        if let Ok(is_newer) = taken {
            if is_newer {
                self.store_record(bytes);
            }
            // The operator has given the roster before.
            let roster = self.member.membership().and_then(|it| it.roster()).map(|it| it.to_block());
            roster.iter().for_each(|block| self.keep_target(block));
            self.put_record();
        }
        // The caller may have disconnected.
        let _ = to.send(taken.map(|_| ()));
    }

    fn store_record(&self, bytes: Vec<u8>) {
        self.change_files("the record of the fleet's name", move |files| files.write_record(&bytes));
    }

    /// Hands the record and the roster to the daemon.
    fn put_record(&self) {
        let Some(RosterName { name, record: Some(record), target, .. }) = &self.roster_name else { return };
        if let Some(block) = target {
            self.provide(block.clone());
        }
        let (backend, name) = (self.parts.backend.clone(), name.clone());
        let bytes = Bytes::from(record.bytes.clone());
        self.spawn_until_stop(async move {
            if let Err(why) = backend.names.put(&name, bytes).await {
                tracing::debug!("the record of the fleet's name is not published yet: {why}");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use dim_ipfs::keys::name_of;
    use libp2p_identity::Keypair;

    use super::*;

    #[test]
    fn the_newest_record_that_points_to_a_block_counts() {
        let pair = Keypair::generate_ed25519();
        let record = |path: &str, sequence| {
            let ttl = Duration::from_secs(60);
            Record::sign(&pair, &path.parse().unwrap(), sequence, Timestamp(u64::MAX / 2), ttl)
        };
        let digest = Digest::of(b"roster");
        let path = format!("/ipfs/{digest}");
        let mut it = RosterName::new(name_of(&pair), StoredName::default(), Timestamp(1));
        assert_eq!(it.take(record(&path, 2)), Ok(true));
        let block = Bytes::from_static(b"roster");
        let kept =
            [&b"other"[..], b"roster", b"roster"].map(|block| it.keep_target(&Bytes::from_static(block)));
        assert_eq!(kept, [false, true, false]);
        assert_eq!(it.take(record(&path, 2)), Ok(false));
        assert_eq!(it.take(record(&path, 1)), Err(NameError::Older(2)));
        assert_eq!(it.take(record(&format!("{path}/below"), 3)), Err(NameError::Target));
        assert_eq!(it.take(record("/ipns/example.org", 3)), Err(NameError::Target));
        let record = it.record.as_ref().map(|record| record.bytes.clone());
        let stored = StoredName { record, target: Some(block.to_vec()) };
        let again = RosterName::new(name_of(&pair), stored, Timestamp(1));
        assert_eq!((again.record, again.target), (it.record, Some(block)));
    }
}
