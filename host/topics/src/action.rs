//! Owns the actions that the protocol asks of its driver, and the limits that all readers share.

use std::sync::Arc;

use bytes::Bytes;
use dim_model::ident::{GroupName, Topic};
use dim_model::time::Timestamp;
use thiserror::Error;

use crate::alarm::Alarm;
use crate::bundle::{Bundle, Event, Listed};
use crate::identity::{Digest, Incarnation, WriterId};
use crate::malformed::Malformed;
use crate::membership::RosterFork;
use crate::membership::key_grant::{Epoch, EpochId};
use crate::time::Moment;

/// The maximum size of the bundles that wait in memory for earlier ones, in bytes, over all writers.
pub const MAX_BUFFERED: usize = 32 << 20;

/// The maximum size of the events that were delivered and are not durable, in bytes. Beyond it, deliveries wait.
pub const MAX_UNCOMMITTED: usize = 16 << 20;

/// The maximum number of blocks that are fetched at once, over all writers.
pub const MAX_FETCHES: usize = 32;

/// A reading of a topic.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stream {
    /// The topic.
    pub topic: Topic,
    /// The number of the catch-up that reads the topic for one receiver; `None` for the reading whose events come to all
    /// receivers.
    pub catch_up: Option<u64>,
}

impl Stream {
    /// The reading of a topic whose events come to all receivers.
    pub fn main(topic: Topic) -> Self {
        Self { topic, catch_up: None }
    }

    /// The part of a shared limit that it may use. Catch-ups leave the other half to new events.
    fn share_of(&self, limit: usize) -> usize {
        if self.catch_up.is_some() { limit / 2 } else { limit }
    }
}

/// A request to the driver.
#[derive(Clone, Debug)]
pub enum Action {
    /// Publish a block on the pubsub topic of a reliable topic.
    Publish {
        /// The reliable topic.
        topic: Topic,
        /// The bundle.
        bundle: Arc<Bundle>,
    },
    /// Publish a head on the pubsub topic of heads.
    PublishHead(Bytes),
    /// Fetch a block, and call `fetched` or `fetch_failed`.
    Fetch {
        /// The reading.
        stream: Stream,
        /// The writer.
        writer: WriterId,
        /// The bundle.
        listed: Listed,
    },
    /// Fetch a node of the index of a writer, and call `node_fetched`.
    FetchNode {
        /// The reading.
        stream: Stream,
        /// The writer.
        writer: WriterId,
        /// The node.
        digest: Digest,
    },
    /// Append events or a gap to the event log and store the checkpoint, in one transaction, and call `committed`.
    /// The deliveries of a topic and writer are made durable in the order of their actions.
    Deliver(Delivery),
    /// A catch-up has received what the main reading of its topic has. Its receiver gets the events of the main reading
    /// from the place of this action among the deliveries on.
    CaughtUp(Stream),
    /// Provide a stored bundle of this member, or a node of an own index, again: another member cannot fetch it.
    Resend(Digest),
    /// Show the finding to the operator.
    Alarm(Alarm),
    /// Fetch a roster, and call `roster_fetched` if it is found.
    FetchRoster(Digest),
    /// Fetch a key grant, and call `grant_fetched` if it is found.
    FetchGrant(Digest),
    /// Make the roster durable, unless a later version is durable.
    StoreRoster {
        /// The version.
        version: u64,
        /// The block.
        block: Bytes,
    },
    /// Make key epochs durable where only this host can read them, and call `epochs_stored` with the number.
    StoreEpochs {
        /// The number.
        number: u64,
        /// The group.
        group: GroupName,
        /// The epochs.
        epochs: Vec<Epoch>,
    },
    /// Delete durable key epochs: what they encrypted is no longer kept.
    ForgetEpochs {
        /// The group.
        group: GroupName,
        /// The epochs.
        epochs: Vec<EpochId>,
    },
    /// Provide a roster or a key grant to other members.
    Provide(Bytes),
    /// Show to the operator that the admins have signed two rosters of one version, and keep the refused one as a proof.
    RosterFork {
        /// The two versions.
        fork: RosterFork,
        /// The refused roster.
        block: Bytes,
    },
}

/// Consecutive events of an incarnation, or a gap in them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The reading.
    pub stream: Stream,
    /// The writer.
    pub writer: WriterId,
    /// The sequence of the first event, or of the first missing one.
    pub first: u64,
    /// The events, or the reason why there are none.
    pub outcome: Outcome,
    /// The position after them.
    pub checkpoint: Checkpoint,
    /// The incarnation that this one continues. Its checkpoint becomes that of a replaced incarnation.
    pub replaced: Option<Incarnation>,
    /// The incarnations whose checkpoints are removed.
    pub removed: Vec<Incarnation>,
}

impl Delivery {
    /// The size of the events in memory, in bytes.
    pub fn bytes(&self) -> usize {
        match &self.outcome {
            Outcome::Events(events) => events.iter().map(|it| it.data.len() + 64).sum(),
            Outcome::Gap(_) => 64,
        }
    }
}

/// The content of a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Events, in order.
    Events(Vec<Event>),
    /// The events cannot be had.
    Gap(GapReason),
}

/// The reason why events cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GapReason {
    /// The writer no longer keeps them.
    #[error("the writer no longer keeps them")]
    NotKept,
    /// The writer is silent, and no other member has them.
    #[error("the writer is silent and nobody else has them")]
    WriterSilent,
    /// The writer lives, but nobody provides them.
    #[error("nobody provides them")]
    Unavailable,
    /// Their bundle cannot be read.
    #[error("their bundle cannot be read: {0}")]
    Unreadable(Malformed),
    /// No keeper gives this host the key with which they are encrypted.
    #[error("no keeper gives this host their key")]
    NoKey,
}

/// The durable position of a reader in an incarnation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The incarnation.
    pub incarnation: Incarnation,
    /// The hybrid time of the process start; zero if it is unknown.
    pub began: Timestamp,
    /// The sequence of the next event.
    pub next: u64,
    /// The sequence from which on no event is missing: that of the first event, or that after the last gap.
    pub from: u64,
    /// The last delivered bundle, if no gap follows it.
    pub last: Option<Listed>,
    /// The hybrid time of the last delivered event.
    pub time: Timestamp,
    /// The incarnation before and the sequence after its last event, if they are known.
    pub before: Option<(Incarnation, u64)>,
    /// Whether another incarnation continues this one.
    pub is_replaced: bool,
    /// The hybrid time up to which the reader has removed older incarnations of the writer.
    pub floor: Timestamp,
}

/// The events that a catch-up may deliver.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allowance {
    /// The size of the events that it may still deliver, in bytes. At zero nothing is fetched either.
    pub left: u64,
    /// The size of the events that were delivered and are not durable, in bytes.
    pub in_flight: u64,
    /// The time since which nothing may be delivered.
    pub waits_since: Option<Moment>,
}

impl Allowance {
    /// Sets what is left.
    pub fn set(&mut self, left: u64, now: Moment) {
        self.left = left;
        self.waits_since = (left == 0).then(|| self.waits_since.unwrap_or(now));
    }

    /// Notes a delivery.
    pub fn delivered(&mut self, bytes: u64, now: Moment) {
        self.in_flight += bytes;
        self.set(self.left.saturating_sub(bytes), now);
    }
}

/// The use of the limits that all readers share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// The size of the bundles that wait for earlier ones, in bytes.
    pub buffered: usize,
    /// The size of the events that were delivered and are not durable, in bytes.
    pub uncommitted: usize,
    /// The number of blocks that are being fetched.
    pub fetches: usize,
}

impl Budget {
    /// Whether a bundle of `bytes` bytes of a reading may wait in memory.
    pub fn has_room(&self, stream: &Stream, bytes: usize) -> bool {
        self.buffered + bytes <= stream.share_of(MAX_BUFFERED)
    }

    /// Notes that bundles of `bytes` bytes left the memory.
    pub fn release(&mut self, bytes: usize) {
        self.buffered = self.buffered.saturating_sub(bytes);
    }

    /// Whether more events of a reading may be delivered.
    pub fn may_deliver(&self, stream: &Stream) -> bool {
        self.uncommitted < stream.share_of(MAX_UNCOMMITTED)
    }

    /// Whether another block of a reading may be fetched.
    pub fn may_fetch(&self, stream: &Stream) -> bool {
        self.fetches < stream.share_of(MAX_FETCHES)
    }
}
