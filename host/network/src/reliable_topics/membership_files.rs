//! Owns what a host keeps of the membership of its fleet: the newest roster and the key epochs of its groups. Each is a
//! file beside the keys of the host. It receives the keyring and returns the exchange of rosters and keys, with what is
//! kept.

use std::io;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use dim_age::x25519::Identity;
use dim_ipfs::keys::{Keyring, PrivateFiles};
use dim_model::ident::GroupName;
use dim_model::time::Timestamp;
use dim_topics::identity::Digest;
use dim_topics::membership::encryption::Secret;
use dim_topics::membership::exchange::{Exchange, RandomSource};
use dim_topics::membership::key_grant::{Epoch, EpochId};
use dim_topics::membership::roster::SignedRoster;
use dim_topics::membership::{Membership, RosterFork};
use dim_topics::own_log::Author;

use super::roster_name::StoredName;

/// The name of the file of the roster.
const ROSTER: &str = "roster";

/// The name of the file of the newest record of the fleet's IPNS name.
const RECORD: &str = "record";

/// The name of the file of the roster to which this record points.
const TARGET: &str = "record.roster";

/// The beginning of the name of the file of an epoch. The group, the number and the identity follow, as in
/// `epoch.jobs.7.00112233445566778899aabbccddeeff`.
const EPOCH: &str = "epoch.";

/// The beginning of the name of the file of a refused roster. The version and the digests of the kept and the refused
/// roster follow.
const FORK: &str = "fork.";

/// The files of the membership of a fleet.
#[derive(Clone, Debug)]
pub struct MembershipFiles {
    files: Arc<PrivateFiles>,
    /// The version of the roster that was written last.
    written: Arc<Mutex<u64>>,
}

impl MembershipFiles {
    /// Opens the files of a fleet, and returns the exchange of the member `author` with what they hold. A file that
    /// cannot be read as what it should be is left alone: the other members have the roster and the keys.
    pub fn open(keys: &Keyring, author: &Author, identity: Identity) -> io::Result<(Self, Exchange)> {
        let files = keys.private_files(&format!(".fleet-{}", author.fleet))?;
        let all = files.all()?;
        let roster = all.iter().find(|(name, _)| name == ROSTER);
        let roster = roster.and_then(|(name, bytes)| {
            let opened = SignedRoster::open(&Bytes::copy_from_slice(bytes), &author.fleet);
            opened.inspect_err(|why| tracing::error!(file = name, "the stored roster is invalid: {why}")).ok()
        });
        let mut membership = Membership::new(author.fleet.clone(), author.id(), identity, roster);
        for (name, bytes) in &all {
            if let Some((group, epoch)) = name.strip_prefix(EPOCH).and_then(|name| parsed_epoch(name, bytes))
            {
                membership.restore(group, [epoch]);
            } else if let Some(fork) = name.strip_prefix(FORK).and_then(parsed_fork) {
                membership.restore_fork(fork);
            }
        }
        let random = RandomSource::new(rand::fill);
        let it = Self { files: Arc::new(files), written: Arc::default() };
        Ok((it, Exchange::new(membership, author.key.clone(), random)))
    }

    /// Stores a roster, unless a later version was stored before. Blocks.
    pub fn write_roster(&self, version: u64, block: &[u8]) -> io::Result<()> {
        let mut written = self.written.lock().expect("no one panics while holding the version");
        if version > *written {
            self.files.write(ROSTER, block)?;
            *written = version;
        }
        Ok(())
    }

    /// Stores epochs of a group. Blocks.
    pub fn write_epochs(&self, group: &GroupName, epochs: &[Epoch]) -> io::Result<()> {
        for Epoch { id, roster, time, secret } in epochs {
            let name = epoch_file(group, id);
            let bytes = [&roster.to_be_bytes()[..], &time.0.to_be_bytes(), secret.bytes()].concat();
            self.files.write(&name, &zeroize::Zeroizing::new(bytes))?;
        }
        Ok(())
    }

    /// What is stored of the fleet's IPNS name. Blocks.
    pub fn name(&self) -> io::Result<StoredName> {
        Ok(StoredName { record: self.files.read(RECORD)?, target: self.files.read(TARGET)? })
    }

    /// Stores the roster to which the fleet's IPNS name points. Blocks.
    pub fn write_target(&self, block: &[u8]) -> io::Result<()> {
        self.files.write(TARGET, block)
    }

    /// Stores a record of the fleet's IPNS name. Blocks.
    pub fn write_record(&self, record: &[u8]) -> io::Result<()> {
        self.files.write(RECORD, record)
    }

    /// Deletes epochs of a group. Blocks.
    pub fn remove_epochs(&self, group: &GroupName, epochs: &[EpochId]) -> io::Result<()> {
        epochs.iter().try_for_each(|id| self.files.remove(&epoch_file(group, id)))
    }

    /// Stores a refused roster as a proof. Blocks.
    pub fn write_fork(&self, fork: &RosterFork, block: &[u8]) -> io::Result<()> {
        self.files.write(&fork_file(fork), block)
    }
}

fn epoch_file(group: &GroupName, id: &EpochId) -> String {
    format!("{EPOCH}{group}.{}.{:032x}", id.number, u128::from_be_bytes(id.id))
}

fn fork_file(fork: &RosterFork) -> String {
    format!("{FORK}{}.{}.{}", fork.version, fork.kept, fork.refused)
}

/// Parses the name of the file of a refused roster after its beginning.
fn parsed_fork(name: &str) -> Option<RosterFork> {
    let mut parts = name.split('.');
    let version = parts.next()?.parse().ok()?;
    let kept = Digest::of_text(parts.next()?).ok()?;
    let refused = Digest::of_text(parts.next()?).ok()?;
    Some(RosterFork { version, kept, refused })
}

/// Parses the name of the file of an epoch after its beginning, and its content: the version of the roster and the time,
/// 8 bytes each and big-endian, and the secret.
fn parsed_epoch(name: &str, bytes: &[u8]) -> Option<(GroupName, Epoch)> {
    let mut parts = name.split('.');
    let group = parts.next()?.parse().ok()?;
    let number = parts.next()?.parse().ok()?;
    let id = u128::from_str_radix(parts.next()?, 16).ok()?.to_be_bytes();
    let (roster, rest) = bytes.split_first_chunk()?;
    let (time, secret) = rest.split_first_chunk()?;
    let epoch = Epoch {
        id: EpochId { number, id },
        roster: u64::from_be_bytes(*roster),
        time: Timestamp(u64::from_be_bytes(*time)),
        secret: Secret::new(secret.try_into().ok()?),
    };
    Some((group, epoch))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_rosters_come_back_from_their_files() {
        let fork = RosterFork { version: 7, kept: Digest([1; 32]), refused: Digest([2; 32]) };
        assert_eq!(fork_file(&fork).strip_prefix(FORK).and_then(parsed_fork), Some(fork));
        assert_eq!(parsed_fork("7"), None);
    }

    #[test]
    fn epochs_come_back_from_their_files() {
        let epoch = Epoch {
            id: EpochId { number: 7, id: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15] },
            roster: 3,
            time: Timestamp(5),
            secret: Secret::new([9; 32]),
        };
        let bytes = [&3_u64.to_be_bytes()[..], &5_u64.to_be_bytes(), &[9; 32]].concat();
        let name = "jobs.7.000102030405060708090a0b0c0d0e0f";
        assert_eq!(parsed_epoch(name, &bytes), Some(("jobs".parse().unwrap(), epoch)));
        for (name, bytes) in [("jobs.7", &bytes[..]), ("Jobs.7.00", &bytes), (name, &bytes[1..])] {
            assert_eq!(parsed_epoch(name, bytes), None, "{name}");
        }
    }
}
