//! Owns the mirrors: the logs of other writers that this host keeps in its daemon, so that they can be read when the
//! daemon of the writer is gone. It receives verified heads. It fetches and verifies everything to which the index in a
//! head leads, pins it, and sends the head again while the writer is silent.

mod log_fetch;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dim_model::ident::{PeerName, Topic};
use dim_model::time::{Timestamp, nanoseconds};
use dim_store::mirrors::{self, Mirror};
use dim_topics::bundle::Bundle;
use dim_topics::head::Head;
use dim_topics::identity::{Digest, WriterId};
use dim_topics::time::{Moment, Now};
use tokio::sync::Semaphore;

use super::ReliableTopics;
use super::channel::Input;
use log_fetch::{Blocks, NotKept, Room, keep};

/// The maximum number of writers whose heads are kept.
const MAX_WRITERS: usize = 10_000;

/// The maximum size of the heads that are kept, in bytes. Further logs are not mirrored.
const MAX_HEADS: usize = 64 << 20;

/// The pause between checks for logs that are behind or expired and for silent writers.
const CHECK: Duration = Duration::from_secs(10);

/// A writer that was not heard for so long is silent.
const SILENT: Duration = Duration::from_secs(180);

/// The shortest time between two repetitions of heads.
const REPEAT_PAUSE: Duration = Duration::from_secs(5);

/// The maximum number of heads that are repeated at once.
const MAX_REPEATED: usize = 64;

/// The pause after a log could not be kept for another reason than the network.
const REFUSED_PAUSE: Duration = Duration::from_secs(300);

/// The age from which on the stored head of an unchanged log is replaced by a newer one.
const REFRESH: Duration = Duration::from_secs(600);

/// The number of bundles that are given to the daemon at once. The index leads to further ones later.
const MAX_PUTS: usize = 64;

/// The time that writers have to answer a request for heads before a mirror answers for them.
const ANSWER: Duration = Duration::from_secs(2);

/// A topic and a writer.
type LogId = (Topic, WriterId);

/// What is known of the log of a writer.
#[derive(Debug, Default)]
struct MirroredLog {
    /// What the daemon has pinned.
    pinned: Option<Mirror>,
    /// The time of the head in the stored row.
    stored: Timestamp,
    /// What the newest head states, if it is not pinned yet.
    wanted: Option<Mirror>,
    /// The time before which no other attempt begins, after one that was refused.
    not_before: Moment,
    /// Whether the operator was told that the log is not kept.
    is_told: bool,
    /// The pinned blocks. They are empty after a start, until they are read again.
    blocks: Arc<Blocks>,
}

/// What was heard of a writer.
#[derive(Debug, Default)]
struct Heard {
    /// The process start and the number of the newest head.
    newest: (Timestamp, u64),
    /// The time of the last head, also of one that another mirror has sent again.
    last: Option<Moment>,
}

/// The mirrors of a host.
#[derive(Debug)]
pub struct Mirrors {
    logs: BTreeMap<LogId, MirroredLog>,
    writers: BTreeMap<WriterId, Heard>,
    is_fetching: bool,
    /// The log that was fetched last. The others have their turns first.
    turn: Option<LogId>,
    /// Whether a repetition after a request for heads is planned.
    is_repeat_planned: bool,
    /// The time of the last repetition.
    repeated: Option<Moment>,
    /// The logs that are no longer mirrored and that the daemon still has pinned.
    ended: Vec<Mirror>,
    /// The own daemon. Its blocks need no mirror.
    daemon: Option<PeerName>,
    /// The bundles that may be given to the daemon.
    puts: Arc<Semaphore>,
}

impl Mirrors {
    /// Continues with what the daemon has pinned. It is read and pinned again, because the daemon may have lost it.
    pub fn new(pinned: Vec<Mirror>, fleet: &str) -> Self {
        let (mut logs, mut writers) = (BTreeMap::new(), BTreeMap::<WriterId, Heard>::new());
        for mirror in pinned {
            if let Ok(head) = Head::open(&mirror.head, fleet) {
                let heard = writers.entry(mirror.writer).or_default();
                heard.newest = heard.newest.max((head.began, head.number));
            }
            let id = (mirror.topic.clone(), mirror.writer);
            let (stored, pinned, wanted) = (mirror.time, Some(mirror.clone()), Some(mirror));
            logs.insert(id, MirroredLog { pinned, stored, wanted, ..MirroredLog::default() });
        }
        Self {
            logs,
            writers,
            is_fetching: false,
            turn: None,
            is_repeat_planned: false,
            repeated: None,
            ended: Vec::new(),
            daemon: None,
            puts: Arc::new(Semaphore::new(MAX_PUTS)),
        }
    }

    /// Notes the own daemon.
    pub fn set_daemon(&mut self, daemon: Option<PeerName>) {
        self.daemon = daemon;
    }

    /// Whether the daemon has pinned the log of a writer.
    pub fn has(&self, topic: &Topic, writer: &WriterId) -> bool {
        self.logs.get(&(topic.clone(), *writer)).is_some_and(|log| log.pinned.is_some())
    }

    /// Takes in a head of another member. `is_mirrored` says which topics are mirrored. Returns the rows of unchanged
    /// logs that have a newer head.
    fn take_head(
        &mut self,
        head: &Head,
        block: &Bytes,
        is_mirrored: impl Fn(&Topic) -> bool,
        now: Now,
    ) -> Vec<Mirror> {
        let mut refreshed = Vec::new();
        let is_local = head.place.peer.is_some() && head.place.peer == self.daemon;
        if is_local || !self.makes_room_for(&head.writer) {
            return refreshed;
        }
        let heard = self.writers.entry(head.writer).or_default();
        let number = (head.began, head.number);
        if number < heard.newest {
            // It does not state what the newest one does.
            return refreshed;
        }
        heard.last = Some(now.moment);
        if std::mem::replace(&mut heard.newest, number) == number {
            return refreshed;
        }
        // A clock that is ahead does not keep a log for ever.
        let time = head.time.min(now.wall);
        let mut room = MAX_HEADS.saturating_sub(self.head_bytes());
        for log in head.topics.iter().filter(|log| is_mirrored(&log.topic)) {
            let Some(root) = log.index else { continue };
            let Some(left) = room.checked_sub(block.len()) else { break };
            room = left;
            let it = self.logs.entry((log.topic.clone(), head.writer)).or_default();
            let stated =
                Mirror { topic: log.topic.clone(), writer: head.writer, root, head: block.clone(), time };
            match &mut it.pinned {
                Some(pinned) if pinned.root == root => {
                    (pinned.head, pinned.time) = (stated.head, time);
                    if time.since(it.stored) >= REFRESH {
                        it.stored = time;
                        refreshed.push(pinned.clone());
                    }
                }
                _ => it.wanted = Some(stated),
            }
        }
        refreshed
    }

    /// Forgets a writer without logs if there are too many writers. Returns whether another one may be added.
    fn makes_room_for(&mut self, writer: &WriterId) -> bool {
        if self.writers.contains_key(writer) || self.writers.len() < MAX_WRITERS {
            return true;
        }
        let with_logs: BTreeSet<WriterId> = self.logs.keys().map(|(_, writer)| *writer).collect();
        let without = self.writers.iter().filter(|(id, _)| !with_logs.contains(id));
        let Some(oldest) = without.min_by_key(|(_, heard)| heard.last).map(|(id, _)| *id) else {
            return false;
        };
        self.writers.remove(&oldest).is_some()
    }

    fn head_bytes(&self) -> usize {
        let mirrors = self.logs.values().flat_map(|log| log.pinned.iter().chain(&log.wanted));
        mirrors.map(|mirror| mirror.head.len()).sum()
    }

    /// Takes the next log that is not pinned as its newest head states, in turn.
    fn next(&mut self, now: Moment) -> Option<(Mirror, Option<Digest>, Arc<Blocks>)> {
        let is_behind = |(_, log): &(&LogId, &MirroredLog)| log.wanted.is_some() && log.not_before <= now;
        let after = (self.turn.as_ref().map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let next = self.logs.range(after).find(is_behind).or_else(|| self.logs.iter().find(is_behind));
        let id = next?.0.clone();
        self.turn = Some(id.clone());
        let log = self.logs.get_mut(&id)?;
        let before = log.pinned.as_ref().map(|pinned| pinned.root);
        Some((log.wanted.take()?, before, log.blocks.clone()))
    }

    /// The bytes of the logs of a topic, without one writer.
    fn bytes_beside(&self, (topic, writer): &LogId) -> u64 {
        let logs = self.logs.iter().filter(|((of, other), _)| of == topic && other != writer);
        logs.map(|(_, log)| log.blocks.bytes()).sum()
    }

    /// The heads of pinned logs whose writers were not heard since `since`, those of the longest silence first.
    fn silent(&self, since: Moment) -> Vec<Bytes> {
        let last = |writer: &WriterId| self.writers.get(writer).and_then(|heard| heard.last);
        let pinned = self.logs.values().filter_map(|log| log.pinned.as_ref());
        let mut silent: Vec<_> = pinned
            .map(|mirror| (last(&mirror.writer), mirror))
            .filter(|(last, _)| last.is_none_or(|last| last < since))
            .collect();
        silent.sort_by_key(|(last, _)| *last);
        // A head may state several logs.
        let mut seen = BTreeSet::new();
        let heads = silent.into_iter().map(|(_, mirror)| mirror.head.clone());
        heads.filter(|head| seen.insert(head.clone())).take(MAX_REPEATED).collect()
    }
}

/// An attempt to keep a log that has ended.
#[derive(Debug)]
pub struct Attempt {
    mirror: Mirror,
    result: Result<Blocks, NotKept>,
}

impl ReliableTopics {
    /// Removes the mirrors of topics that are no longer mirrored, and checks all others again and again.
    pub(super) fn watch_mirrors(&mut self) {
        let parts = self.parts.clone();
        let ended = |(topic, _): &LogId, _: &mut MirroredLog| !parts.reliable.is_mirrored(topic);
        let ended: Vec<_> = self.mirrors.logs.extract_if(.., ended).collect();
        self.end_mirrors(ended);
        let (clock, sender) = (self.parts.log.clock().clone(), self.parts.reliable.sender());
        self.spawn_until_stop(async move {
            while sender.send(Input::MirrorsDue).await.is_ok() {
                clock.sleep(CHECK).await;
            }
        });
    }

    /// Takes in a head of another member, and answers a request for heads after the writers had time to do so.
    pub(super) fn mirror_head(&mut self, head: &Head, block: &Bytes) {
        if !self.parts.reliable.has_mirrors() {
            return;
        }
        let (reliable, now) = (self.parts.reliable.clone(), self.now());
        let has_roster = self.member.membership().is_some();
        let is_mirrored = |topic: &Topic| {
            // Without a roster everybody could have written an encrypted topic.
            reliable.is_mirrored(topic) && (has_roster || reliable.group(topic).is_none())
        };
        let refreshed = self.mirrors.take_head(head, block, is_mirrored, now);
        for mirror in refreshed {
            self.write_mirror(mirror);
        }
        if head.hello {
            self.plan_repetition(ANSWER + self.member.spread() * 2, now.moment);
        }
        self.mirror_next();
    }

    /// Sends the heads of writers that are not heard until then, unless this is planned already.
    fn plan_repetition(&mut self, wait: Duration, unheard_since: Moment) {
        if std::mem::replace(&mut self.mirrors.is_repeat_planned, true) {
            return;
        }
        let (clock, sender) = (self.parts.log.clock().clone(), self.parts.reliable.sender());
        self.spawn_until_stop(async move {
            clock.sleep(wait).await;
            let _ = sender.send(Input::RepeatHeads { unheard_since }).await;
        });
    }

    /// Stores what the daemon has pinned of a log.
    fn write_mirror(&self, mirror: Mirror) {
        let commit = self.parts.commit.clone();
        self.spawn_write(async move { commit.write_later(move |write| mirrors::put(write, &mirror)).await });
    }

    /// Gives the bundles of mirrored logs to the daemon, which does not store messages.
    pub(super) fn mirror_bundle(&self, bundle: &Bundle) {
        if !self.parts.reliable.is_mirrored(&bundle.header.topic) || bundle.header.writer == self.member.id()
        {
            return;
        }
        if let Ok(permit) = self.mirrors.puts.clone().try_acquire_owned() {
            self.put_block_with(bundle.digest, bundle.block.clone(), permit);
        }
    }

    /// Answers a request for heads after the writers had time to do so.
    pub(super) fn repeat_unheard(&mut self, since: Moment) {
        self.mirrors.is_repeat_planned = false;
        self.repeat_heads(since);
    }

    /// Sends the heads of writers that were not heard since `since`.
    fn repeat_heads(&mut self, since: Moment) {
        let now = self.now().moment;
        if let Some(pause) = self.mirrors.repeated.and_then(|at| REPEAT_PAUSE.checked_sub(now.since(at))) {
            self.plan_repetition(pause, since);
            return;
        }
        let heads = self.mirrors.silent(since);
        if heads.is_empty() {
            return;
        }
        tracing::debug!(heads = heads.len(), "sending the heads of silent writers again");
        self.mirrors.repeated = Some(now);
        self.outgoing.foreign_heads(&self.parts.reliable.channels().heads, heads);
    }

    /// Does what is due: removes old mirrors, keeps what is missing, and sends the heads of silent writers again.
    pub(super) fn check_mirrors(&mut self) {
        let now = self.now();
        let reliable = self.parts.reliable.clone();
        let is_old = |(topic, _): &LogId, log: &mut MirroredLog| {
            let time = reliable.settings(topic).map_or(Duration::ZERO, |it| it.time);
            let newest = log.wanted.as_ref().or(log.pinned.as_ref());
            newest.is_none_or(|it| it.time.0.saturating_add(nanoseconds(time)) < now.wall.0)
        };
        let old: Vec<_> = self.mirrors.logs.extract_if(.., is_old).collect();
        // With those that could not be unpinned before.
        self.end_mirrors(old);
        let silence = SILENT.max(self.member.spread() * 3);
        if let Some(since) = now.moment.0.checked_sub(silence) {
            self.repeat_heads(Moment(since));
        }
        self.mirror_next();
    }

    /// Unpins logs that are no longer mirrored, and removes their rows. What the daemon does not unpin is tried again.
    fn end_mirrors(&mut self, ended: Vec<(LogId, MirroredLog)>) {
        self.mirrors.ended.extend(ended.into_iter().filter_map(|(_, log)| log.pinned));
        for mirror in std::mem::take(&mut self.mirrors.ended) {
            let (backend, sender) = (self.parts.backend.clone(), self.parts.reliable.sender());
            self.spawn_until_stop(async move {
                let is_unpinned = backend.content.unpin(&mirror.root.cid()).await.is_ok();
                let _ = sender.send(Input::MirrorEnded { mirror: Box::new(mirror), is_unpinned }).await;
            });
        }
    }

    /// Removes the row of a log that was unpinned, or tries again later.
    pub(super) fn mirror_ended(&mut self, mirror: Mirror, is_unpinned: bool) {
        let (topic, writer) = (mirror.topic.clone(), mirror.writer);
        let log = self.mirrors.logs.get_mut(&(topic.clone(), writer));
        let pinned_again = log.and_then(|log| Some((log.pinned.clone()?, &mut log.wanted)));
        match pinned_again {
            Some((pinned, wanted)) if pinned.root == mirror.root => {
                // It is mirrored again, and its pin may be gone.
                wanted.get_or_insert(pinned);
                return;
            }
            _ if !is_unpinned => {
                self.mirrors.ended.push(mirror);
                return;
            }
            Some(_) => return,
            None => {}
        }
        tracing::debug!(%topic, %writer, "the log is no longer mirrored");
        let commit = self.parts.commit.clone();
        self.spawn_write(async move {
            commit.write_later(move |write| mirrors::remove(write, &topic, &writer)).await
        });
    }

    /// Begins to keep the next log, unless one is being fetched.
    fn mirror_next(&mut self) {
        if self.mirrors.is_fetching || !self.parts.backend.network {
            return;
        }
        let now = self.now().moment;
        let Some((mirror, before, known)) = self.mirrors.next(now) else { return };
        self.mirrors.is_fetching = true;
        let id = (mirror.topic.clone(), mirror.writer);
        let most = self.parts.reliable.settings(&id.0).map_or(0, |it| it.bytes);
        let room = Room { left: most.saturating_sub(self.mirrors.bytes_beside(&id)), most };
        let (parts, sender) = (self.parts.clone(), self.parts.reliable.sender());
        self.spawn_until_stop(async move {
            let result = keep(&parts, &mirror, before, &known, room).await;
            let _ = sender.send(Input::Mirrored(Box::new(Attempt { mirror, result }))).await;
        });
    }

    /// Continues after an attempt to keep a log.
    pub(super) fn mirrored(&mut self, Attempt { mirror, result }: Attempt) {
        self.mirrors.is_fetching = false;
        let now = self.now().moment;
        let id = (mirror.topic.clone(), mirror.writer);
        // The log may have expired meanwhile; then a pin of it is removed with its row, after the next start.
        let log = self.mirrors.logs.entry(id).or_default();
        let (topic, writer) = (&mirror.topic, &mirror.writer);
        match result {
            Ok(blocks) => {
                log.blocks = Arc::new(blocks);
                log.is_told = false;
                // A newer head may have stated the same root meanwhile.
                let newer = log.pinned.take().filter(|it| it.root == mirror.root && it.time > mirror.time);
                let pinned = newer.unwrap_or(mirror);
                log.stored = pinned.time;
                log.pinned = Some(pinned.clone());
                self.write_mirror(pinned);
                self.mirror_next();
            }
            Err(why @ (NotKept::Backend(_) | NotKept::Slow)) => {
                tracing::debug!(%topic, %writer, "a log is not mirrored yet: {why}");
                log.wanted.get_or_insert(mirror);
            }
            Err(why) => {
                if !std::mem::replace(&mut log.is_told, true) {
                    tracing::warn!(%topic, %writer, "a log is not mirrored: {why}");
                }
                log.not_before = now.after(REFUSED_PAUSE);
                log.wanted.get_or_insert(mirror);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use dim_topics::head::{LogHead, Place};
    use dim_topics::identity::Incarnation;

    use super::*;

    fn at(seconds: u64) -> Moment {
        Moment(Duration::from_secs(seconds))
    }

    fn head(writer: u8, number: u64, root: u8) -> Head {
        let incarnation = Incarnation([writer; 16]);
        let log = |topic: &str| LogHead {
            topic: topic.parse().unwrap(),
            incarnation,
            next: number,
            kept: Timestamp(0),
            recent: Vec::new(),
            earlier: Vec::new(),
            index: Some(Digest([root; 32])),
        };
        Head {
            writer: WriterId([writer; 32]),
            incarnation,
            began: Timestamp(1),
            number,
            time: Timestamp(number),
            hello: false,
            place: Place::default(),
            topics: vec![log("jobs"), log("other")],
            received: Vec::new(),
            wants: Vec::new(),
            alarms: Vec::new(),
            roster: None,
            grants: Vec::new(),
            needs: Vec::new(),
        }
    }

    fn block(writer: u8, number: u64) -> Bytes {
        Bytes::from(vec![writer, number as u8])
    }

    /// Takes in the head of a writer, of whose topics "jobs" is mirrored.
    fn take(mirrors: &mut Mirrors, writer: u8, number: u64, root: u8, moment: Moment) {
        let is_mirrored = |topic: &Topic| topic.as_str() == "jobs";
        let now = Now { moment, wall: Timestamp(1_000) };
        mirrors.take_head(&head(writer, number, root), &block(writer, number), is_mirrored, now);
    }

    /// Keeps the next log, as if the daemon had pinned it. Returns its writer and root.
    fn keep_next(mirrors: &mut Mirrors) -> Option<(u8, u8)> {
        let (mirror, ..) = mirrors.next(at(1_000))?;
        let (writer, root) = (mirror.writer.0[0], mirror.root.0[0]);
        let id = (mirror.topic.clone(), mirror.writer);
        mirrors.logs.get_mut(&id).unwrap().pinned = Some(mirror);
        Some((writer, root))
    }

    #[test]
    fn logs_have_turns_and_each_newest_root_is_kept_once() {
        let mut mirrors = Mirrors::new(Vec::new(), "fleet");
        for writer in [1, 2, 3] {
            take(&mut mirrors, writer, 1, 10, at(1));
        }
        assert_eq!(keep_next(&mut mirrors), Some((1, 10)));
        // The first writer has more, and waits for its turn.
        take(&mut mirrors, 1, 2, 11, at(2));
        assert_eq!([keep_next(&mut mirrors), keep_next(&mut mirrors)], [Some((2, 10)), Some((3, 10))]);
        assert_eq!([keep_next(&mut mirrors), keep_next(&mut mirrors)], [Some((1, 11)), None]);
        // A late head and one with the same root change nothing.
        take(&mut mirrors, 1, 1, 10, at(3));
        take(&mut mirrors, 1, 3, 11, at(3));
        assert_eq!(keep_next(&mut mirrors), None);
        let jobs: Topic = "jobs".parse().unwrap();
        assert!(mirrors.has(&jobs, &WriterId([1; 32])));
        assert!(!mirrors.has(&"other".parse().unwrap(), &WriterId([1; 32])));
    }

    #[test]
    fn the_heads_of_silent_writers_are_sent_those_of_the_longest_silence_first() {
        let mut mirrors = Mirrors::new(Vec::new(), "fleet");
        for (writer, time) in [(1, 30), (2, 10), (3, 20)] {
            take(&mut mirrors, writer, 1, 10, at(time));
            keep_next(&mut mirrors).unwrap();
        }
        assert_eq!(mirrors.silent(at(25)), [block(2, 1), block(3, 1)]);
        // Another mirror has sent the head of one of them, and somebody an older one.
        take(&mut mirrors, 2, 1, 10, at(40));
        take(&mut mirrors, 3, 0, 9, at(40));
        assert_eq!(mirrors.silent(at(25)), [block(3, 1)]);
        // A newer head of an unchanged log takes the place of the one before.
        take(&mut mirrors, 3, 2, 10, at(41));
        assert_eq!(mirrors.silent(at(42)), [block(1, 1), block(2, 1), block(3, 2)]);
        // After a start nobody was heard, and everything is read again.
        let pinned: Vec<Mirror> = mirrors.logs.into_values().filter_map(|log| log.pinned).collect();
        let mut mirrors = Mirrors::new(pinned, "fleet");
        assert_eq!(mirrors.silent(at(0)).len(), 3);
        assert_eq!(keep_next(&mut mirrors), Some((1, 10)));
    }
}
