//! Owns the way of own events: from rows of the outbox into bundles, into the store, and to the daemon.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use dim_ipfs::BackendError;
use dim_model::backoff::Backoff;
use dim_model::ident::Topic;
use dim_model::time::{Timestamp, nanoseconds};
use dim_store::commit::CommitError;
use dim_store::outbox::Row;
use dim_store::topic_rows::Kept;
use dim_store::{OUTBOX, StoreError, topic_rows};
use dim_topics::bundle::{Bundle, Event, MAX_EVENTS, MAX_MESSAGE};
use dim_topics::identity::Digest;
use dim_topics::membership::NoKey;
use dim_topics::time::Moment;

use super::channel::{Input, Reliable, ReliableTopic, WaitingPublish};
use super::{ReliableTopics, SendResult};

/// The size of the publishes that are read for one bundle, in bytes. More would not fit.
const READ: usize = 512 << 10;

/// The maximum number of events of a bundle on a topic that is plain, too. Each is a message of its own as well, and the
/// next bundle waits for them.
const MAX_COPIED: usize = 64;

/// The age up to which a bundle that was perhaps not sent is sent again with its plain copies.
const COPY_AGAIN: Duration = Duration::from_secs(300);

/// The pause between removals of old bundles.
const RETENTION: Duration = Duration::from_secs(60);

/// The pause after each message. A daemon loses messages that arrive faster.
const PACE: Duration = Duration::from_millis(2);

/// The publishes of one topic that are not in a bundle yet.
#[derive(Debug, Default)]
pub struct Waiting {
    /// The publishes, in the order of their commits.
    pub queue: VecDeque<WaitingPublish>,
    /// The bundle of the topic that is being made durable or sent. What waits meanwhile is the next bundle.
    on_its_way: Option<Digest>,
    /// The time of the last log line that says that the publishes wait for a key.
    pub(super) warned: Option<Moment>,
}

impl Waiting {
    /// Notes that a bundle was sent. A bundle that was sent again is not the one that the next bundle waits for.
    fn sent(&mut self, digest: &Digest) {
        self.on_its_way = self.on_its_way.take().filter(|it| it != digest);
    }

    /// Whether a bundle of the topic is being made durable or sent.
    pub fn is_under_way(&self) -> bool {
        self.on_its_way.is_some()
    }

    /// The publishes, for a driver that begins anew.
    pub fn anew(self) -> Self {
        Self { queue: self.queue, ..Self::default() }
    }

    /// Puts publishes back that are not in a bundle after all.
    fn put_back(&mut self, publishes: Vec<WaitingPublish>) {
        publishes.into_iter().rev().for_each(|publish| self.queue.push_front(publish));
    }
}

/// The publishes for the next bundle of a topic.
#[derive(Debug, Default)]
struct Next {
    rows: Vec<WaitingPublish>,
    /// The times of their commits, and their content.
    events: Vec<(Timestamp, Bytes)>,
}

/// A message on its way to the daemon.
#[derive(Clone, Debug)]
pub struct Block {
    channel: Topic,
    data: Bytes,
    kind: BlockKind,
    /// The topic and the digest of the bundle that is published when this message is.
    ends: Option<(Topic, Digest)>,
}

/// The kind of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BlockKind {
    Head,
    Bundle,
    /// An event as a plain message.
    Copy,
}

/// The maximum number of bundles that wait because other members asked for them.
const MAX_AGAIN: usize = 64;

/// The blocks that are sent next, one at a time.
#[derive(Debug, Default)]
pub struct Outgoing {
    heads: VecDeque<Block>,
    bundles: VecDeque<Block>,
    copies: VecDeque<Block>,
    /// Bundles that other members asked for.
    again: VecDeque<Block>,
    foreign_heads: VecDeque<Block>,
    is_sending: bool,
    backoff: Backoff,
}

impl Outgoing {
    /// Adds a bundle, and its events as plain messages if its topic is plain, too.
    pub fn bundle(&mut self, bundle: &Bundle, reliable: &Reliable) {
        let topic = &bundle.header.topic;
        let events = if reliable.is_both(topic) { bundle.events() } else { Ok(Vec::new()) };
        let copies = events.unwrap_or_else(|why| {
            tracing::error!(%topic, "an own bundle cannot be read: {why}");
            Vec::new()
        });
        let copy = |event: Event| Block {
            channel: topic.clone(),
            data: event.data,
            kind: BlockKind::Copy,
            ends: None,
        };
        let mut blocks: VecDeque<Block> = copies.into_iter().map(copy).collect();
        let (channel, data) = (reliable.channels().of(topic), bundle.block.clone());
        // A larger one is fetched by its CID.
        let is_message = data.len() <= MAX_MESSAGE;
        if is_message {
            blocks.push_front(Block { channel, data, kind: BlockKind::Bundle, ends: None });
        }
        if let Some(last) = blocks.back_mut() {
            last.ends = Some((topic.clone(), bundle.digest));
        }
        self.bundles.extend(is_message.then(|| blocks.pop_front()).flatten());
        self.copies.extend(blocks);
    }

    /// Adds a head. It replaces a head that was not sent yet.
    pub fn head(&mut self, channel: Topic, data: Bytes) {
        self.heads.clear();
        self.heads.push_back(Block { channel, data, kind: BlockKind::Head, ends: None });
    }

    /// Adds the heads of silent writers. They replace those that were not sent yet.
    pub fn foreign_heads(&mut self, channel: &Topic, heads: Vec<Bytes>) {
        let block = |data| Block { channel: channel.clone(), data, kind: BlockKind::Head, ends: None };
        self.foreign_heads = heads.into_iter().map(block).collect();
    }

    /// Adds stored bundles that were perhaps not sent. The plain copies of old ones are left out: nobody would recognise
    /// them any more.
    pub fn resend(&mut self, blocks: &[Bytes], reliable: &Reliable, now: Timestamp) {
        for block in blocks {
            match Bundle::open(block.clone(), reliable.channels().fleet()) {
                Ok(bundle) if now.since(bundle.time) < COPY_AGAIN => self.bundle(&bundle, reliable),
                Ok(Bundle { header, digest, block: data, .. }) => {
                    let channel = reliable.channels().of(&header.topic);
                    let ends = Some((header.topic, digest));
                    self.bundles.push_back(Block { channel, data, kind: BlockKind::Bundle, ends });
                }
                // The operator has renamed the fleet.
                Err(why) => tracing::debug!("a stored bundle is not sent: {why}"),
            }
        }
    }

    /// Adds a stored bundle again, without plain copies, because another member cannot fetch it.
    pub fn send_again(&mut self, block: Bytes, reliable: &Reliable) {
        match Bundle::open(block, reliable.channels().fleet()) {
            Ok(Bundle { header, block: data, .. }) => {
                let channel = reliable.channels().of(&header.topic);
                self.add_again(Block { channel, data, kind: BlockKind::Bundle, ends: None });
            }
            Err(why) => tracing::debug!("a stored bundle is not sent: {why}"),
        }
    }

    /// Adds a block that a member asked for. New bundles come first. What exceeds the limit is dropped; the member asks
    /// again.
    fn add_again(&mut self, block: Block) {
        if self.again.len() < MAX_AGAIN && !self.again.iter().any(|waiting| waiting.data == block.data) {
            self.again.push_back(block);
        }
    }

    /// The number of bundles and plain copies that wait, with the message that is being sent.
    pub fn unsent(&self) -> usize {
        self.bundles.len() + self.copies.len() + usize::from(self.is_sending)
    }

    fn next(&mut self) -> Option<Block> {
        let Self { heads, bundles, copies, again, foreign_heads, .. } = self;
        let own = heads.pop_front().or_else(|| bundles.pop_front()).or_else(|| copies.pop_front());
        own.or_else(|| again.pop_front()).or_else(|| foreign_heads.pop_front())
    }

    /// Puts a message back that could not be sent.
    fn put_back(&mut self, block: Block) {
        match block.kind {
            // It is out of date by then.
            BlockKind::Head => {}
            BlockKind::Bundle => self.bundles.push_front(block),
            BlockKind::Copy => self.copies.push_front(block),
        }
    }
}

impl ReliableTopics {
    /// Forms the next bundle of a topic and makes it durable, unless one is on its way.
    pub(super) fn form(&mut self, topic: &Topic) {
        let waiting = self.waiting.entry(topic.clone()).or_default();
        if waiting.on_its_way.is_some() || waiting.queue.is_empty() {
            return;
        }
        let Next { mut rows, events } = match self.take_waiting(topic) {
            Ok(taken) => taken,
            Err(error) => {
                tracing::error!(%topic, "cannot read waiting publishes: {error}");
                return;
            }
        };
        if events.is_empty() {
            return;
        }
        self.encrypt_if_configured(topic);
        let formed = if self.lacks_roster(topic) {
            Err(NoKey::NoFleet)
        } else {
            self.member.form(topic, &events, self.now())
        };
        let bundle = match formed {
            Ok(bundle) => bundle,
            Err(why) => {
                self.waiting.get_mut(topic).expect("it was there").put_back(rows);
                self.wait_for_key(topic, &why);
                return;
            }
        };
        let waiting = self.waiting.get_mut(topic).expect("it was there");
        waiting.on_its_way = Some(bundle.digest);
        waiting.put_back(rows.split_off(bundle.count as usize));
        let end = self.member.formed_end(topic).expect("a bundle was formed").clone();
        let (commit, sender, topic) =
            (self.parts.commit.clone(), self.parts.reliable.sender(), topic.clone());
        let stored = bundle.clone();
        let numbers: Vec<u64> = rows.iter().map(|row| row.number).collect();
        self.tasks.spawn(async move {
            let write = commit.write(move |write| topic_rows::append(write, &stored, &end, &numbers));
            match write.await {
                Ok(is_stored) => {
                    let _ = sender.send(Input::Stored { topic, bundle, rows, is_void: !is_stored }).await;
                }
                Err(CommitError::Closed) => {}
                Err(error) => tracing::error!(%topic, "cannot store a bundle: {error}"),
            }
        });
    }

    /// Takes the next publishes of a topic from the queue. Those that are void by now are dropped.
    fn take_waiting(&mut self, topic: &Topic) -> Result<Next, StoreError> {
        let table = self.parts.store.snapshot()?.table(OUTBOX)?;
        let waiting = self.waiting.get_mut(topic).expect("the caller has made it");
        let (mut next, mut bytes, mut void, mut failure) = (Next::default(), 0, Vec::new(), None);
        let most = if self.parts.reliable.is_both(topic) { MAX_COPIED } else { MAX_EVENTS as usize };
        while next.rows.len() < most && bytes < READ && failure.is_none() {
            let Some(publish) = waiting.queue.pop_front() else { break };
            let read = || table.get(publish.number)?.map(|row| Row::read(row.value())).transpose();
            match read() {
                Ok(Some(row)) if !row.is_void => {
                    bytes += row.data.len();
                    next.events.push((Timestamp(row.time), row.data));
                    next.rows.push(publish);
                }
                Ok(_) => void.push(publish),
                Err(error) => {
                    waiting.queue.push_front(publish);
                    waiting.put_back(std::mem::take(&mut next.rows));
                    failure = Some(error);
                }
            }
        }
        self.drop_void(void);
        failure.map_or(Ok(next), Err)
    }

    /// Removes publishes that were voided before they got a sequence.
    fn drop_void(&self, void: Vec<WaitingPublish>) {
        if void.is_empty() {
            return;
        }
        self.count_down(&void);
        let numbers: Vec<u64> = void.iter().map(|publish| publish.number).collect();
        let commit = self.parts.commit.clone();
        self.spawn_write(async move {
            commit.write_later(move |write| dim_store::outbox::forget(write, &numbers)).await
        });
    }

    fn count_down(&self, publishes: &[WaitingPublish]) {
        for publish in publishes {
            self.parts.backlog.length(publish.owner.as_ref()).fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Continues with a bundle that is durable, or forms it again without what is void.
    pub(super) fn stored(
        &mut self,
        topic: &Topic,
        bundle: Arc<Bundle>,
        rows: Vec<WaitingPublish>,
        is_void: bool,
    ) {
        if is_void {
            let waiting = self.waiting.get_mut(topic).expect("it formed the bundle");
            waiting.on_its_way = None;
            waiting.put_back(rows);
            self.member.abandon(topic);
            self.form(topic);
            return;
        }
        self.count_down(&rows);
        let now = self.now();
        self.member.stored(bundle.clone(), now);
        if bundle.block.len() > MAX_MESSAGE {
            // A head announces it, and readers fetch it.
            if self.parts.reliable.is_both(topic) {
                self.outgoing.bundle(&bundle, &self.parts.reliable);
            } else {
                self.published(topic.clone(), bundle.digest);
            }
        }
        self.put_block(bundle.digest, bundle.block.clone());
        self.plan_indexes(super::own_index::PAUSE);
    }

    /// Gives the last own bundles to the daemon again: a process that was killed perhaps did not.
    pub(super) fn put_last_blocks(&self) {
        let last = self.member.own_ends().flat_map(|end| end.recent.iter().map(|it| it.digest));
        for digest in last {
            match self.parts.stored_block(&digest) {
                Ok(Some(block)) => self.put_block(digest, block),
                Ok(None) => {}
                Err(error) => tracing::error!("cannot read a bundle: {error}"),
            }
        }
    }

    pub(super) fn put_block(&self, digest: Digest, block: Bytes) {
        self.put_block_with(digest, block, ());
    }

    /// Gives a block to the daemon, and then drops `permit`.
    pub(super) fn put_block_with(&self, digest: Digest, block: Bytes, permit: impl Send + 'static) {
        let backend = self.parts.backend.clone();
        self.tasks.spawn(async move {
            if let Err(error) = backend.content.put_block(&digest.cid(), block).await {
                // Members that miss it ask for it.
                tracing::debug!(%digest, "the daemon does not store a bundle: {error}");
            }
            drop(permit);
        });
    }

    /// Removes own bundles that retention does not keep, again and again.
    pub(super) fn remove_old_bundles(&self) {
        let parts = self.parts.clone();
        self.spawn_until_stop(async move {
            loop {
                parts.log.clock().sleep(RETENTION).await;
                let (reliable, now) = (parts.reliable.clone(), parts.log.clock().wall());
                let kept = move |topic: &Topic| match reliable.settings(topic) {
                    Some(ReliableTopic { time, bytes, .. }) => {
                        Kept { since: Timestamp(now.0.saturating_sub(nanoseconds(time))), bytes }
                    }
                    None => Kept { since: now, bytes: 0 },
                };
                match parts.commit.write_later(move |write| topic_rows::remove_old(write, kept)).await {
                    Ok(removed) => parts.reliable.send(Input::Removed(removed)).await,
                    Err(CommitError::Closed) => return,
                    Err(error) => tracing::error!("cannot remove old bundles: {error}"),
                }
            }
        });
    }

    /// Sends the next block, unless one is being sent.
    pub(super) fn send_next(&mut self) {
        if self.outgoing.is_sending {
            return;
        }
        let Some(block) = self.outgoing.next() else { return };
        self.outgoing.is_sending = true;
        let (backend, sender) = (self.parts.backend.clone(), self.parts.reliable.sender());
        let echoes = self.parts.echoes.clone();
        self.spawn_until_stop(async move {
            let is_copy = block.kind == BlockKind::Copy;
            let expected = is_copy.then(|| echoes.expect(&block.channel, &block.data));
            let result = backend.pubsub.publish(&block.channel, block.data.clone()).await;
            if let (Some(expected), Err(error)) = (expected, &result) {
                echoes.failed(expected, error);
            }
            if backend.network {
                tokio::time::sleep(PACE).await;
            }
            let _ = sender.send(Input::Sent((block, result))).await;
        });
    }

    /// Continues after a block was sent, or tries it again later.
    pub(super) fn sent(&mut self, (block, result): SendResult) {
        if let Err(error) = result {
            self.try_again(block, &error);
            return;
        }
        self.outgoing.is_sending = false;
        self.outgoing.backoff.reset();
        if let Some((topic, digest)) = block.ends {
            self.published(topic, digest);
        }
    }

    /// Notes that a bundle was published, and forms the next one of its topic.
    fn published(&mut self, topic: Topic, digest: Digest) {
        let commit = self.parts.commit.clone();
        self.spawn_write(
            async move { commit.write_later(move |write| topic_rows::sent(write, &[digest])).await },
        );
        if let Some(waiting) = self.waiting.get_mut(&topic) {
            waiting.sent(&digest);
        }
        self.form(&topic);
    }

    fn try_again(&mut self, block: Block, error: &BackendError) {
        tracing::debug!(channel = %block.channel, "not published yet: {error}");
        let pause = self.outgoing.backoff.next_pause();
        self.outgoing.put_back(block);
        let (clock, sender) = (self.parts.log.clock().clone(), self.parts.reliable.sender());
        self.spawn_until_stop(async move {
            clock.sleep(pause).await;
            let _ = sender.send(Input::Retry).await;
        });
    }

    /// Sends again after a pause.
    pub(super) fn retry(&mut self) {
        self.outgoing.is_sending = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_that_is_sent_again_does_not_let_the_next_one_be_formed() {
        let (own, earlier) = (Digest([1; 32]), Digest([2; 32]));
        let mut waiting = Waiting { on_its_way: Some(own), ..Waiting::default() };
        waiting.sent(&earlier);
        assert_eq!(waiting.on_its_way, Some(own));
        waiting.sent(&own);
        assert_eq!(waiting.on_its_way, None);
    }

    #[test]
    fn publishes_that_are_put_back_come_first_and_in_their_order() {
        let publishes = |numbers: std::ops::Range<u64>| {
            numbers.map(|number| WaitingPublish { number, owner: None }).collect::<Vec<_>>()
        };
        let mut waiting = Waiting { queue: publishes(3..5).into(), ..Waiting::default() };
        waiting.put_back(publishes(0..3));
        assert!(waiting.queue.iter().map(|publish| publish.number).eq(0..5));
    }

    #[test]
    fn bundles_that_members_ask_for_wait_behind_new_ones_and_are_bounded() {
        let block = |number: usize, kind| Block {
            channel: "probe.in".parse().unwrap(),
            data: Bytes::from(number.to_string()),
            kind,
            ends: None,
        };
        let mut outgoing = Outgoing::default();
        (0..MAX_AGAIN + 5).for_each(|number| outgoing.add_again(block(number, BlockKind::Bundle)));
        outgoing.add_again(block(0, BlockKind::Bundle));
        assert_eq!((outgoing.again.len(), outgoing.unsent()), (MAX_AGAIN, 0));
        outgoing.bundles.push_back(block(900, BlockKind::Bundle));
        let order: Vec<_> = std::iter::from_fn(|| outgoing.next()).map(|block| block.data).collect();
        assert_eq!((order.len(), &order[0][..], &order[1][..]), (MAX_AGAIN + 1, &b"900"[..], &b"0"[..]));
        // A member that asks again is answered again.
        outgoing.add_again(block(0, BlockKind::Bundle));
        outgoing.add_again(block(0, BlockKind::Bundle));
        assert_eq!(outgoing.again.len(), 1);
    }
}
