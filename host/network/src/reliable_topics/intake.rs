//! Owns the way of the events of others: heads from the daemon, missing bundles, and deliveries into the event log.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dim_ipfs::{Backend, BackendError};
use dim_model::backoff::Backoff;
use dim_model::entry::{Event, Kind, MemberEvent, Origin};
use dim_model::ident::{MemberName, Topic};
use dim_model::time::Timestamp;
use dim_store::commit::CommitError;
use dim_store::topic_rows;
use dim_topics::action::{Delivery, Outcome};
use dim_topics::block::MAX_BLOCK;
use dim_topics::bundle::{Bundle, Listed};
use dim_topics::head::Head;
use dim_topics::identity::{Digest, WriterId};
use dim_topics::index::MAX_NODE;
use dim_topics::time::Now;
use futures::StreamExt as _;
use tokio::sync::mpsc;

use super::ReliableTopics;
use super::channel::{Channels, Input};

/// The time limit of a fetch.
const FETCH: Duration = Duration::from_secs(5);

/// The pause between checks whether the log takes more events.
const ROOM_POLL: Duration = Duration::from_millis(5);

/// The maximum size of the events that are made durable in one transaction, in bytes.
const BATCH: usize = 4 << 20;

impl ReliableTopics {
    /// Receives the heads of the other members, over all failures of the daemon.
    pub(super) fn listen_to_heads(&self) {
        let (backend, channels) = (self.parts.backend.clone(), self.parts.reliable.channels.clone());
        let (sender, clock) = (self.parts.reliable.sender(), self.parts.log.clock().clone());
        self.spawn_until_stop(async move {
            let mut backoff = Backoff::new();
            loop {
                let error = read_heads(&backend, &channels, &sender, &mut backoff).await;
                tracing::debug!("the stream of heads ended, opening it again: {error}");
                clock.sleep(backoff.next_pause()).await;
            }
        });
    }

    /// Fetches a missing bundle.
    pub(super) fn fetch(&self, topic: Topic, writer: WriterId, listed: Listed) {
        let (backend, sender) = (self.parts.backend.clone(), self.parts.reliable.sender());
        let fleet = self.parts.reliable.channels.fleet().to_owned();
        self.spawn_until_stop(async move {
            let block = backend.content.block(&listed.digest.cid(), MAX_BLOCK, FETCH).await;
            let bundle = block.map_err(|error| error.to_string());
            let bundle = bundle.and_then(|it| Bundle::open(it, &fleet).map_err(|why| why.to_string()));
            let bundle = bundle.inspect_err(|why| {
                tracing::debug!(%topic, %writer, first = listed.first, "a bundle cannot be fetched: {why}");
            });
            let bundle = bundle.ok().map(Arc::new);
            let _ = sender.send(Input::Fetched { topic, writer, listed, bundle }).await;
        });
    }

    /// Fetches a node of the index of a writer.
    pub(super) fn fetch_node(&self, topic: Topic, writer: WriterId, digest: Digest) {
        let (backend, sender) = (self.parts.backend.clone(), self.parts.reliable.sender());
        self.spawn_until_stop(async move {
            let block = backend.content.block(&digest.cid(), MAX_NODE, FETCH).await;
            let block = block.inspect_err(|why| {
                tracing::debug!(%topic, %writer, %digest, "a node of an index cannot be fetched: {why}");
            });
            let _ = sender.send(Input::NodeFetched { topic, writer, digest, block: block.ok() }).await;
        });
    }

    /// Makes the waiting deliveries durable, unless others are being made durable.
    pub(super) fn commit_next(&mut self) {
        if self.is_committing || self.deliveries.is_empty() {
            return;
        }
        self.is_committing = true;
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while let Some(delivery) = self.deliveries.pop_front_if(|_| bytes < BATCH) {
            bytes += delivery.bytes();
            batch.push(delivery);
        }
        let parts = self.parts.clone();
        let (stop, sender) = (self.stop.clone(), parts.reliable.sender());
        self.tasks.spawn(async move {
            while !parts.log.has_room() || parts.disk.check().is_err() {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(ROOM_POLL) => {}
                }
            }
            let kinds: Vec<Kind> = batch.iter().flat_map(|it| kinds_of(it, parts.log.now())).collect();
            let batch = Arc::new(batch);
            let written = batch.clone();
            let write = parts.commit.append_and_write(kinds, move |write| {
                written.iter().try_for_each(|delivery| topic_rows::advance(write, delivery))
            });
            match write.await {
                Ok(()) => drop(sender.send(Input::Committed(Arc::unwrap_or_clone(batch))).await),
                Err(CommitError::Closed) => {}
                Err(error) => tracing::error!("cannot store the events of a reliable topic: {error}"),
            }
        });
    }

    /// Tells the protocol what is durable.
    pub(super) fn committed(&mut self, deliveries: &[Delivery], now: Now) {
        self.is_committing = false;
        for delivery in deliveries {
            let Delivery { topic, writer, checkpoint, .. } = delivery;
            self.member.committed(topic, writer, checkpoint, delivery.bytes(), now);
        }
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
            Ok(head) => drop(sender.send(Input::Head(Box::new(head))).await),
            Err(why) => tracing::debug!(from = %message.from, "a head is refused: {why}"),
        }
    }
    BackendError::Unreachable {
        what: "the heads of the fleet".to_owned(),
        why: "the stream was closed".to_owned(),
    }
}

/// The entries of a delivery.
fn kinds_of(delivery: &Delivery, now: Timestamp) -> Vec<Kind> {
    let Delivery { topic, writer, first, outcome, checkpoint, .. } = delivery;
    let name = MemberName::from(writer.name());
    let message = |(sequence, data, time): (u64, Bytes, Timestamp)| {
        let origin = Origin::Member(MemberEvent {
            writer: name.clone(),
            incarnation: checkpoint.incarnation.0,
            sequence,
            time,
        });
        Kind::Event(Event::Message { topic: topic.clone(), data, origin })
    };
    match outcome {
        Outcome::Events(events) => {
            let events = (*first..).zip(events).map(|(sequence, it)| (sequence, it.data.clone(), it.time));
            events.map(message).collect()
        }
        Outcome::Gap(reason) => {
            let (next, incarnation) = (checkpoint.next, checkpoint.incarnation);
            tracing::warn!(%topic, %writer, %incarnation, first, next, "events are missing: {reason}");
            let since = checkpoint.time.min(now);
            vec![Kind::Event(Event::Gap { topic: topic.clone(), since, until: now })]
        }
    }
}
