//! Owns the way of the events of others: heads from the daemon, missing bundles, and deliveries into the event log.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dim_ipfs::{Backend, BackendError};
use dim_model::backoff::Backoff;
use dim_model::entry::{Event, Kind, MemberEvent, Missing, Offset, Origin};
use dim_model::ident::MemberName;
use dim_model::time::Timestamp;
use dim_store::catch_ups::CatchUp;
use dim_store::commit::CommitError;
use dim_store::{StoreError, catch_ups, topic_rows};
use dim_topics::action::{self, Delivery, Stream};
use dim_topics::block::MAX_BLOCK;
use dim_topics::bundle::{Bundle, Listed};
use dim_topics::head::Head;
use dim_topics::identity::{Digest, WriterId};
use dim_topics::index::MAX_NODE;
use dim_topics::time::Now;
use futures::StreamExt as _;
use redb::WriteTransaction;
use tokio::sync::mpsc;

use super::catch_ups::rest_of_own;
use super::channel::{Channels, Input};
use super::connections::place_of;
use super::{Parts, ReliableTopics};

/// The time limit of a fetch.
pub(super) const FETCH: Duration = Duration::from_secs(5);

/// The pause between checks of the addresses of the daemon.
const PLACE: Duration = Duration::from_secs(300);

/// The pause between checks whether the log takes more events.
pub(super) const ROOM_POLL: Duration = Duration::from_millis(5);

/// The maximum size of the events that are made durable in one transaction, in bytes.
const BATCH: usize = 4 << 20;

/// The time after a transaction for which a small batch is delayed: many writers with an event now and then would
/// otherwise cost a sync of the disk for each event.
const COMMIT_DELAY: Duration = Duration::from_millis(20);

/// The size of a batch that is not delayed, in bytes.
const FULL_BATCH: usize = 16 << 10;

impl ReliableTopics {
    /// Receives the heads of the other members, over all failures of the daemon.
    pub(super) fn listen_to_heads(&self) {
        let (backend, channels) = (self.parts.backend.clone(), self.parts.reliable.channels());
        let (sender, clock) = (self.parts.reliable.sender(), self.parts.log.clock().clone());
        self.spawn_until_stop(async move {
            let mut backoff = Backoff::new();
            loop {
                find_place(&backend, &sender).await;
                let error = read_heads(&backend, &channels, &sender, &mut backoff).await;
                tracing::debug!("the stream of heads ended, opening it again: {error}");
                clock.sleep(backoff.next_pause()).await;
            }
        });
    }

    /// Learns again and again at which addresses the daemon may be reached. They change while it runs.
    pub(super) fn watch_place(&self) {
        let (backend, sender) = (self.parts.backend.clone(), self.parts.reliable.sender());
        let clock = self.parts.log.clock().clone();
        self.spawn_until_stop(async move {
            loop {
                clock.sleep(PLACE).await;
                find_place(&backend, &sender).await;
            }
        });
    }

    /// Fetches a missing bundle.
    pub(super) fn fetch(&self, stream: Stream, writer: WriterId, listed: Listed) {
        let (backend, sender) = (self.parts.backend.clone(), self.parts.reliable.sender());
        let fleet = self.parts.reliable.channels().fleet().to_owned();
        self.spawn_until_stop(async move {
            let block = backend.content.block(&listed.digest.cid(), MAX_BLOCK, FETCH).await;
            let bundle = block.map_err(|error| error.to_string());
            let bundle = bundle.and_then(|it| Bundle::open(it, &fleet).map_err(|why| why.to_string()));
            let bundle = bundle.inspect_err(|why| {
                let topic = &stream.topic;
                tracing::debug!(%topic, %writer, first = listed.first, "a bundle cannot be fetched: {why}");
            });
            let bundle = bundle.ok().map(Arc::new);
            let _ = sender.send(Input::Fetched { stream, writer, listed, bundle }).await;
        });
    }

    /// Fetches a node of the index of a writer.
    pub(super) fn fetch_node(&self, stream: Stream, writer: WriterId, digest: Digest) {
        let (backend, sender) = (self.parts.backend.clone(), self.parts.reliable.sender());
        self.spawn_until_stop(async move {
            let block = backend.content.block(&digest.cid(), MAX_NODE, FETCH).await;
            let block = block.inspect_err(|why| {
                let topic = &stream.topic;
                tracing::debug!(%topic, %writer, %digest, "a node of an index cannot be fetched: {why}");
            });
            let _ = sender.send(Input::NodeFetched { stream, writer, digest, block: block.ok() }).await;
        });
    }

    /// Makes the waiting results durable, unless others are being made durable.
    pub(super) fn commit_next(&mut self) {
        if self.is_committing || self.outcomes.is_empty() || self.is_delaying && !self.has_full_batch() {
            return;
        }
        self.is_committing = true;
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while let Some(outcome) = self.outcomes.pop_front_if(|_| bytes < BATCH) {
            bytes += outcome.bytes();
            batch.push(outcome);
        }
        let receivers = self.catch_ups.of(&batch);
        let parts = self.parts.clone();
        let (stop, sender) = (self.stop.clone(), parts.reliable.sender());
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = parts.room() => {}
            }
            let now = parts.log.now();
            let kinds: Vec<Vec<Kind>> = batch.iter().map(|it| it.kinds(&receivers, &parts, now)).collect();
            let batch = Arc::new(batch);
            let written = batch.clone();
            let log = parts.log.clone();
            let write = parts.commit.write_and_append(move |write| {
                let (head, mut all, mut ends) = (log.head(), Vec::new(), BTreeMap::new());
                for (outcome, kinds) in written.iter().zip(kinds) {
                    if let Outcome::CaughtUp(stream) = outcome
                        && let Some(catch_up) = receivers.get(&stream.catch_up.unwrap_or_default())
                    {
                        all.extend(rest_of_own(&log, write, catch_up.clone())?);
                    }
                    all.extend(kinds);
                    if let Some(number) = outcome.stream().catch_up {
                        ends.insert(number, Offset(head.0 + all.len() as u64));
                    }
                    if outcome.is_logged(&receivers) {
                        outcome.write(write)?;
                    }
                }
                Ok((all, ends))
            });
            match write.await {
                Ok(ends) => {
                    let outcomes = Arc::unwrap_or_clone(batch);
                    let _ = sender.send(Input::Committed { outcomes, ends }).await;
                }
                Err(CommitError::Closed) => {}
                Err(error) => tracing::error!("cannot store the events of a reliable topic: {error}"),
            }
        });
    }

    /// Whether the waiting results fill a transaction of their own.
    fn has_full_batch(&self) -> bool {
        let mut bytes = 0;
        self.outcomes.iter().any(|outcome| {
            bytes += outcome.bytes();
            bytes >= FULL_BATCH
        })
    }

    /// Delays small batches, so that they share a transaction.
    fn delay_commits(&mut self) {
        self.is_delaying = true;
        let (clock, sender) = (self.parts.log.clock().clone(), self.parts.reliable.sender());
        self.spawn_until_stop(async move {
            clock.sleep(COMMIT_DELAY).await;
            let _ = sender.send(Input::CommitsDue).await;
        });
    }

    /// Tells the protocol what is durable.
    pub(super) fn committed(&mut self, outcomes: &[Outcome], ends: &BTreeMap<u64, Offset>, now: Now) {
        self.is_committing = false;
        if !self.is_delaying {
            self.delay_commits();
        }
        for outcome in outcomes {
            match outcome {
                Outcome::Delivery(delivery) => {
                    self.member.committed(delivery, now);
                    if let Some(number) = delivery.stream.catch_up
                        && let Some(end) = ends.get(&number)
                    {
                        self.catch_ups.appended(number, *end, delivery.bytes() as u64);
                    }
                }
                Outcome::CaughtUp(stream) => {
                    let plugin = stream.catch_up.and_then(|number| self.catch_ups.end(number));
                    tracing::debug!(topic = %stream.topic, ?plugin, "a plugin has received all earlier events");
                }
            }
        }
        if !ends.is_empty() {
            self.check_catch_ups();
        }
    }
}

/// Tells the driver the place of the daemon, if it runs.
async fn find_place(backend: &Backend, sender: &mpsc::Sender<Input>) {
    if let Ok(daemon) = backend.swarm.daemon().await {
        let _ = sender.send(Input::Place(place_of(&daemon))).await;
    }
}

/// Reads heads until the stream ends. Each end is an error.
async fn read_heads(
    backend: &Backend,
    channels: &Channels,
    sender: &mpsc::Sender<Input>,
    backoff: &mut Backoff,
) -> BackendError {
    let mut messages = match backend.pubsub.subscribe(&channels.heads).await {
        Ok(messages) => messages,
        Err(error) => return error,
    };
    backoff.reset();
    while let Some(message) = messages.next().await {
        let message = match message {
            Ok(message) => message,
            Err(error) => return error,
        };
        match Head::open(&message.data, channels.fleet()) {
            Ok(head) => {
                let (head, block) = (Box::new(head), message.data);
                let _ = sender.send(Input::Head { head, block }).await;
            }
            Err(why) => tracing::debug!(from = %message.from, "a head is refused: {why}"),
        }
    }
    BackendError::Unreachable {
        what: "the heads of the fleet".to_owned(),
        why: "the stream was closed".to_owned(),
    }
}

/// A result of the protocol that is made durable, in the order in which the protocol returned it.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Events or a gap.
    Delivery(Box<Delivery>),
    /// A catch-up has ended.
    CaughtUp(Stream),
}

impl Outcome {
    /// The reading of the topic.
    pub fn stream(&self) -> &Stream {
        match self {
            Self::Delivery(delivery) => &delivery.stream,
            Self::CaughtUp(stream) => stream,
        }
    }

    /// Whether it becomes entries of the log: a catch-up may have ended meanwhile.
    fn is_logged(&self, receivers: &BTreeMap<u64, CatchUp>) -> bool {
        self.stream().catch_up.is_none_or(|number| receivers.contains_key(&number))
    }

    /// The size in memory, in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Delivery(delivery) => delivery.bytes(),
            Self::CaughtUp(_) => 0,
        }
    }

    /// The entries of the log. `receivers` are the catch-ups, by the entries of their subscriptions.
    fn kinds(&self, receivers: &BTreeMap<u64, CatchUp>, parts: &Parts, now: Timestamp) -> Vec<Kind> {
        let stream = self.stream();
        let plugin = |number: u64| receivers.get(&number).map(|it| &it.plugin);
        let catch_up = stream.catch_up.map(|number| (Offset(number), plugin(number)));
        match (self, catch_up) {
            (Self::Delivery(delivery), None) => {
                let events = events_of(delivery, now).into_iter();
                let is_new = |event: &Event| !is_delivered_as_copy(event, delivery, parts);
                events.filter(is_new).map(Kind::Event).collect()
            }
            (Self::Delivery(delivery), Some((subscription, Some(plugin)))) => {
                let earlier = |event| Kind::Earlier { plugin: plugin.clone(), subscription, event };
                events_of(delivery, now).into_iter().map(earlier).collect()
            }
            (Self::CaughtUp(_), Some((subscription, Some(plugin)))) => {
                vec![Kind::CaughtUp { plugin: plugin.clone(), subscription, topic: stream.topic.clone() }]
            }
            // The subscription has ended.
            (_, Some((_, None))) | (Self::CaughtUp(_), None) => Vec::new(),
        }
    }

    /// Writes the new position.
    fn write(&self, write: &WriteTransaction) -> Result<(), StoreError> {
        let Self::Delivery(delivery) = self else { return Ok(()) };
        match delivery.stream.catch_up {
            None => topic_rows::advance(write, delivery),
            Some(number) => catch_ups::advance(write, Offset(number), delivery),
        }
    }
}

/// Whether the plain copy of an event came so long before its bundle that it was delivered.
fn is_delivered_as_copy(event: &Event, delivery: &Delivery, parts: &Parts) -> bool {
    let Event::Message { topic, data, .. } = event else { return false };
    let now = parts.log.clock().monotonic();
    parts.reliable.is_both(topic) && parts.reliable.copies().take_event(topic, &delivery.writer, data, now)
}

/// The events of a delivery.
fn events_of(delivery: &Delivery, now: Timestamp) -> Vec<Event> {
    let Delivery { stream: Stream { topic, .. }, writer, first, outcome, checkpoint, .. } = delivery;
    let name = MemberName::from(writer.name());
    let message = |(sequence, data, time): (u64, Bytes, Timestamp)| {
        let origin = Origin::Member(MemberEvent {
            writer: name.clone(),
            incarnation: checkpoint.incarnation.0,
            sequence,
            time,
        });
        Event::Message { topic: topic.clone(), data, origin }
    };
    match outcome {
        action::Outcome::Events(events) => {
            let events = (*first..).zip(events).map(|(sequence, it)| (sequence, it.data.clone(), it.time));
            events.map(message).collect()
        }
        action::Outcome::Gap(reason) => {
            let (next, incarnation) = (checkpoint.next, checkpoint.incarnation);
            tracing::warn!(%topic, %writer, %incarnation, first, next, "events are missing: {reason}");
            let since = checkpoint.time.min(now);
            let missing =
                Missing { writer: name, incarnation: checkpoint.incarnation.0, first: *first, next };
            let missing = Some(missing);
            vec![Event::Gap { topic: topic.clone(), since, until: now, missing }]
        }
    }
}
