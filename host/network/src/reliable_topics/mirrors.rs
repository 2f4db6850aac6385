//! Owns the mirrors: the logs of other writers that this host keeps in its daemon, so that they can be read when the
//! daemon of the writer is gone. It receives verified heads. It fetches and verifies everything to which the index in a
//! head leads, pins it, and sends the head again while the writer is silent.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dim_ipfs::BackendError;
use dim_model::ident::Topic;
use dim_model::time::{Timestamp, nanoseconds};
use dim_store::mirrors::{self, Mirror};
use dim_topics::block::MAX_BLOCK;
use dim_topics::bundle::Bundle;
use dim_topics::head::Head;
use dim_topics::identity::{Digest, WriterId};
use dim_topics::index::{BundlePlace, MAX_NODE, Node};
use dim_topics::malformed::Malformed;
use dim_topics::time::Moment;
use futures::{StreamExt as _, TryStreamExt as _};
use thiserror::Error;

use super::channel::Input;
use super::intake::FETCH;
use super::own_index::PIN;
use super::{Parts, ReliableTopics};

/// The maximum number of nodes of the index of one log.
const MAX_NODES: usize = 4_096;

/// The maximum number of writers whose heads are kept.
const MAX_WRITERS: usize = 10_000;

/// The maximum size of the heads that are kept, in bytes. Further logs are not mirrored.
const MAX_HEADS: usize = 64 << 20;

/// The number of blocks that are fetched at once.
const FETCHES: usize = 8;

/// The pause between checks for logs that are behind or expired and for silent writers.
const CHECK: Duration = Duration::from_secs(10);

/// A writer that was not heard for so long is silent.
const SILENT: Duration = Duration::from_secs(180);

/// The shortest time between two repetitions of heads.
const REPEAT_PAUSE: Duration = Duration::from_secs(5);

/// The maximum number of heads that are repeated at once.
const MAX_REPEATED: usize = 64;

/// The time that writers have to answer a request for heads before a mirror answers for them.
const ANSWER: Duration = Duration::from_secs(2);

/// A topic and a writer.
type LogId = (Topic, WriterId);

/// The verified blocks of a log.
#[derive(Clone, Debug, Default)]
struct Blocks {
    nodes: HashMap<Digest, Node>,
    /// The bundles, with their sizes in bytes.
    bundles: HashMap<Digest, usize>,
}

impl Blocks {
    fn bytes(&self) -> u64 {
        self.bundles.values().map(|bytes| *bytes as u64).sum()
    }
}

/// What is known of the log of a writer.
#[derive(Debug, Default)]
struct MirroredLog {
    /// What the daemon has pinned.
    pinned: Option<Mirror>,
    /// What the newest head states, if it is not pinned yet.
    wanted: Option<Mirror>,
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
#[derive(Debug, Default)]
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
}

impl Mirrors {
    /// Continues with what the daemon has pinned. It is read and pinned again, because the daemon may have lost it.
    pub fn new(pinned: Vec<Mirror>) -> Self {
        let log = |mirror: Mirror| {
            let id = (mirror.topic.clone(), mirror.writer);
            let log =
                MirroredLog { pinned: Some(mirror.clone()), wanted: Some(mirror), blocks: Arc::default() };
            (id, log)
        };
        Self { logs: pinned.into_iter().map(log).collect(), ..Self::default() }
    }

    /// Whether the daemon has pinned the log of a writer.
    pub fn has(&self, topic: &Topic, writer: &WriterId) -> bool {
        self.logs.get(&(topic.clone(), *writer)).is_some_and(|log| log.pinned.is_some())
    }

    /// Takes in a head of another member. `is_mirrored` says which topics are mirrored.
    fn take_head(&mut self, head: &Head, block: &Bytes, is_mirrored: impl Fn(&Topic) -> bool, now: Moment) {
        if !self.writers.contains_key(&head.writer) && self.writers.len() >= MAX_WRITERS {
            return;
        }
        let heard = self.writers.entry(head.writer).or_default();
        heard.last = Some(now);
        if (head.began, head.number) <= heard.newest {
            return;
        }
        heard.newest = (head.began, head.number);
        for log in head.topics.iter().filter(|log| is_mirrored(&log.topic)) {
            let Some(root) = log.index else { continue };
            if self.head_bytes() + block.len() > MAX_HEADS {
                return;
            }
            let it = self.logs.entry((log.topic.clone(), head.writer)).or_default();
            let (topic, writer, time) = (log.topic.clone(), head.writer, head.time);
            let wanted = Mirror { topic, writer, root, head: block.clone(), time };
            let is_new = it.pinned.as_ref().is_none_or(|pinned| pinned.root != root && pinned.time < time);
            it.wanted = is_new.then_some(wanted);
        }
    }

    fn head_bytes(&self) -> usize {
        let mirrors = self.logs.values().flat_map(|log| log.pinned.iter().chain(&log.wanted));
        mirrors.map(|mirror| mirror.head.len()).sum()
    }

    /// Takes the next log that is not pinned as its newest head states, in turn.
    fn next(&mut self) -> Option<(Mirror, Option<Digest>, Arc<Blocks>)> {
        let is_behind = |(_, log): &(&LogId, &MirroredLog)| log.wanted.is_some();
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

/// The result of an attempt to keep a log.
#[derive(Debug)]
pub struct Kept {
    mirror: Mirror,
    result: Result<Blocks, NotKept>,
}

/// The reason why a log is not kept.
#[derive(Debug, Error)]
enum NotKept {
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error("a block cannot be read: {0}")]
    Malformed(#[from] Malformed),
    #[error("its index leads to something else than the bundles of the log")]
    Foreign,
    #[error("the mirrored logs of the topic would have more than {0} bytes (topics.TOPIC.retention.bytes)")]
    TooLarge(u64),
    #[error("its index has more than {MAX_NODES} nodes")]
    TooManyNodes,
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
        let (reliable, now) = (self.parts.reliable.clone(), self.now().moment);
        self.mirrors.take_head(head, block, |topic| reliable.is_mirrored(topic), now);
        if head.hello && !self.mirrors.is_repeat_planned {
            self.mirrors.is_repeat_planned = true;
            let wait = ANSWER + self.member.spread() * 2;
            let (clock, sender) = (self.parts.log.clock().clone(), self.parts.reliable.sender());
            self.spawn_until_stop(async move {
                clock.sleep(wait).await;
                let _ = sender.send(Input::RepeatHeads { unheard_since: now }).await;
            });
        }
        self.mirror_next();
    }

    /// Gives the bundles of mirrored logs to the daemon, which does not store messages.
    pub(super) fn mirror_bundle(&self, bundle: &Bundle) {
        if self.parts.reliable.is_mirrored(&bundle.header.topic) && bundle.header.writer != self.member.id() {
            self.put_block(bundle.digest, bundle.block.clone());
        }
    }

    /// Sends the heads of writers that were not heard since `since`.
    pub(super) fn repeat_heads(&mut self, since: Moment) {
        self.mirrors.is_repeat_planned = false;
        let now = self.now().moment;
        if self.mirrors.repeated.is_some_and(|at| now.since(at) < REPEAT_PAUSE) {
            return;
        }
        let heads = self.mirrors.silent(since);
        if heads.is_empty() {
            return;
        }
        tracing::debug!(heads = heads.len(), "sending the heads of silent writers again");
        self.mirrors.repeated = Some(now);
        for head in heads {
            self.outgoing.foreign_head(self.parts.reliable.channels.heads.clone(), head);
        }
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
        self.end_mirrors(old);
        let silence = SILENT.max(self.member.spread() * 3);
        if let Some(since) = now.moment.0.checked_sub(silence) {
            self.repeat_heads(Moment(since));
        }
        self.mirror_next();
    }

    /// Unpins logs, and removes their rows.
    fn end_mirrors(&mut self, ended: Vec<(LogId, MirroredLog)>) {
        let pinned: Vec<Mirror> = ended.into_iter().filter_map(|(_, log)| log.pinned).collect();
        for Mirror { topic, writer, root, .. } in pinned {
            tracing::debug!(%topic, %writer, "the log is no longer mirrored");
            let (backend, commit) = (self.parts.backend.clone(), self.parts.commit.clone());
            self.spawn_write(async move {
                match backend.content.unpin(&root.cid()).await {
                    Ok(()) => commit.write_later(move |write| mirrors::remove(write, &topic, &writer)).await,
                    Err(error) => {
                        tracing::debug!("the daemon does not remove the pin of a mirror yet: {error}");
                        Ok(())
                    }
                }
            });
        }
    }

    /// Begins to keep the next log, unless one is being fetched.
    fn mirror_next(&mut self) {
        if self.mirrors.is_fetching || !self.parts.backend.network {
            return;
        }
        let Some((mirror, before, known)) = self.mirrors.next() else { return };
        self.mirrors.is_fetching = true;
        let id = (mirror.topic.clone(), mirror.writer);
        let most = self.parts.reliable.settings(&id.0).map_or(0, |it| it.bytes);
        let room = Room { left: most.saturating_sub(self.mirrors.bytes_beside(&id)), most };
        let (parts, sender) = (self.parts.clone(), self.parts.reliable.sender());
        self.spawn_until_stop(async move {
            let result = keep(&parts, &mirror, before, &known, room).await;
            let _ = sender.send(Input::Mirrored(Box::new(Kept { mirror, result }))).await;
        });
    }

    /// Continues after an attempt to keep a log.
    pub(super) fn mirrored(&mut self, Kept { mirror, result }: Kept) {
        self.mirrors.is_fetching = false;
        let id = (mirror.topic.clone(), mirror.writer);
        // The log may have expired meanwhile; then a pin of it is removed with its row, after the next start.
        let log = self.mirrors.logs.entry(id).or_default();
        let (topic, writer) = (&mirror.topic, &mirror.writer);
        match result {
            Ok(blocks) => {
                log.blocks = Arc::new(blocks);
                log.pinned = Some(mirror.clone());
                let commit = self.parts.commit.clone();
                self.spawn_write(async move {
                    commit.write_later(move |write| mirrors::put(write, &mirror)).await
                });
                self.mirror_next();
            }
            Err(NotKept::Backend(why)) => {
                tracing::debug!(%topic, %writer, "a log is not mirrored yet: {why}");
                log.wanted.get_or_insert(mirror);
            }
            // The next head may state another root.
            Err(why) => tracing::warn!(%topic, %writer, "a log is not mirrored: {why}"),
        }
    }
}

/// The bytes that a log may have.
#[derive(Clone, Copy, Debug)]
struct Room {
    left: u64,
    /// The limit of the topic.
    most: u64,
}

/// Fetches and verifies everything to which the root of a log leads, apart from `known` blocks, and moves the pin from
/// the root before.
async fn keep(
    parts: &Parts,
    mirror: &Mirror,
    before: Option<Digest>,
    known: &Blocks,
    room: Room,
) -> Result<Blocks, NotKept> {
    let (nodes, places) = read_index(parts, mirror.root, known).await?;
    let mut blocks = Blocks { nodes, ..Blocks::default() };
    let (kept, missing): (Vec<_>, Vec<_>) =
        places.into_iter().partition(|it| known.bundles.contains_key(&it.listed.digest));
    let mut bytes: u64 = 0;
    for BundlePlace { listed, .. } in kept {
        let size = known.bundles[&listed.digest];
        bytes += size as u64;
        blocks.bundles.insert(listed.digest, size);
    }
    let fetches = missing.into_iter().map(|place| fetch(parts, mirror, place));
    let mut fetched = futures::stream::iter(fetches).buffer_unordered(FETCHES);
    while bytes <= room.left
        && let Some((digest, size)) = fetched.try_next().await?
    {
        bytes += size as u64;
        blocks.bundles.insert(digest, size);
    }
    if bytes > room.left {
        return Err(NotKept::TooLarge(room.most));
    }
    let before = before.filter(|before| *before != mirror.root).map(|before| before.cid());
    parts.backend.content.pin_graph(&mirror.root.cid(), before.as_ref(), PIN).await?;
    Ok(blocks)
}

/// Reads the nodes of an index. Returns them and the places in their leaves.
async fn read_index(
    parts: &Parts,
    root: Digest,
    known: &Blocks,
) -> Result<(HashMap<Digest, Node>, Vec<BundlePlace>), NotKept> {
    let (mut nodes, mut places) = (HashMap::new(), Vec::new());
    let mut open = vec![(root, None)];
    while let Some((digest, level)) = open.pop() {
        let node = match known.nodes.get(&digest) {
            Some(node) => node.clone(),
            None => Node::open(&parts.backend.content.block(&digest.cid(), MAX_NODE, FETCH).await?)?,
        };
        if level.is_some_and(|level| node.level() != level) {
            return Err(NotKept::Foreign);
        }
        if nodes.len() >= MAX_NODES {
            return Err(NotKept::TooManyNodes);
        }
        match &node {
            Node::Leaf(bundles) => places.extend(bundles.iter().copied()),
            Node::Inner { level, children } => {
                open.extend(children.iter().map(|child| (child.digest, Some(level - 1))));
            }
        }
        nodes.insert(digest, node);
    }
    Ok((nodes, places))
}

/// Fetches a bundle into the daemon and verifies it: what is pinned must not lead anywhere else. Returns its size.
async fn fetch(parts: &Parts, mirror: &Mirror, place: BundlePlace) -> Result<(Digest, usize), NotKept> {
    let BundlePlace { incarnation, listed } = place;
    let block = parts.backend.content.block(&listed.digest.cid(), MAX_BLOCK, FETCH).await?;
    let size = block.len();
    let bundle = Bundle::open(block, parts.reliable.channels.fleet())?;
    let header = &bundle.header;
    let is_of_log = header.topic == mirror.topic && header.writer == mirror.writer;
    if is_of_log && header.incarnation == incarnation && bundle.listed() == listed {
        Ok((listed.digest, size))
    } else {
        Err(NotKept::Foreign)
    }
}
