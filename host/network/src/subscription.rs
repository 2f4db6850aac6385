//! Owns the subscriptions: one stream for each wanted topic, shared by all plugins and reconnected without end. It
//! receives messages from the backend and appends entries to the log.

mod listening;
mod prober;

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::StreamExt as _;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use listening::{ListeningRecord, ListeningRecords};
pub use prober::Prober;

use crate::Settings;
use crate::own_messages::Echoes;
use crate::reliable_topics::{HOLD, Input, Reliable, Verdict};
use dim_ipfs::{Backend, BackendError, Incoming};
use dim_model::backoff::Backoff;
use dim_model::entry::{Event, Kind, Origin};
use dim_model::ident::{PeerName, Topic};
use dim_model::live::Live;
use dim_store::commit::Commit;
use dim_store::disk_monitor::DiskMonitor;
use dim_store::event_log::EventLog;
use dim_store::heard_topics;
use dim_store::interest::Interest;

/// The number of messages of a topic that are remembered, to recognise repeated ones.
const REMEMBERED: usize = 8_192;

/// The maximum size of a message, in bytes. It is the maximum of pubsub itself.
const MAX_MESSAGE: usize = 1 << 20;

/// The counters over all topics.
#[derive(Debug, Default)]
pub struct Counters {
    /// Messages that became entries.
    pub received: AtomicU64,
    /// Echoes of the host's own publishes.
    pub echoes: AtomicU64,
    /// Plain copies of events of members that were dropped.
    pub copies: AtomicU64,
    /// Messages that arrived again.
    pub repeated: AtomicU64,
    /// Messages that exceeded the maximum size and were dropped.
    pub oversized: AtomicU64,
    /// Messages of peers that the config does not allow on the topic.
    pub refused: AtomicU64,
    /// Streams that ended and were reopened.
    pub reconnects: AtomicU64,
}

/// The task that keeps a stream open for each wanted topic.
#[derive(Clone, Debug)]
pub struct Subscriptions {
    /// The source of the messages.
    pub backend: Backend,
    /// The log that receives the entries.
    pub log: Arc<EventLog>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// The wanted topics.
    pub interest: Arc<Interest>,
    /// The expected echoes.
    pub echoes: Arc<Echoes>,
    /// The listening record of each topic.
    pub listening_records: Arc<ListeningRecords>,
    /// The state of the intake.
    pub disk: Arc<DiskMonitor>,
    /// The peers that each topic accepts.
    pub settings: Live<Settings>,
    /// The reliable topics.
    pub reliable: Reliable,
    /// The counters.
    pub counters: Arc<Counters>,
}

impl Subscriptions {
    /// Reads all streams until `stop` is cancelled. All streams are closed when it returns.
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
                // The stream has ended before this, because it could add the record of the topic again.
                self.listening_records.forget(&topic);
                if self.reliable.is_reliable(&topic) {
                    self.reliable.send(Input::Unsubscribed(topic)).await;
                }
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
            let mut streams = Streams::default();
            if self.reliable.is_reliable(&topic) {
                let beginning = self.interest.beginning(&topic);
                self.reliable.send(Input::Subscribed(topic.clone(), beginning)).await;
            }
            let bundles = self.listen_to_bundles(&topic);
            let messages = self.listen_to_messages(&topic, &mut streams);
            tokio::join!(bundles, messages);
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// Reads the bundles of a topic that is plain, too. On a topic that is only reliable, they are its messages.
    async fn listen_to_bundles(&self, topic: &Topic) {
        let mut backoff = Backoff::new();
        while self.reliable.is_both(topic) {
            let error = self.bundles(topic, &mut backoff).await;
            tracing::debug!(%topic, "the stream of bundles ended, opening it again: {error}");
            self.log.clock().sleep(backoff.next_pause()).await;
        }
    }

    async fn bundles(&self, topic: &Topic, backoff: &mut Backoff) -> BackendError {
        let identity = match self.backend.swarm.identity().await {
            Ok(identity) => identity,
            Err(error) => return error,
        };
        let channels = self.reliable.channels();
        let mut messages = match self.backend.pubsub.subscribe(&channels.of(topic)).await {
            Ok(messages) => messages,
            Err(error) => return error,
        };
        backoff.reset();
        let read = async {
            while let Some(message) = messages.next().await {
                match message {
                    Ok(message) => self.take_in_bundle(topic, &identity, message).await,
                    Err(error) => return error,
                }
            }
            ended(topic)
        };
        tokio::select! {
            error = read => error,
            () = self.reliable.channels_changed(&channels) => ended(topic),
        }
    }

    async fn listen_to_messages(&self, topic: &Topic, streams: &mut Streams) {
        loop {
            let why = tokio::select! {
                biased;
                // A stopped intake closes the stream. The time until it is open again is a gap.
                short = self.disk.short() => short.to_string(),
                error = self.stream(topic, streams) => error.to_string(),
            };
            self.listening_records.disconnected(topic, &why);
            self.echoes.stream_ended(topic);
            self.counters.reconnects.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(%topic, "the stream ended, opening it again: {why}");
            self.log.clock().sleep(streams.backoff.next_pause()).await;
            self.disk.enough().await;
        }
    }

    /// Reads one stream until it ends. Each end is an error.
    async fn stream(&self, topic: &Topic, streams: &mut Streams) -> BackendError {
        let identity = match self.backend.swarm.identity().await {
            Ok(identity) => identity,
            Err(error) => return error,
        };
        let is_reliable = self.reliable.is_only_reliable(topic);
        let channels = self.reliable.channels();
        let mut messages = match self.backend.pubsub.subscribe(&self.reliable.channel(topic)).await {
            Ok(messages) => messages,
            Err(error) => return error,
        };
        self.listening_records.connected(topic, is_reliable, self.log.now());
        self.echoes.stream_began(topic);
        streams.backoff.reset();
        let read = async {
            while let Some(message) = messages.next().await {
                match message {
                    Ok(message) if is_reliable => self.take_in_bundle(topic, &identity, message).await,
                    Ok(message) => self.take_in(topic, &identity, message, &mut streams.seen).await,
                    Err(error) => return error,
                }
            }
            ended(topic)
        };
        // The host reads the same topic in another fleet.
        tokio::select! {
            error = read => error,
            () = self.reliable.channels_changed(&channels), if is_reliable => ended(topic),
        }
    }

    async fn take_in(&self, topic: &Topic, identity: &PeerName, message: Incoming, seen: &mut Seen) {
        if message.from == *identity && self.echoes.is_echo(topic, &message.data) {
            self.counters.echoes.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if self.settings.now().speakers(topic).is_some_and(|peers| !peers.contains(&message.from)) {
            tracing::debug!(%topic, from = %message.from, "a message is refused: the config does not allow its sender on the topic");
            self.counters.refused.fetch_add(1, Ordering::Relaxed);
            self.listening_records.refused(topic, &message.from);
            return;
        }
        if !seen.is_new(&message) {
            self.counters.repeated.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if message.data.len() > MAX_MESSAGE {
            tracing::warn!(%topic, from = %message.from, bytes = message.data.len(), "a message is too large and was dropped");
            self.counters.oversized.fetch_add(1, Ordering::Relaxed);
            self.listening_records.lost(topic);
            return;
        }
        self.listening_records.received(topic);
        if self.backend.network && message.from != *identity {
            self.heard_others(topic).await;
        }
        if self.reliable.is_both(topic) {
            self.take_in_of_both(topic, message).await;
        } else {
            self.deliver(topic, message).await;
        }
    }

    /// Delivers a plain message of a topic with both deliveries, unless it is the copy of an event of a member.
    async fn take_in_of_both(&self, topic: &Topic, message: Incoming) {
        match self.judge(topic, &message) {
            Verdict::Deliver => self.deliver(topic, message).await,
            Verdict::Copy => drop(self.counters.copies.fetch_add(1, Ordering::Relaxed)),
            Verdict::Hold => {
                let (it, topic) = (self.clone(), topic.clone());
                tokio::spawn(async move {
                    it.log.clock().sleep(HOLD).await;
                    match it.judge_held(&topic, &message) {
                        Verdict::Copy => drop(it.counters.copies.fetch_add(1, Ordering::Relaxed)),
                        Verdict::Deliver | Verdict::Hold => it.deliver(&topic, message).await,
                    }
                });
            }
        }
    }

    fn judge(&self, topic: &Topic, message: &Incoming) -> Verdict {
        let now = self.log.clock().monotonic();
        self.reliable.copies().judge(topic, &message.from, &message.data, now)
    }

    fn judge_held(&self, topic: &Topic, message: &Incoming) -> Verdict {
        let now = self.log.clock().monotonic();
        self.reliable.copies().judge_held(topic, &message.from, &message.data, now)
    }

    async fn deliver(&self, topic: &Topic, message: Incoming) {
        let event =
            Event::Message { topic: topic.clone(), data: message.data, origin: Origin::Peer(message.from) };
        self.append(Kind::Event(event)).await;
        self.counters.received.fetch_add(1, Ordering::Relaxed);
    }

    /// Passes a bundle of a reliable topic to the driver.
    async fn take_in_bundle(&self, topic: &Topic, identity: &PeerName, message: Incoming) {
        if self.backend.network && message.from != *identity {
            self.heard_others(topic).await;
        }
        let from = message.from.clone();
        if let Err(why) = self.reliable.receive(topic, message).await {
            tracing::debug!(%topic, %from, "a message on a reliable topic is refused: {why}");
            self.counters.refused.fetch_add(1, Ordering::Relaxed);
            self.listening_records.refused(topic, &from);
        }
    }

    /// Records that another peer was heard on a topic. The record is durable, so it counts after a restart too.
    async fn heard_others(&self, topic: &Topic) {
        if self.listening_records.heard_others(topic, self.log.now()) {
            let name = topic.clone();
            let noted = self.commit.write_later(move |write| heard_topics::note(write, &name)).await;
            if let Err(error) = noted {
                tracing::error!(%topic, "cannot note that others were heard: {error}");
            }
        }
    }

    /// Appends an entry. If the log is full, the wait is outside the async threads.
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

/// The error of a stream that the daemon has closed.
fn ended(topic: &Topic) -> BackendError {
    BackendError::Unreachable { what: format!("topic {topic}"), why: "the stream was closed".to_owned() }
}

/// An open stream.
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

/// The part of a topic that outlives each of its streams.
#[derive(Debug, Default)]
struct Streams {
    seen: Seen,
    /// The pause before the next stream.
    backoff: Backoff,
}

/// The most recent messages, to recognise repeated ones.
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
