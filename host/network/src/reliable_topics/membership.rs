//! Owns the way of rosters and keys: from the daemon and the operator to the protocol, and from the protocol to the files
//! of the host and the daemon.

use std::time::Duration;

use bytes::Bytes;
use dim_model::ident::{GroupName, IpnsName, Topic};
use dim_topics::block::MAX_BLOCK;
use dim_topics::identity::Digest;
use dim_topics::membership::RosterFork;
use dim_topics::membership::key_grant::Epoch;
use dim_topics::membership::roster::SignedRoster;
use tokio::sync::oneshot;

use super::channel::Input;
use super::intake::FETCH;
use super::{ReliableTopics, Waiting};

/// The pause between log lines about a topic that nothing can be published on.
const WARN: Duration = Duration::from_secs(60);

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
    /// The rosters that were refused, because the admins have signed others of their versions.
    pub forks: Vec<RosterFork>,
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
                if let Err(why) = self.member.take_roster(block, now) {
                    tracing::warn!("a roster is refused: {why}");
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
    fn form_waiting(&mut self) {
        let waiting = self.waiting.iter().filter(|(_, waiting)| !waiting.queue.is_empty());
        for topic in waiting.map(|(topic, _)| topic.clone()).collect::<Vec<_>>() {
            self.form(&topic);
        }
    }

    /// Takes in a roster of the operator. Answers with its version, or with the reason why it is refused.
    pub(super) fn offered_roster(&mut self, block: &Bytes, to: oneshot::Sender<Result<u64, String>>) {
        let now = self.now();
        let answer = match self.member.membership() {
            None => Err("the fleet of this host has no roster: `fleet.name` in the config must be the name that `dim fleet init` printed".to_owned()),
            Some(_) => self.member.take_roster(block, now).map_err(|why| why.to_string()).map(|_| {
                let roster = self.member.membership().and_then(|it| it.roster());
                roster.map_or(0, |it| it.roster.version)
            }),
        };
        // The caller may have disconnected.
        let _ = to.send(answer);
        self.form_waiting();
    }

    /// Makes the roster durable.
    pub(super) fn store_roster(&self, version: u64, block: Bytes) {
        let Some(files) = self.files.clone() else { return };
        self.tasks.spawn(async move {
            let written = tokio::task::spawn_blocking(move || files.write_roster(version, &block)).await;
            if let Err(error) = written.expect("a write does not panic") {
                tracing::error!("cannot store the roster, so it is fetched again after a restart: {error}");
            }
        });
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
        self.form_waiting();
    }

    /// Provides a roster or a key grant to other members.
    pub(super) fn provide(&self, block: Bytes) {
        self.put_block(Digest::of(&block), block);
    }

    /// Shows to the operator that the admins have signed two rosters of one version.
    pub(super) fn raise_roster_fork(&self, fork: RosterFork) {
        tracing::error!("alarm: {fork}");
    }

    /// Notes that the events of a topic wait for a key.
    pub(super) fn wait_for_key(&mut self, topic: &Topic, why: &impl std::fmt::Display) {
        let now = self.now().moment;
        let waiting: &mut Waiting = self.waiting.get_mut(topic).expect("the caller has made it");
        if waiting.warned.is_none_or(|at| now.since(at) >= WARN) {
            waiting.warned = Some(now);
            tracing::warn!(%topic, "events wait until they can be encrypted: {why}");
        }
    }

    /// Says that a topic is encrypted, if the config does.
    pub(super) fn encrypt_if_configured(&mut self, topic: &Topic) {
        if self.member.membership().is_some()
            && let Some(group) = self.parts.reliable.settings(topic).and_then(|settings| settings.group)
        {
            self.member.encrypt(topic.clone(), group);
        }
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
        Some(FleetState {
            name: membership.fleet().to_owned(),
            id: id.name(),
            sealing: membership.recipient().to_string(),
            roster: roster.cloned(),
            epochs: groups.unwrap_or_default().into_iter().map(epoch).collect(),
            forks: membership.forks().copied().collect(),
        })
    }
}
