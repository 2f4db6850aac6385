//! Owns the exchange of rosters and keys between the members: what a member states in its heads, what it fetches and
//! asks for, and what a keeper makes and answers. It receives heads, blocks that were fetched, and the time.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use dim_model::ident::{GroupName, Topic};
use dim_model::time::Timestamp;
use ed25519_dalek::SigningKey;

use super::encryption::Nonce;
use super::key_grant::{Epoch, KeyGrant};
use super::observed::Observations;
use super::roster::SignedRoster;
use super::{KEEPER_PAUSE, Membership, NoKey, Refusal, RosterChange, RosterFork};
use crate::action::Action;
use crate::bundle::{Bundle, Event, Sealing};
use crate::head::{Head, RosterHead};
use crate::identity::{Digest, WriterId};
use crate::malformed::Malformed;
use crate::time::{Moment, Now};

/// The pause between two attempts to fetch the same block.
const FETCH_PAUSE: Duration = Duration::from_secs(2);

/// The maximum number of rosters and key grants that are fetched at once. Anybody can name them in a head.
const MAX_FETCHES: usize = 16;

/// The number of fetches at which the rosters of others than members are not fetched.
const MAX_OF_STRANGERS: usize = 4;

/// The maximum number of key grants that a head names.
pub const MAX_GRANTS: usize = 16;

/// The maximum number of epochs that a head asks for.
pub const MAX_NEEDS: usize = 16;

/// The time for which heads name a key grant.
const ANNOUNCED: Duration = Duration::from_secs(180);

/// The pause between two answers of a keeper to the same member, and between two requests.
const ANSWER_PAUSE: Duration = Duration::from_secs(2);

/// The time after which a member that is no keeper answers a request, because no keeper has.
const KEEPERS_FIRST: Duration = Duration::from_secs(5);

/// The maximum number of requests that are remembered.
const MAX_REMEMBERED: usize = 1_024;

/// The pause between looks at the age of keys.
const KEY_CHECK: Duration = Duration::from_secs(60);

/// The maximum number of key grants that are remembered, so that none is fetched twice.
const MAX_SEEN: usize = 4_096;

/// Fills bytes with random numbers.
type Fill = Box<dyn FnMut(&mut [u8]) + Send>;

/// A source of random numbers for secrets and nonces.
pub struct RandomSource(Fill);

impl RandomSource {
    /// A source that fills bytes by calling `fill`. The numbers must not repeat in a copy of the process or of its state,
    /// so they come from the operating system.
    pub fn new(fill: impl FnMut(&mut [u8]) + Send + 'static) -> Self {
        Self(Box::new(fill))
    }
}

impl fmt::Debug for RandomSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RandomSource")
    }
}

/// A request for epochs of a group: for the one with this identity, or for any with which one may write.
pub type Need = (GroupName, Option<[u8; 16]>);

/// A key grant that heads name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announced {
    /// The group.
    pub group: GroupName,
    /// The block.
    pub digest: Digest,
    /// The member for which it is; `None` if it is for all members of the group.
    pub receiver: Option<WriterId>,
}

/// Epochs that are being made durable, and the key grant that is provided afterwards.
#[derive(Debug)]
struct Storing {
    group: GroupName,
    epochs: Vec<Epoch>,
    /// If this member has made them: the key grant for the group.
    grant: Option<Bytes>,
}

/// The events of a bundle as a reader may have them.
#[derive(Debug)]
pub enum Opened {
    /// The events, or the reason why nobody can read them.
    Events(Result<Vec<Event>, Malformed>),
    /// The secret of their epoch is missing.
    NoSecret(Need),
    /// This member does not get the secret of their epoch.
    Refused,
}

/// The exchange of rosters and keys.
#[derive(Debug)]
pub struct Exchange {
    membership: Membership,
    id: WriterId,
    key: SigningKey,
    random: RandomSource,
    /// What heads say of the roster.
    roster: Option<RosterHead>,
    observations: Observations,
    /// The groups of the encrypted topics.
    groups: BTreeMap<Topic, GroupName>,
    announced: Vec<(Moment, Announced)>,
    /// The key grants that need not be fetched any more.
    seen: BTreeSet<Digest>,
    /// The blocks that are being fetched, or were not found, with the times of the attempts.
    fetching: BTreeMap<Digest, Moment>,
    needs: BTreeMap<Need, Option<Moment>>,
    /// The epochs that this member does not get.
    refused: BTreeSet<(GroupName, [u8; 16])>,
    answered: BTreeMap<(WriterId, Need), Moment>,
    /// The requests that nobody has answered for a while, with the times at which they were first heard.
    unanswered: BTreeMap<(WriterId, Need), (Moment, Moment)>,
    /// The groups for which a new epoch is due, with the times at which this member makes it.
    due: BTreeMap<GroupName, Moment>,
    next_check: Moment,
    storing: BTreeMap<u64, Storing>,
    stored: u64,
    /// The time at which the block of the roster was last provided.
    provided: Option<Moment>,
    /// The time at which a head was last sent because another one states an older roster.
    told: Option<Moment>,
    /// Whether the next head should be sent soon.
    hurries: bool,
}

impl Exchange {
    /// The exchange of the member with `key`.
    pub fn new(membership: Membership, key: SigningKey, random: RandomSource) -> Self {
        let mut it = Self {
            id: WriterId::of(&key.verifying_key()),
            membership,
            key,
            random,
            roster: None,
            observations: Observations::default(),
            groups: BTreeMap::new(),
            announced: Vec::new(),
            seen: BTreeSet::new(),
            fetching: BTreeMap::new(),
            needs: BTreeMap::new(),
            refused: BTreeSet::new(),
            answered: BTreeMap::new(),
            unanswered: BTreeMap::new(),
            due: BTreeMap::new(),
            next_check: Moment::default(),
            storing: BTreeMap::new(),
            stored: 0,
            provided: None,
            told: None,
            hurries: false,
        };
        it.update_roster();
        it
    }

    /// Follows the roster of the membership.
    fn update_roster(&mut self) {
        let Some(it) = self.membership.roster() else { return };
        let block = Digest::of(&it.to_block());
        self.roster = Some(RosterHead { version: it.roster.version, digest: it.digest, block });
        self.observations.retain(|member| it.roster.members.contains_key(member));
    }

    /// The membership.
    pub fn membership(&self) -> &Membership {
        &self.membership
    }

    /// What this member observes of the others.
    pub fn observations(&self) -> &Observations {
        &self.observations
    }

    /// Says that a topic is encrypted for a group.
    pub fn encrypt(&mut self, topic: Topic, group: GroupName) {
        self.groups.insert(topic, group);
    }

    /// The group for which a topic is encrypted.
    pub fn group_of(&self, topic: &Topic) -> Option<&GroupName> {
        self.groups.get(topic)
    }

    /// Whether a bundle may be taken in that was fetched, or arrived as a message.
    pub fn check_bundle(&mut self, bundle: &Bundle, is_fetched: bool, now: Now) -> Result<(), Refusal> {
        let (writer, group) = (bundle.header.writer, self.groups.get(&bundle.header.topic));
        let checked = self.membership.check_bundle(bundle, group, is_fetched);
        match (&checked, group, bundle.epoch()) {
            (Err(why), ..) => self.observations.refuse(*why, writer, now.wall),
            (Ok(()), Some(group), Some(epoch)) if !is_fetched => {
                self.observations.wrote(writer, group, *epoch);
            }
            (Ok(()), ..) => {}
        }
        checked
    }

    /// The encryption of the next bundle of a topic; `None` if the topic is not encrypted.
    pub fn sealing(&mut self, topic: &Topic, now: Now) -> Result<Option<Sealing>, NoKey> {
        let Some(group) = self.groups.get(topic) else { return Ok(None) };
        match self.membership.current_epoch(group, now.wall) {
            Ok(epoch) => {
                let (epoch, secret) = (epoch.id.id, epoch.secret.clone());
                let mut nonce: Nonce = [0; 24];
                (self.random.0)(&mut nonce);
                Ok(Some(Sealing { epoch, secret, nonce }))
            }
            Err(why) => {
                if let NoKey::NoEpoch(group) = &why {
                    let need = (group.clone(), None);
                    self.need(need);
                }
                Err(why)
            }
        }
    }

    /// Reads the events of a bundle that was checked.
    pub fn open(&self, bundle: &Bundle) -> Opened {
        let Some(epoch) = bundle.epoch() else { return Opened::Events(bundle.events()) };
        let Some(group) = self.groups.get(&bundle.header.topic) else {
            return Opened::Events(Err(Malformed::Events("they are encrypted, and the topic is not")));
        };
        let fleet = self.membership.fleet();
        // Usually the first secret is right. If none is, the last error counts.
        let mut events = None;
        for secret in self.membership.secrets(group, epoch) {
            let attempt = events.insert(bundle.decrypted_events(fleet, secret));
            if attempt.is_ok() {
                break;
            }
        }
        match events {
            Some(events) => Opened::Events(events),
            None if self.refused.contains(&(group.clone(), *epoch)) => Opened::Refused,
            None => Opened::NoSecret((group.clone(), Some(*epoch))),
        }
    }

    /// Gives up an epoch, until a key grant has it.
    pub fn give_up(&mut self, group: GroupName, epoch: [u8; 16]) {
        self.needs.remove(&(group.clone(), Some(epoch)));
        if self.refused.len() < MAX_SEEN {
            self.refused.insert((group, epoch));
        }
    }

    /// Asks for an epoch.
    pub fn need(&mut self, need: Need) {
        if self.needs.len() < 1_000 && !self.needs.contains_key(&need) {
            self.needs.insert(need, None);
            self.hurries = true;
        }
    }

    /// Whether the next head should be sent soon; asks only once.
    pub fn take_hurry(&mut self) -> bool {
        std::mem::take(&mut self.hurries)
    }

    /// Takes in what a head says about rosters and keys. The error says why its writer is no member.
    pub fn take_head(&mut self, head: &Head, now: Now, actions: &mut Vec<Action>) -> Result<(), Refusal> {
        // A roster is verified by its signatures, so anybody may name one.
        let groups = self.membership.check_member(&head.writer).map(|member| member.groups.clone());
        self.look_at_roster(head.roster.as_ref(), groups.is_ok(), now, actions);
        let groups = groups.inspect_err(|why| self.observations.refuse(*why, head.writer, now.wall))?;
        self.observations.heard(head.writer, head.roster.as_ref().map(|it| it.version), now.wall);
        for announced in &head.grants {
            let is_for_me = announced.receiver.is_none_or(|receiver| receiver == self.id);
            if is_for_me && groups.contains(&announced.group) && !self.seen.contains(&announced.digest) {
                self.fetch(announced.digest, now, || Action::FetchGrant(announced.digest), actions);
            }
        }
        for need in head.needs.iter().filter(|(group, _)| groups.contains(group)) {
            self.answer(&head.writer, need, now, actions);
        }
        Ok(())
    }

    fn look_at_roster(
        &mut self,
        stated: Option<&RosterHead>,
        is_of_member: bool,
        now: Now,
        actions: &mut Vec<Action>,
    ) {
        let own = self.membership.roster().map(|it| (it.roster.version, it.digest));
        let Some(RosterHead { version, digest, block }) = stated else {
            self.provide_roster(now, actions);
            return;
        };
        let (own_version, is_same) = own.map_or((0, false), |(own, known)| (own, known == *digest));
        let is_news = *version > own_version || *version == own_version && !is_same;
        self.forget_ended_fetches(now);
        if is_news && (is_of_member || self.fetching.len() < MAX_OF_STRANGERS) {
            self.fetch(*block, now, || Action::FetchRoster(*block), actions);
        } else if *version < own_version {
            self.provide_roster(now, actions);
        }
    }

    /// Provides the roster to a member that has an older one.
    fn provide_roster(&mut self, now: Now, actions: &mut Vec<Action>) {
        let Some(roster) = self.membership.roster() else { return };
        if self.provided.is_none_or(|at| now.moment.since(at) >= ANNOUNCED) {
            self.provided = Some(now.moment);
            actions.push(Action::Provide(roster.to_block()));
        }
        // Anybody can send heads.
        if self.told.is_none_or(|at| now.moment.since(at) >= ANSWER_PAUSE) {
            self.told = Some(now.moment);
            self.hurries = true;
        }
    }

    fn fetch(
        &mut self,
        digest: Digest,
        now: Now,
        action: impl FnOnce() -> Action,
        actions: &mut Vec<Action>,
    ) {
        self.forget_ended_fetches(now);
        if self.fetching.len() < MAX_FETCHES && !self.fetching.contains_key(&digest) {
            self.fetching.insert(digest, now.moment);
            actions.push(action());
        }
    }

    /// Forgets the fetches after whose pause the same block may be fetched again.
    fn forget_ended_fetches(&mut self, now: Now) {
        self.fetching.retain(|_, at| now.moment.since(*at) < FETCH_PAUSE);
    }

    /// Takes in a roster that was fetched, or that an admin has made.
    pub fn take_roster(
        &mut self,
        block: &Bytes,
        now: Now,
        actions: &mut Vec<Action>,
    ) -> Result<RosterChange, RosterRefusal> {
        let roster = SignedRoster::open(block, self.membership.fleet()).map_err(RosterRefusal::Malformed)?;
        let known = self.membership.forks().count();
        let change = self.membership.take_roster(roster).map_err(|fork| {
            let is_new = self.membership.forks().count() > known;
            actions.extend(is_new.then(|| Action::RosterFork { fork, block: block.clone() }));
            RosterRefusal::Fork(fork)
        })?;
        if change == RosterChange::New {
            self.update_roster();
            let current = self.membership.roster().expect("it was taken in");
            let (version, block) = (current.roster.version, current.to_block());
            actions.push(Action::StoreRoster { version, block });
            self.provided = None;
            self.provide_roster(now, actions);
            // What was answered with the roster before may be different now.
            self.answered.clear();
            self.fetching.clear();
            self.look_for_due(now);
        }
        Ok(change)
    }

    /// Takes in a key grant that was fetched. Returns its group if its readers can go on: some epochs are refused, or can
    /// be read with.
    pub fn take_grant(
        &mut self,
        block: &Bytes,
        now: Now,
        actions: &mut Vec<Action>,
    ) -> Result<Option<GroupName>, GrantRefusal> {
        let grant = KeyGrant::open(block, self.membership.fleet()).map_err(GrantRefusal::Malformed)?;
        let is_of_keeper = self.membership.is_keeper(&grant.writer, &grant.group);
        let epochs = match self.membership.read_grant(&grant) {
            // Only keepers decide with which keys members write. Others answer those that ask.
            Ok(_) if !is_of_keeper && grant.receiver.is_none() => Err(Refusal::NoKeeper),
            other => other,
        };
        if epochs != Err(Refusal::LaterRoster) {
            self.remember_seen(Digest::of(block));
        }
        let epochs = epochs.map_err(|why| {
            self.observations.refuse(why, grant.writer, now.wall);
            GrantRefusal::Refused(why)
        })?;
        let epochs = epochs.map_err(GrantRefusal::Malformed)?;
        let mut has_news = false;
        if is_of_keeper {
            if !epochs.is_empty() {
                self.store(grant.group.clone(), epochs, None, actions);
            }
        } else if !epochs.is_empty() {
            has_news = true;
            self.membership.offer(&grant.group, epochs);
            self.forget_met_needs(&grant.group);
        }
        let is_for_me = grant.receiver == Some(self.id);
        let unknown = |id: &[u8; 16]| self.membership.secrets(&grant.group, id).next().is_none();
        let refused: Vec<_> = grant.refused.iter().filter(|id| is_for_me && unknown(id)).copied().collect();
        has_news |= !refused.is_empty();
        for epoch in refused {
            self.give_up(grant.group.clone(), epoch);
        }
        Ok(has_news.then_some(grant.group))
    }

    fn remember_seen(&mut self, digest: Digest) {
        if self.seen.len() >= MAX_SEEN {
            self.seen.clear();
        }
        self.seen.insert(digest);
    }

    fn store(
        &mut self,
        group: GroupName,
        epochs: Vec<Epoch>,
        grant: Option<Bytes>,
        actions: &mut Vec<Action>,
    ) {
        self.stored += 1;
        actions.push(Action::StoreEpochs {
            number: self.stored,
            group: group.clone(),
            epochs: epochs.clone(),
        });
        self.storing.insert(self.stored, Storing { group, epochs, grant });
    }

    /// Notes that epochs are durable. From now on they are used. Returns the group.
    pub fn epochs_stored(&mut self, number: u64, now: Now, actions: &mut Vec<Action>) -> Option<GroupName> {
        let Storing { group, epochs, grant } = self.storing.remove(&number)?;
        for epoch in &epochs {
            self.refused.remove(&(group.clone(), epoch.id.id));
        }
        self.membership.restore(group.clone(), epochs);
        if let Some(grant) = grant {
            self.announce(group.clone(), grant, None, now, actions);
        }
        self.forget_met_needs(&group);
        self.look_for_due(now);
        Some(group)
    }

    /// Forgets the epochs of a group that were replaced before a time: what they encrypted is no longer kept.
    pub fn forget_before(&mut self, group: &GroupName, time: Timestamp, actions: &mut Vec<Action>) {
        let epochs = self.membership.forget_before(group, time);
        if !epochs.is_empty() {
            actions.push(Action::ForgetEpochs { group: group.clone(), epochs });
        }
    }

    /// Forgets the requests for epochs that are there.
    fn forget_met_needs(&mut self, group: &GroupName) {
        self.needs.retain(|(of, id), _| {
            of != group
                || match id {
                    Some(id) => self.membership.secrets(of, id).next().is_none(),
                    None => self.membership.newest_epoch(of).is_none(),
                }
        });
    }

    fn announce(
        &mut self,
        group: GroupName,
        grant: Bytes,
        receiver: Option<WriterId>,
        now: Now,
        actions: &mut Vec<Action>,
    ) {
        let digest = Digest::of(&grant);
        self.remember_seen(digest);
        self.announced.push((now.moment, Announced { group, digest, receiver }));
        actions.push(Action::Provide(grant));
        self.hurries = true;
    }

    /// Answers a request: a keeper at once, another member if no keeper has answered for a while.
    fn answer(&mut self, member: &WriterId, need: &Need, now: Now, actions: &mut Vec<Action>) {
        self.answered.retain(|_, at| now.moment.since(*at) < ANSWER_PAUSE);
        let (group, wanted) = need;
        let key = (*member, need.clone());
        let is_turn = self.membership.is_keeper(&self.id, group) || self.waits_long(&key, now);
        if self.answered.contains_key(&key) || !is_turn {
            return;
        }
        let random = &mut self.random.0;
        let answer = self.membership.answer(member, group, wanted.as_ref(), &self.key, random);
        if let Some(grant) = answer {
            self.answered.insert(key, now.moment);
            self.announce(group.clone(), grant, Some(*member), now, actions);
        }
    }

    /// Whether a request was heard before and is not answered yet.
    fn waits_long(&mut self, request: &(WriterId, Need), now: Now) -> bool {
        self.unanswered.retain(|_, (_, last)| now.moment.since(*last) < KEEPERS_FIRST.saturating_mul(3));
        if self.unanswered.len() >= MAX_REMEMBERED && !self.unanswered.contains_key(request) {
            return false;
        }
        let (first, last) = self.unanswered.entry(request.clone()).or_insert((now.moment, now.moment));
        *last = now.moment;
        now.moment.since(*first) >= KEEPERS_FIRST
    }

    /// Plans the epochs that this member must make as a keeper, and asks for those with which it may write.
    fn look_for_due(&mut self, now: Now) {
        for group in self.membership.groups_without_epoch() {
            if !self.membership.is_keeper(&self.id, &group) {
                self.need((group, None));
            }
        }
        let due = self.membership.due_epochs(now.wall);
        let is_being_stored =
            |group: &GroupName| self.storing.values().any(|it| it.group == *group && it.grant.is_some());
        let due: Vec<_> = due.into_iter().filter(|(group, _)| !is_being_stored(group)).collect();
        self.due.retain(|group, _| due.iter().any(|(it, _)| it == group));
        for (group, rank) in due {
            let pause = KEEPER_PAUSE.saturating_mul(u32::try_from(rank).unwrap_or(u32::MAX));
            self.due.entry(group).or_insert(now.moment.after(pause));
        }
    }

    /// Does what is due.
    pub fn wake(&mut self, now: Now, actions: &mut Vec<Action>) {
        if self.next_check <= now.moment {
            self.next_check = now.moment.after(KEY_CHECK);
            self.look_for_due(now);
        }
        let due: Vec<_> =
            self.due.iter().filter(|(_, at)| **at <= now.moment).map(|it| it.0.clone()).collect();
        for group in due {
            self.due.remove(&group);
            let random = &mut self.random.0;
            let (epoch, grant) = self.membership.new_epoch(&group, now.wall, &self.key, random);
            self.store(group, vec![epoch], Some(grant), actions);
        }
        let asks_again =
            |asked: &Option<Moment>| asked.is_some_and(|at| now.moment.since(at) >= ANSWER_PAUSE);
        self.hurries |= self.needs.values().any(asks_again);
    }

    /// The time at which [`Exchange::wake`] has work.
    pub fn deadline(&self) -> Moment {
        let asked = self.needs.values().flatten().map(|at| at.after(ANSWER_PAUSE));
        self.due.values().copied().chain(asked).chain([self.next_check]).min().expect("the last is there")
    }

    /// What the next head says about rosters and keys.
    pub fn state(&mut self, now: Now) -> (Option<RosterHead>, Vec<Announced>, Vec<Need>) {
        self.announced.retain(|(at, _)| now.moment.since(*at) < ANNOUNCED);
        let newest = self.announced.iter().rev().take(MAX_GRANTS).map(|(_, it)| it.clone()).collect();
        let mut needs: Vec<_> = self.needs.iter_mut().collect();
        needs.sort_by_key(|(_, asked)| **asked);
        let needs = needs.into_iter().take(MAX_NEEDS).map(|(need, asked)| {
            *asked = Some(now.moment);
            need.clone()
        });
        (self.roster, newest, needs.collect())
    }
}

/// The reason why a roster is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RosterRefusal {
    /// It is invalid.
    #[error(transparent)]
    Malformed(Malformed),
    /// The admins have signed another one of its version.
    #[error(transparent)]
    Fork(RosterFork),
}

/// The reason why a key grant is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrantRefusal {
    /// It is invalid.
    #[error(transparent)]
    Malformed(Malformed),
    /// Its writer may not issue it.
    #[error(transparent)]
    Refused(Refusal),
}

#[cfg(test)]
mod tests {
    use dim_age::x25519::Identity;
    use dim_model::time::{Timestamp, nanoseconds};

    use super::*;
    use crate::head::Place;
    use crate::identity::Incarnation;
    use crate::membership::roster::{Group, MemberRow, Roster};

    fn head(writer: u8, roster: Option<RosterHead>) -> Head {
        Head {
            writer: WriterId([writer; 32]),
            incarnation: Incarnation([1; 16]),
            began: Timestamp(1),
            number: 1,
            time: Timestamp(1),
            hello: false,
            place: Place::default(),
            topics: Vec::new(),
            received: Vec::new(),
            wants: Vec::new(),
            alarms: Vec::new(),
            roster,
            grants: Vec::new(),
            needs: Vec::new(),
        }
    }

    fn key(number: u8) -> SigningKey {
        SigningKey::from_bytes(&[number; 32])
    }

    fn group() -> GroupName {
        "all".parse().unwrap()
    }

    /// The exchange of a member with a number, in a fleet with the members 1, a keeper, and 2.
    fn exchange(number: u8) -> Exchange {
        let mut roster = Roster::first(&key(5), Timestamp(u64::MAX));
        roster.groups.insert(group(), Group { rekeyed: 1, history: false });
        let identity = |number: u8| Identity::new(&[number << 3; 32]);
        for member in [1, 2] {
            let row = MemberRow {
                label: format!("m{member}").parse().unwrap(),
                sealing: identity(member).recipient(),
                peers: Default::default(),
                addresses: Vec::new(),
                groups: [group()].into(),
                is_keeper: member == 1,
                since: 1,
            };
            roster.members.insert(WriterId::of(&key(member).verifying_key()), row);
        }
        let mut roster = roster.draft().unwrap();
        roster.sign(&key(5));
        let id = WriterId::of(&key(number).verifying_key());
        let fleet = roster.roster.fleet.clone();
        let membership = Membership::new(fleet, id, identity(number), Some(roster));
        let mut next = number;
        let random = RandomSource::new(move |bytes| {
            next = next.wrapping_add(1);
            bytes.fill(next);
        });
        Exchange::new(membership, key(number), random)
    }

    fn at(seconds: u64) -> Now {
        let time = Duration::from_secs(seconds);
        Now { moment: Moment(time), wall: Timestamp(nanoseconds(time)) }
    }

    /// Lets a keeper make an epoch, and returns the key grant.
    fn make(keeper: &mut Exchange, now: Now) -> Bytes {
        let mut actions = Vec::new();
        keeper.look_for_due(now);
        keeper.wake(now, &mut actions);
        let stored: Vec<u64> = actions
            .iter()
            .filter_map(|action| match action {
                Action::StoreEpochs { number, .. } => Some(*number),
                _ => None,
            })
            .collect();
        let mut actions = Vec::new();
        for number in stored {
            keeper.epochs_stored(number, now, &mut actions);
        }
        let grant = actions.into_iter().find_map(|action| match action {
            Action::Provide(block) => Some(block),
            _ => None,
        });
        grant.expect("a key is due")
    }

    #[test]
    fn keys_are_forgotten_with_what_they_encrypt_and_the_present_one_stays() {
        let mut keeper = exchange(1);
        make(&mut keeper, at(10));
        let week = super::super::EPOCH_AGE.as_secs() + 20;
        make(&mut keeper, at(week));
        let ids: Vec<_> = keeper.membership().epochs(&group()).map(|epoch| epoch.id).collect();
        assert_eq!(ids.len(), 2);
        let mut actions = Vec::new();
        keeper.forget_before(&group(), at(week).wall, &mut actions);
        assert!(actions.is_empty(), "{actions:?}");
        keeper.forget_before(&group(), at(week + 1).wall, &mut actions);
        keeper.forget_before(&group(), at(week + 1).wall, &mut actions);
        let [Action::ForgetEpochs { epochs, .. }] = &actions[..] else { panic!("{actions:?}") };
        assert_eq!(*epochs, ids[..1]);
        assert!(keeper.membership().epochs(&group()).map(|epoch| epoch.id).eq([ids[1]]));
    }

    #[test]
    fn a_key_for_all_is_taken_from_a_keeper_only_and_refusals_are_counted() {
        let (mut keeper, mut member) = (exchange(1), exchange(2));
        let of_keeper = make(&mut keeper, at(10));
        let mut actions = Vec::new();
        // The other member makes a key, too, and encrypts it for all.
        let random = &mut |bytes: &mut [u8]| bytes.fill(9);
        let (_, of_member) = member.membership.new_epoch(&group(), Timestamp(1), &key(2), random);
        let refused = Err(GrantRefusal::Refused(Refusal::NoKeeper));
        assert_eq!(keeper.take_grant(&of_member, at(11), &mut actions), refused);
        assert!(actions.is_empty(), "{actions:?}");
        let counted = keeper.observations().refused()[&Refusal::NoKeeper];
        let writer = WriterId::of(&key(2).verifying_key());
        assert_eq!((counted.count, counted.writer), (1, writer));
        assert_eq!(member.take_grant(&of_keeper, at(11), &mut actions), Ok(None));
        assert!(matches!(actions[..], [Action::StoreEpochs { .. }]), "{actions:?}");
    }

    #[test]
    fn heads_of_strangers_cause_few_fetches_and_few_heads() {
        let mut exchange = exchange(1);
        let now = Now { moment: Moment(Duration::from_secs(9)), wall: Timestamp(9) };
        let mut actions = Vec::new();
        for number in 10..50 {
            let digest = Digest([number; 32]);
            let newer = Some(RosterHead { version: u64::MAX, digest, block: digest });
            assert_eq!(exchange.take_head(&head(number, newer), now, &mut actions), Err(Refusal::Stranger));
        }
        assert_eq!(actions.len(), MAX_OF_STRANGERS, "{actions:?}");
        // A member that does not know the others any more learns of the new roster from a stranger.
        let later = Now { moment: now.moment.after(FETCH_PAUSE), wall: Timestamp(11) };
        let newer = Some(RosterHead { version: 2, digest: Digest([9; 32]), block: Digest([9; 32]) });
        exchange.take_head(&head(60, newer), later, &mut actions).unwrap_err();
        assert!(matches!(actions.pop(), Some(Action::FetchRoster(block)) if block == Digest([9; 32])));
        // Those without a roster are told of this one, but not each at once.
        let mut hurries = 0;
        for number in 10..50 {
            exchange.take_head(&head(number, None), now, &mut actions).unwrap_err();
            hurries += usize::from(exchange.take_hurry());
        }
        assert_eq!(hurries, 1);
        let provided = actions.iter().filter(|action| matches!(action, Action::Provide(_)));
        assert_eq!(provided.count(), 1);
    }
}
