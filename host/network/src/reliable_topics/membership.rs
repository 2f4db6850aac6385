//! Owns the way of rosters and keys: from the daemon and the operator to the protocol, and from the protocol to the files
//! of the host and the daemon.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::Duration;

use bytes::Bytes;
use dim_model::ident::{GroupName, IpnsName, Topic};
use dim_model::time::{Timestamp, nanoseconds};
use dim_topics::block::MAX_BLOCK;
use dim_topics::identity::{Digest, WriterId};
use dim_topics::membership::encryption::Secret;
use dim_topics::membership::key_grant::{Epoch, EpochId};
use dim_topics::membership::observed::{Observed, Refused};
use dim_topics::membership::roster::SignedRoster;
use dim_topics::membership::{EPOCH_AGE, Membership, NoKey, Refusal, RosterChange, RosterFork};
use tokio::sync::oneshot;

use super::channel::Input;
use super::intake::FETCH;
use super::membership_files::MembershipFiles;
use super::{ReliableTopics, Waiting};
use crate::encrypted_documents::{DocumentKey, NoDocumentKey};

/// The pause between log lines about a topic that nothing can be published on.
const WARN: Duration = Duration::from_secs(60);

/// The time for which a key is kept after what it encrypted is no longer kept. Clocks differ.
const KEY_MARGIN: Duration = Duration::from_secs(24 * 3_600);

/// The time for which a replaced key of a group without encrypted topics is kept. Its documents are encrypted again with
/// the next key, unless their host is away.
const DOCUMENT_KEYS: Duration = Duration::from_secs(30 * 24 * 3_600);

/// The time that keepers may take to replace a key that is old.
const OLD_KEY: Duration = Duration::from_secs(24 * 3_600);

/// The time before the expiry of the roster from which on the operator is told.
const EXPIRES_SOON: Duration = Duration::from_secs(7 * 24 * 3_600);

/// A roster or a key grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockKind {
    /// A roster.
    Roster,
    /// A key grant.
    Grant,
}

/// A fleet with a roster, as this host knows it.
#[derive(Clone, Debug)]
pub struct FleetState {
    /// The name of the fleet: the IPNS name of the key of its first admin.
    pub name: String,
    /// This host, by the IPNS name of its key.
    pub id: IpnsName,
    /// The public key of this host for which secrets are encrypted, in the form of the age format.
    pub sealing: String,
    /// The newest roster; `None` if this host has none yet.
    pub roster: Option<SignedRoster>,
    /// For each group of this host: the highest epoch with which it may write, if there is one.
    pub epochs: Vec<(GroupName, Option<String>)>,
    /// For each group of this host with a key: the time at which it was made.
    pub newest_keys: BTreeMap<GroupName, Timestamp>,
    /// The rosters that were refused, because the admins have signed others of their versions.
    pub forks: Vec<RosterFork>,
    /// The other members that were heard since the start.
    pub observed: BTreeMap<WriterId, ObservedMember>,
    /// What was refused since the start, by the reason.
    pub refused: BTreeMap<Refusal, Refused>,
}

/// Another member as this host observes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedMember {
    /// The time at which its last head arrived; `None` if only events of it were heard.
    pub heard: Option<Timestamp>,
    /// The version of the roster that it has.
    pub roster: Option<u64>,
    /// For each group: the key epoch with which it wrote last.
    pub epochs: BTreeMap<GroupName, String>,
}

/// Something about the fleet that the operator should know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FleetProblem {
    /// This host has no roster yet.
    #[error("this host has no roster of its fleet yet: add it with `dim fleet add`, where the admin key is")]
    NoRoster,
    /// This host is not in the roster.
    #[error("this host is no member of its fleet: add it with `dim fleet add`, where the admin key is")]
    NoMember,
    /// This host was removed.
    #[error(
        "this host was removed from its fleet with version {0} of the roster: it reads and writes no encrypted topic"
    )]
    Removed(u64),
    /// The roster has expired.
    #[error("the roster of the fleet expired at {0:.0}: encrypted topics wait until `dim fleet renew`")]
    Expired(Timestamp),
    /// The roster expires soon.
    #[error("the roster of the fleet expires at {0:.0}: then encrypted topics wait until `dim fleet renew`")]
    ExpiresSoon(Timestamp),
    /// No keeper has made a key.
    #[error(
        "group {0} of the fleet has no key for the current roster: events on its topics wait for a keeper"
    )]
    NoKey(GroupName),
    /// Keepers have not replaced the key for long.
    #[error(
        "the key of group {0} of the fleet is from {1:.0}, and keepers replace keys every 7 days: no keeper may be reachable"
    )]
    OldKey(GroupName, Timestamp),
    /// The admins have signed two rosters of one version.
    #[error("the admins of the fleet have signed two rosters: {0}")]
    Fork(RosterFork),
}

impl FleetState {
    /// What the operator should know, the most important first.
    pub fn problems(&self, now: Timestamp) -> Vec<FleetProblem> {
        let forks = self.forks.iter().map(|fork| FleetProblem::Fork(*fork));
        let Some(roster) = self.roster.as_ref().map(|it| &it.roster) else {
            return forks.chain([FleetProblem::NoRoster]).collect();
        };
        let id = WriterId::of_name(&self.id);
        let member = id.and_then(|id| roster.members.get(&id));
        let problem = if let Some(removed) = id.and_then(|id| roster.removed.get(&id)) {
            Some(FleetProblem::Removed(removed.version))
        } else if member.is_none() {
            Some(FleetProblem::NoMember)
        } else if roster.expires < now {
            Some(FleetProblem::Expired(roster.expires))
        } else if roster.expires < now.after(EXPIRES_SOON) {
            Some(FleetProblem::ExpiresSoon(roster.expires))
        } else {
            None
        };
        let missing = self.epochs.iter().filter(|(_, epoch)| member.is_some() && epoch.is_none());
        let keys = missing.map(|(group, _)| FleetProblem::NoKey(group.clone()));
        // With an expired roster there is no key either.
        let keys = keys.filter(|_| roster.expires >= now);
        let old = self.newest_keys.iter().filter(|(_, time)| {
            member.is_some() && time.after(EPOCH_AGE.saturating_add(OLD_KEY)) < now && roster.expires >= now
        });
        let old = old.map(|(group, time)| FleetProblem::OldKey(group.clone(), *time));
        forks.chain(problem).chain(keys).chain(old).collect()
    }
}

/// The name of a key epoch; its first bytes if this host does not have it.
fn epoch_name(membership: &Membership, group: &GroupName, id: &[u8; 16]) -> String {
    let known = membership.epochs(group).find(|epoch| epoch.id.id == *id).map(|epoch| epoch.id);
    known.map_or_else(
        || id.iter().take(4).fold("?-".to_owned(), |name, byte| format!("{name}{byte:02x}")),
        |id| id.to_string(),
    )
}

impl ReliableTopics {
    /// Fetches a roster or a key grant. What cannot be fetched is tried again when a head names it again.
    pub(super) fn fetch_membership(&self, digest: Digest, kind: BlockKind) {
        let (backend, sender) = (self.parts.backend.clone(), self.parts.reliable.sender());
        self.spawn_until_stop(async move {
            match backend.content.block(&digest.cid(), MAX_BLOCK, FETCH).await {
                Ok(block) => drop(sender.send(Input::MembershipFetched { block, kind }).await),
                Err(why) => tracing::debug!(%digest, ?kind, "a block cannot be fetched: {why}"),
            }
        });
    }

    /// Takes in a roster or a key grant that was fetched.
    pub(super) fn membership_fetched(&mut self, block: &Bytes, kind: BlockKind) {
        let now = self.now();
        match kind {
            BlockKind::Roster => {
                self.keep_target(block);
                if let Err(why) = self.member.take_roster(block, now) {
                    // Everybody can send such a block. The alarm of a fork is raised elsewhere.
                    tracing::debug!("a roster is refused: {why}");
                }
            }
            BlockKind::Grant => {
                if let Err(why) = self.member.take_grant(block, now) {
                    tracing::debug!("a key grant is refused: {why}");
                }
            }
        }
        self.form_waiting();
    }

    /// Publishes what waited for a roster or a key.
    pub(super) fn form_waiting(&mut self) {
        let waiting = self.waiting.iter().filter(|(_, waiting)| !waiting.queue.is_empty());
        for topic in waiting.map(|(topic, _)| topic.clone()).collect::<Vec<_>>() {
            self.form(&topic);
        }
    }

    /// Takes in a roster of the operator. Answers with its version once it is durable, or with the reason why it is
    /// refused.
    pub(super) fn offered_roster(&mut self, block: &Bytes, to: oneshot::Sender<Result<u64, String>>) {
        let now = self.now();
        let taken = match self.member.membership() {
            None => Err("the fleet of this host has no roster: join one with `dim fleet join`".to_owned()),
            Some(_) => self.member.take_roster(block, now).map_err(|why| why.to_string()),
        };
        let roster = self.member.membership().and_then(|it| it.roster());
        let version = roster.map_or(0, |it| it.roster.version);
        match taken {
            Ok(RosterChange::New) if self.files.is_some() => self.offered_rosters.push((version, to)),
            // The caller may have disconnected.
            taken => drop(to.send(taken.map(|_| version))),
        }
        self.form_waiting();
    }

    /// Makes the roster durable.
    pub(super) fn store_roster(&self, version: u64, block: Bytes) {
        let Some(files) = self.files.clone() else { return };
        let sender = self.parts.reliable.sender();
        self.tasks.spawn(async move {
            let written = tokio::task::spawn_blocking(move || files.write_roster(version, &block)).await;
            let written = written.expect("a write does not panic").map_err(|error| {
                let why = format!("cannot store the roster, so it is fetched again after a restart: {error}");
                tracing::error!("{why}");
                why
            });
            let _ = sender.send(Input::RosterStored { version, written }).await;
        });
    }

    /// Answers the callers whose roster is durable, or cannot be stored.
    pub(super) fn roster_stored(&mut self, version: u64, written: &Result<(), String>) {
        for (_, to) in self.offered_rosters.extract_if(.., |(offered, _)| *offered <= version) {
            // The caller may have disconnected.
            let _ = to.send(written.clone().map(|()| version));
        }
    }

    /// Makes epochs durable, and tells the protocol. An epoch that is not durable is not used.
    pub(super) fn store_epochs(&self, number: u64, group: GroupName, epochs: Vec<Epoch>) {
        let Some(files) = self.files.clone() else { return };
        let sender = self.parts.reliable.sender();
        self.tasks.spawn(async move {
            let write = move || files.write_epochs(&group, &epochs);
            match tokio::task::spawn_blocking(write).await.expect("a write does not panic") {
                Ok(()) => drop(sender.send(Input::EpochsStored(number)).await),
                Err(error) => tracing::error!("cannot store keys, so encrypted topics wait: {error}"),
            }
        });
    }

    /// Continues after epochs are durable: what waited for a key is published and read.
    pub(super) fn epochs_stored(&mut self, number: u64) {
        let now = self.now();
        self.member.epochs_stored(number, now);
        tracing::debug!(number, "key epochs are stored");
        // Documents are encrypted with the newest key.
        self.parts.commit.names.notify_one();
        self.form_waiting();
    }

    /// Provides a roster or a key grant to other members.
    pub(super) fn provide(&self, block: Bytes) {
        self.put_block(Digest::of(&block), block);
    }

    /// Shows to the operator that the admins have signed two rosters of one version, also after a restart.
    pub(super) fn raise_roster_fork(&self, fork: RosterFork, block: Bytes) {
        tracing::error!("alarm: {fork}");
        self.change_files("a refused roster", move |files| files.write_fork(&fork, &block));
    }

    /// Deletes the files of key epochs.
    pub(super) fn forget_epochs(&self, group: GroupName, epochs: Vec<EpochId>) {
        self.change_files("old keys", move |files| files.remove_epochs(&group, &epochs));
    }

    pub(super) fn change_files(
        &self,
        what: &'static str,
        change: impl FnOnce(&MembershipFiles) -> io::Result<()> + Send + 'static,
    ) {
        let Some(files) = self.files.clone() else { return };
        self.tasks.spawn(async move {
            let changed = tokio::task::spawn_blocking(move || change(&files)).await;
            if let Err(error) = changed.expect("a change of a file does not panic") {
                tracing::error!("cannot store or delete {what}: {error}");
            }
        });
    }

    /// Forgets the keys whose events and documents are no longer kept.
    pub(super) fn forget_old_keys(&mut self) {
        let wall = self.now().wall.0;
        let topics = self.parts.reliable.kept_of_groups();
        let roster = self.member.membership().and_then(|membership| membership.roster());
        let groups = roster.into_iter().flat_map(|it| it.roster.groups.keys()).chain(topics.keys());
        let groups: BTreeSet<_> = groups.cloned().collect();
        for group in groups {
            let kept = topics.get(&group).map_or(DOCUMENT_KEYS, |kept| kept.saturating_add(KEY_MARGIN));
            let since = wall.saturating_sub(nanoseconds(kept));
            self.member.forget_keys_before(&group, Timestamp(since));
        }
    }

    /// Whether a topic is encrypted and this host belongs to no fleet with a roster.
    pub(super) fn lacks_roster(&self, topic: &Topic) -> bool {
        self.member.membership().is_none() && self.parts.reliable.group(topic).is_some()
    }

    /// Notes that the events of a topic wait for a key.
    pub(super) fn wait_for_key(&mut self, topic: &Topic, why: &impl std::fmt::Display) {
        let now = self.now().moment;
        let waiting: &mut Waiting = self.waiting.get_mut(topic).expect("the caller has made it");
        if waiting.warned.is_none_or(|at| now.since(at) >= WARN) {
            waiting.warned = Some(now);
            tracing::warn!(%topic, "events wait until they can be encrypted: {why}");
        } else {
            tracing::debug!(%topic, "events still wait until they can be encrypted: {why}");
        }
    }

    /// Says that a topic is encrypted, if the config does.
    pub(super) fn encrypt_if_configured(&mut self, topic: &Topic) {
        if let Some(group) = self.parts.reliable.group(topic) {
            self.member.encrypt(topic.clone(), group.clone());
        }
    }

    /// The key with which this host encrypts documents for a group now, or the reason why there is none.
    pub(super) fn document_key(&self, group: &GroupName) -> Result<DocumentKey, NoDocumentKey> {
        let membership = self.member.membership().ok_or(NoKey::NoFleet)?;
        let epoch = membership.current_epoch(group, self.now().wall)?;
        Ok(DocumentKey {
            fleet: membership.fleet().to_owned(),
            group: group.clone(),
            epoch: epoch.id.id,
            secret: epoch.secret.clone(),
        })
    }

    /// The secrets that may be that of a key epoch of a group.
    pub(super) fn secrets(&self, fleet: &str, group: &GroupName, epoch: &[u8; 16]) -> Vec<Secret> {
        let membership = self.member.membership().filter(|it| it.fleet() == fleet);
        membership.iter().flat_map(|it| it.secrets(group, epoch)).cloned().collect()
    }

    /// The fleet as this host knows it; `None` if it has no roster.
    pub(super) fn fleet_state(&self) -> Option<FleetState> {
        let membership = self.member.membership()?;
        let wall = self.now().wall;
        let roster = membership.roster();
        let id = self.member.id();
        let groups = roster.and_then(|it| it.roster.members.get(&id)).map(|row| row.groups.clone());
        let epoch = |group: GroupName| {
            let epoch = membership.current_epoch(&group, wall).ok().map(|epoch| epoch.id.to_string());
            (group, epoch)
        };
        let made = |group: &GroupName| {
            let epoch = membership.current_epoch(group, wall).ok()?;
            Some((group.clone(), epoch.time))
        };
        let newest_keys = groups.iter().flatten().filter_map(made).collect();
        let observations = self.member.observations();
        let observed = |(member, it): (&WriterId, &Observed)| {
            let name =
                |(group, id): (&GroupName, &[u8; 16])| (group.clone(), epoch_name(membership, group, id));
            let epochs = it.epochs.iter().map(name).collect();
            (*member, ObservedMember { heard: it.heard, roster: it.roster, epochs })
        };
        Some(FleetState {
            observed: observations.iter().flat_map(|it| it.members()).map(observed).collect(),
            refused: observations.map(|it| it.refused().clone()).unwrap_or_default(),
            name: membership.fleet().to_owned(),
            id: id.name(),
            sealing: membership.recipient().to_string(),
            roster: roster.cloned(),
            epochs: groups.unwrap_or_default().into_iter().map(epoch).collect(),
            newest_keys,
            forks: membership.forks().copied().collect(),
        })
    }
}
