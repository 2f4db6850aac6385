//! Owns the subscriptions: one stream for each topic that anyone wants, shared by all plugins,
//! reconnecting for ever. What it hears becomes entries of the log.

mod hearing;
mod prober;

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::StreamExt as _;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use hearing::{Hearings, TopicHearing};
pub use prober::Prober;

use crate::backend::{Backend, BackendError, Incoming};
use crate::backoff::Backoff;
use crate::commit::Commit;
use crate::config::Live;
use crate::echo::Echoes;
use crate::entry::{Event, Kind, Origin};
use crate::ident::{PeerName, Topic};
use crate::interest::Interest;
use crate::log::EventLog;
use crate::room::Room;
use crate::store::others;

/// Messages of a topic that are remembered to recognise one that comes twice.
const REMEMBERED: usize = 8_192;

/// Largest message that is taken in, in bytes: what pubsub itself allows.
const MAX_MESSAGE: usize = 1 << 20;

/// Counts over all topics.
#[derive(Debug, Default)]
pub struct Tally {
    /// Messages that became entries.
    pub received: AtomicU64,
    /// Echoes of the host's own publishes.
    pub echoes: AtomicU64,
    /// Messages that came twice.
    pub repeated: AtomicU64,
    /// Messages that were too large to be taken in.
    pub oversized: AtomicU64,
    /// Messages of peers that may not speak on their topic.
    pub refused: AtomicU64,
    /// Streams that ended and were opened again.
    pub reconnects: AtomicU64,
}

/// The task that keeps a stream for each wanted topic.
#[derive(Clone, Debug)]
pub struct Subscriptions {
    /// Where messages come from.
    pub backend: Backend,
    /// Where they go.
    pub log: Arc<EventLog>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// Which topics are wanted.
    pub interest: Arc<Interest>,
    /// Which echoes to expect.
    pub echoes: Arc<Echoes>,
    /// What is listened to.
    pub hearings: Arc<Hearings>,
    /// Whether messages are taken in.
    pub room: Arc<Room>,
    /// Who may speak on which topic.
    pub config: Live,
    /// The counts.
    pub tally: Arc<Tally>,
}

impl Subscriptions {
    /// Listens until `stop` is cancelled; the streams are closed when it returns.
    pub async fn run(self, stop: CancellationToken) {
        let tasks = TaskTracker::new();
        let mut streams: BTreeMap<Topic, Stream> = BTreeMap::new();
        loop {
            let wanted = self.interest.topics();
            let unwanted: Vec<Topic> =
                streams.keys().filter(|topic| !wanted.contains(topic)).cloned().collect();
            for topic in unwanted {
                if let Some(stream) = streams.remove(&topic) {
                    stream.end().await;
                }
                // Only now, or the stream could enter the topic again.
                self.hearings.forget(&topic);
            }
            for topic in wanted {
                streams.entry(topic.clone()).or_insert_with(|| {
                    let stop = stop.child_token();
                    let task = tasks.spawn(self.clone().listen(topic, stop.clone()));
                    Stream { stop, task }
                });
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = self.interest.topics_changed() => {}
            }
        }
        tasks.close();
        tasks.wait().await;
    }

    async fn listen(self, topic: Topic, stop: CancellationToken) {
        let work = async {
            let mut backoff = Backoff::new();
            let mut seen = Seen::default();
            loop {
                let why = tokio::select! {
                    biased;
                    // The stream is closed: what comes meanwhile is a gap.
                    short = self.room.short() => short.to_string(),
                    error = self.stream(&topic, &mut seen, &mut backoff) => error.to_string(),
                };
                self.hearings.disconnected(&topic, &why);
                self.echoes.stream_ended(&topic);
                self.tally.reconnects.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(%topic, "the stream ended, opening it again: {why}");
                tokio::time::sleep(backoff.next()).await;
                self.room.enough().await;
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// Reads one stream to its end, which is always an error.
    async fn stream(&self, topic: &Topic, seen: &mut Seen, backoff: &mut Backoff) -> BackendError {
        let identity = match self.backend.pubsub.identity().await {
            Ok(identity) => identity,
            Err(error) => return error,
        };
        let mut messages = match self.backend.pubsub.subscribe(topic).await {
            Ok(messages) => messages,
            Err(error) => return error,
        };
        self.hearings.connected(topic, self.log.now());
        self.echoes.stream_began(topic);
        backoff.reset();
        while let Some(message) = messages.next().await {
            match message {
                Ok(message) => self.take_in(topic, &identity, message, seen).await,
                Err(error) => return error,
            }
        }
        BackendError::Unreachable { what: format!("topic {topic}"), why: "the stream was closed".to_owned() }
    }

    async fn take_in(&self, topic: &Topic, identity: &PeerName, message: Incoming, seen: &mut Seen) {
        if message.from == *identity && self.echoes.is_echo(topic, &message.data) {
            self.tally.echoes.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if self.config.now().speakers(topic).is_some_and(|peers| !peers.contains(&message.from)) {
            tracing::debug!(%topic, from = %message.from, "a message is refused: its sender may not speak on the topic");
            self.tally.refused.fetch_add(1, Ordering::Relaxed);
            self.hearings.refused(topic, &message.from);
            return;
        }
        if !seen.is_new(&message) {
            self.tally.repeated.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if message.data.len() > MAX_MESSAGE {
            tracing::warn!(%topic, from = %message.from, bytes = message.data.len(), "a message is too large and was dropped");
            self.tally.oversized.fetch_add(1, Ordering::Relaxed);
            self.hearings.lost(topic);
            return;
        }
        self.tally.received.fetch_add(1, Ordering::Relaxed);
        self.hearings.received(topic);
        if self.backend.network && message.from != *identity {
            self.heard_others(topic).await;
        }
        let event =
            Event::Message { topic: topic.clone(), data: message.data, origin: Origin::Peer(message.from) };
        self.append(Kind::Event(event)).await;
    }

    /// Notes that someone else was heard on a topic, for the next start too.
    async fn heard_others(&self, topic: &Topic) {
        if self.hearings.heard_others(topic, self.log.now()) {
            let name = topic.clone();
            let noted = self.commit.write_later(move |write| others::note(write, &name)).await;
            if let Err(error) = noted {
                tracing::error!(%topic, "cannot note that others were heard: {error}");
            }
        }
    }

    /// Appends, off the async threads when the log has no room.
    async fn append(&self, kind: Kind) {
        if self.log.has_room() {
            self.log.append_now([kind]);
            return;
        }
        let log = self.log.clone();
        let appended = tokio::task::spawn_blocking(move || drop(log.append(kind))).await;
        if let Err(error) = appended {
            tracing::error!("a message was lost on its way into the log: {error}");
        }
    }
}

/// A stream that is kept open.
struct Stream {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Stream {
    async fn end(self) {
        self.stop.cancel();
        if let Err(error) = self.task.await {
            tracing::error!("a stream ended badly: {error}");
        }
    }
}

/// The messages that came last, to recognise one that comes again.
#[derive(Debug, Default)]
struct Seen {
    set: HashSet<(PeerName, Bytes)>,
    order: VecDeque<(PeerName, Bytes)>,
}

impl Seen {
    fn is_new(&mut self, message: &Incoming) -> bool {
        let key = (message.from.clone(), message.sequence.clone());
        if !self.set.insert(key.clone()) {
            return false;
        }
        self.order.push_back(key);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.set.remove(&oldest);
        }
        true
    }
}
