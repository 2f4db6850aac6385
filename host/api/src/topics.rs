//! Owns `/v1/topics`: publishes messages, streams the messages of a topic, and lists topics and peers.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::http::StatusCode;
use axum::response::Response;
use dim_model::beginning::{Beginning, ReadFrom};
use dim_model::entry::{Entry, Event, Kind, Offset, Origin};
use dim_model::feed::Missed;
use dim_model::ident::{IpnsName, MemberName, PeerName, Topic};
use dim_model::time::{Timestamp, nanoseconds};
use dim_network::outbox::API_QUOTA;
use dim_network::reliable_topics::{ReaderPosition, Reliable, WriterLog, own_writer};
use dim_server::host::Host;
use dim_store::effect::Publish;
use dim_store::interest::Subscriber;
use dim_store::plugin_limits::MESSAGE_BYTES;
use dim_store::topic_rows::{self, RaisedAlarm};
use dim_store::{Store, StoreError};
use multibase::Base;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::ApiError;
use crate::extract::{Current, Path, Plain, Query};
use crate::openapi::{Binary, Missing, TooLarge};
use crate::stream::{self, Delivery, Entries, Source, Start};

/// A topic that a plugin or a caller listens to, with the state of listening.
#[derive(Debug, Serialize, ToSchema)]
pub struct TopicListening {
    /// The topic.
    topic: Topic,
    /// The delivery of messages on the topic.
    delivery: TopicDelivery,
    /// The time since which the stream is open; null while it is closed.
    #[schema(required)]
    connected_since: Option<Timestamp>,
    /// The time until which listening is proven; null before the first proof.
    #[schema(required)]
    listening_proven_until: Option<Timestamp>,
    /// The number of known other peers on the topic.
    peers: usize,
    /// Whether only messages of peers in the config are accepted.
    is_restricted: bool,
    /// The number of messages that were refused since the host started.
    refused: u64,
    /// The sender of the last refused message.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, nullable = false)]
    last_refused: Option<PeerName>,
}

/// The delivery of messages on a topic.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum TopicDelivery {
    /// Plain pubsub: messages can be lost.
    Plain,
    /// Each event of each host of the fleet once, in the order of its host.
    Reliable,
    /// Reliable between hosts, and plain for other programs.
    Both,
}

impl TopicDelivery {
    fn of(topic: &Topic, reliable: &Reliable) -> Self {
        match reliable.settings(topic) {
            None => Self::Plain,
            Some(settings) if settings.is_plain_too => Self::Both,
            Some(_) => Self::Reliable,
        }
    }
}

/// One incarnation of a writer of a reliable topic.
#[derive(Debug, Serialize, ToSchema)]
pub struct TopicWriter {
    /// The writer, by the IPNS name of its key.
    #[schema(value_type = String)]
    writer: IpnsName,
    /// Whether this host is the writer.
    is_own: bool,
    /// Whether the daemon of this host keeps the log of this other writer.
    is_mirrored: bool,
    /// The process start of the writer: 16 random bytes in hex.
    incarnation: String,
    /// The number of events that the writer is known to have published in this incarnation.
    published: u64,
    /// The number of them that are durable at this host, or reported as missing.
    received: u64,
    /// The number of them that are not.
    lag: u64,
    /// The number of bundles of the writer that were fetched because the message did not arrive, since this host
    /// started.
    repaired: u64,
    /// The number of bundles of the writer that arrived again, since this host started.
    repeated: u64,
    /// The number of gaps in the log of the writer, since this host started.
    gaps: u64,
    /// The number of bundles of the writer that were refused, since this host started.
    refused: u64,
    /// The positions of the other members that report one.
    readers: Vec<TopicReader>,
}

/// The position of a member in the log of a writer.
#[derive(Debug, Serialize, ToSchema)]
pub struct TopicReader {
    /// The member, by the IPNS name of its key.
    #[schema(value_type = String)]
    member: IpnsName,
    /// The sequence after the last event that is durable there.
    received: u64,
    /// The sequence from which on no event is missing there: that of its first event, or that after its last gap.
    from: u64,
    /// The number of published events that are not durable there.
    lag: u64,
}

impl From<WriterLog> for TopicWriter {
    fn from(log: WriterLog) -> Self {
        let reader = |position: ReaderPosition| TopicReader {
            member: position.reader,
            received: position.received,
            from: position.from,
            lag: log.end.saturating_sub(position.received),
        };
        Self {
            is_own: log.is_own,
            is_mirrored: log.is_mirrored,
            incarnation: log.incarnation.to_string(),
            published: log.end,
            received: log.received,
            lag: log.end.saturating_sub(log.received),
            repaired: log.counters.repaired,
            repeated: log.counters.repeated,
            gaps: log.counters.gaps,
            refused: log.counters.refused,
            readers: log.readers.iter().cloned().map(reader).collect(),
            writer: log.writer,
        }
    }
}

/// Lists the writers of a reliable topic that this host knows, itself included, with each incarnation.
#[utoipa::path(get, path = "/topics/{topic}/writers", tag = "topics", operation_id = "list_writers",
    params(("topic" = Topic, Path, description = "The topic")),
    responses((status = 200, body = [TopicWriter]), Missing))]
pub async fn writers(
    Current(host): Current,
    Path(topic): Path<String>,
) -> Result<Json<Vec<TopicWriter>>, ApiError> {
    let topic: Topic = topic.parse()?;
    let reliable = &host.exchange.links.reliable;
    if !reliable.is_reliable(&topic) {
        let why = format!(
            "the topic {topic} is not reliable: the config has no `delivery: reliable` and no `delivery: both` for it"
        );
        return Err(ApiError::not_found(why));
    }
    let logs = reliable.writers(&topic).await;
    let logs = logs.ok_or_else(|| ApiError::unavailable("the host is shutting down"))?;
    Ok(Json(logs.into_iter().map(TopicWriter::from).collect()))
}

/// An alarm about a writer of a reliable topic.
#[derive(Debug, Serialize, ToSchema)]
pub struct TopicAlarm {
    /// The topic.
    topic: Topic,
    /// The writer, by the IPNS name of its key.
    #[schema(value_type = String)]
    writer: IpnsName,
    /// Whether this host is the writer.
    is_own: bool,
    /// The finding, with its proof: incarnations, sequences, and the digests of bundles.
    finding: String,
    /// The time at which the alarm was raised.
    at: Timestamp,
    /// Whether the operator has acknowledged it.
    is_acknowledged: bool,
}

/// The filter of alarms.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct AlarmFilter {
    /// Only alarms on this topic
    topic: Option<Topic>,
}

/// Lists the alarms about writers of reliable topics, the newest first, the acknowledged ones too.
///
/// The host keeps at most 1,000. It drops the oldest acknowledged one first, then the oldest of the writer that has the
/// most.
#[utoipa::path(get, path = "/alarms", tag = "topics", operation_id = "list_alarms", params(AlarmFilter),
    responses((status = 200, body = [TopicAlarm])))]
pub async fn alarms(
    Current(host): Current,
    Query(filter): Query<AlarmFilter>,
) -> Result<Json<Vec<TopicAlarm>>, ApiError> {
    let own = own_writer(&host.storage.keys);
    let mut raised = topic_rows::alarms(&host.storage.store.snapshot()?)?;
    raised.retain(|alarm| filter.topic.as_ref().is_none_or(|topic| alarm.topic == *topic));
    let shown = raised.into_iter().rev().map(|alarm| {
        let RaisedAlarm { topic, writer, finding, at, is_acknowledged, .. } = alarm;
        let writer = writer.name();
        TopicAlarm { topic, is_own: own.as_ref() == Some(&writer), writer, finding, at, is_acknowledged }
    });
    Ok(Json(shown.collect()))
}

/// Lists the topics that plugins or callers listen to.
#[utoipa::path(get, path = "/topics", tag = "topics", operation_id = "list_topics",
    responses((status = 200, body = [TopicListening])))]
pub async fn list(Current(host): Current) -> Json<Vec<TopicListening>> {
    let listening_records = host.exchange.links.listening_records.all();
    let listening = host.exchange.links.interest.topics().into_iter().map(|topic| {
        let hearing = listening_records.get(&topic).cloned().unwrap_or_default();
        TopicListening {
            delivery: TopicDelivery::of(&topic, &host.exchange.links.reliable),
            is_restricted: host.network.now().speakers(&topic).is_some(),
            refused: hearing.refused,
            last_refused: hearing.last_refused.clone(),
            topic,
            connected_since: hearing.connected_since,
            listening_proven_until: hearing.proven_until,
            peers: hearing.peer_count(),
        }
    });
    Json(listening.collect())
}

/// Lists the peers of a topic that the backend knows now.
#[utoipa::path(get, path = "/topics/{topic}/peers", tag = "topics", operation_id = "list_peers",
    params(("topic" = Topic, Path, description = "The topic")),
    responses((status = 200, body = [String], description = "Their peer ids")))]
pub async fn peers(
    Current(host): Current,
    Path(topic): Path<String>,
) -> Result<Json<Vec<PeerName>>, ApiError> {
    let topic: Topic = topic.parse()?;
    Ok(Json(host.exchange.links.backend.pubsub.peers(&topic).await?))
}

/// Publishes the body unchanged: to plugins with the commit, to the network through the outbox.
///
/// The body has at most 61,440 bytes and any content type.
#[utoipa::path(post, path = "/topics/{topic}/messages", tag = "topics", operation_id = "publish_message",
    params(("topic" = Topic, Path, description = "The topic")),
    request_body(content = inline(Binary), content_type = "application/octet-stream"),
    responses((status = 202, description = "The message is durable and will be sent"), TooLarge))]
pub async fn publish(
    Current(host): Current,
    Path(topic): Path<String>,
    Plain(data): Plain<Bytes>,
) -> Result<StatusCode, ApiError> {
    let topic: Topic = topic.parse()?;
    if data.len() > MESSAGE_BYTES {
        return Err(ApiError::too_large(format!(
            "the message has {} bytes; pubsub loses messages above {MESSAGE_BYTES}",
            data.len()
        )));
    }
    let waiting = host.exchange.links.backlog.length(None);
    if waiting.load(Ordering::Relaxed) >= API_QUOTA {
        return Err(ApiError::unavailable(format!("{API_QUOTA} publishes wait for the backend already")));
    }
    let now = host.storage.log.now();
    // The counter must include the publish before the outbox sends it and decrements the counter.
    waiting.fetch_add(1, Ordering::Relaxed);
    if let Err(error) = host.storage.commit.publish(Publish { topic, data }, now).await {
        waiting.fetch_sub(1, Ordering::Relaxed);
        return Err(error.into());
    }
    Ok(StatusCode::ACCEPTED)
}

/// A message in the stream of a topic.
#[derive(Debug, Serialize, ToSchema)]
pub struct Message {
    /// The topic.
    topic: Topic,
    /// The time at which the message became an entry of the log.
    time: Timestamp,
    /// The kind of its publisher.
    origin: MessageOrigin,
    /// The plugin's name, the peer's id or the IPNS name of the member's key; null if the message came through this
    /// API.
    #[schema(required)]
    from: Option<String>,
    /// The identity of the event in the log of the member.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    event: Option<EventIdentity>,
    /// The content, if it is UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    data: Option<String>,
    /// The content in multibase, if it is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    data_multibase: Option<String>,
}

/// The identity of an event of a reliable topic, beside its topic and writer.
#[derive(Debug, Serialize, ToSchema)]
pub struct EventIdentity {
    /// The process start of the writer: 16 random bytes in hex.
    incarnation: String,
    /// The number of the event in the incarnation, from 0.
    sequence: u64,
    /// The hybrid logical time of the event.
    time: Timestamp,
}

impl EventIdentity {
    fn of(origin: &Origin) -> Option<Self> {
        let Origin::Member(event) = origin else { return None };
        let incarnation = Base::Base16Lower.encode(event.incarnation);
        Some(Self { incarnation, sequence: event.sequence, time: event.time })
    }
}

/// The kind of a message's publisher.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum MessageOrigin {
    /// A plugin of this host.
    Plugin,
    /// A caller of this host.
    Host,
    /// Another program on the network.
    Peer,
    /// A member of the fleet, on a reliable topic.
    Member,
}

/// The first message of a stream.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct FirstMessage {
    /// `head` for messages from now on (the default), `earliest` for all that the host's log has, or a time or a duration
    /// before now for those that were received since. If nobody listens to the topic yet and it is reliable, the host
    /// reads what its writers keep. `Last-Event-ID` takes precedence
    #[param(value_type = Option<String>, nullable = false)]
    from: Option<ReadFrom>,
}

/// Streams the messages of a topic, as server-sent events.
///
/// The data of an event `message` is the message, and the event's id is the offset of its entry in the log. A
/// reconnecting caller sends its last id as `Last-Event-ID` and gets the messages since. An event `lagged` has the
/// number of entries that were missed because the log does not hold them any more. It has null if the number is
/// unknown, for example after a gap in listening. The stream continues after it.
#[utoipa::path(get, path = "/topics/{topic}/messages", tag = "topics", operation_id = "subscribe_topic",
    params(
        FirstMessage,
        ("topic" = Topic, Path, description = "The topic"),
        ("Last-Event-ID" = Option<String>, Header, description = "The last id that the caller had"),
    ),
    responses((status = 200, body = Message, content_type = "text/event-stream",
        description = "A stream without end; the schema is that of the data of an event `message`")))]
pub async fn subscribe(
    Current(host): Current,
    Path(topic): Path<String>,
    Query(FirstMessage { from }): Query<FirstMessage>,
    start: Start,
) -> Result<Response, ApiError> {
    let ended = host.life.ended.clone();
    let from = from.unwrap_or_default().at(host.storage.log.now());
    Ok(stream::answer(Listening::begin(host, topic.parse()?, start, from).await?, ended))
}

/// The time before its last event from which on a caller that comes back gets the events of a reliable topic: clocks
/// differ, and events arrive late.
const REVIEW: Duration = Duration::from_secs(600);

/// The maximum number of entries that are read to find out which events a caller has.
const REVIEWED: u64 = 100_000;

/// The number of entries that are read at once.
const READ: usize = 256;

/// A caller that listens. Its interest in the topic ends on drop.
struct Listening {
    host: Arc<Host>,
    topic: Topic,
    party: Subscriber,
    entries: Entries,
    /// The time from which the caller wants messages.
    since: Timestamp,
    /// For each incarnation of a member: the sequence after its last event. A host that begins to read a topic again also
    /// receives events that are in its log from before.
    received: HashMap<(MemberName, [u8; 16]), u64>,
}

impl Listening {
    async fn begin(
        host: Arc<Host>,
        topic: Topic,
        mut start: Start,
        from: Beginning,
    ) -> Result<Self, StoreError> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let party = Subscriber::Caller(NEXT.fetch_add(1, Ordering::Relaxed));
        let mut since = host.storage.log.now();
        if let (Start::Now, Some(time)) = (start, time_of(from)) {
            let store = host.storage.store.clone();
            let found = tokio::task::spawn_blocking(move || store.log_offset_at(time)).await;
            (start, since) = (Start::At(found.expect("reading does not panic")?), time);
        }
        let mut entries = Entries::from(&host, start);
        let mut received = HashMap::new();
        let is_reliable = host.exchange.links.reliable.is_reliable(&topic);
        if let Start::After(id) = start {
            let log = host.storage.log.clone();
            let read = tokio::task::spawn_blocking(move || {
                let mut had = VecDeque::new();
                log.read(Offset(id), 1, &mut had).map(|()| had.pop_front())
            });
            let had = read.await.expect("reading does not panic")?;
            since = had.map_or(since, |had| had.time);
            // The host may not have listened meanwhile. Without a network every message becomes an entry.
            let listened = host
                .exchange
                .links
                .listening_records
                .listened_since(&topic)
                .is_some_and(|listened| listened <= since);
            if host.exchange.links.backend.network && !listened && !is_reliable {
                entries.doubt();
            }
        }
        let from = match start {
            // If nobody listened meanwhile, the host reads again what the writers keep.
            Start::After(id) if is_reliable => {
                let (store, topic) = (host.storage.store.clone(), topic.clone());
                let begins = Timestamp(since.0.saturating_sub(nanoseconds(REVIEW)));
                let had = tokio::task::spawn_blocking(move || received_until(&store, &topic, begins, id));
                received = had.await.expect("reading does not panic")?;
                Beginning::Time(begins)
            }
            // It has what was there.
            Start::After(_) => Beginning::Head,
            _ => from,
        };
        host.exchange.links.interest.want_topic_from(&topic, party.clone(), from);
        Ok(Self { host, topic, party, entries, since, received })
    }
}

/// For each incarnation of a member: the sequence after its last event on a topic, in the entries since `begins` up to
/// the entry `last`.
fn received_until(
    store: &Store,
    topic: &Topic,
    begins: Timestamp,
    last: u64,
) -> Result<HashMap<(MemberName, [u8; 16]), u64>, StoreError> {
    let mut received: HashMap<(MemberName, [u8; 16]), u64> = HashMap::new();
    let mut next = store.log_offset_at(begins)?.0.max(last.saturating_sub(REVIEWED));
    while next <= last {
        let entries = store.read_log(Offset(next), READ)?;
        let Some(end) = entries.last() else { break };
        next = end.offset.0 + 1;
        for entry in entries.iter().filter(|entry| entry.offset.0 <= last) {
            if let Kind::Event(Event::Message { topic: of, origin: Origin::Member(event), .. }) = &entry.kind
                && of == topic
            {
                let end = received.entry((event.writer.clone(), event.incarnation)).or_default();
                *end = (event.sequence + 1).max(*end);
            }
        }
    }
    Ok(received)
}

/// The time of a beginning; `None` for the head.
fn time_of(beginning: Beginning) -> Option<Timestamp> {
    match beginning {
        Beginning::Head => None,
        Beginning::Time(time) => Some(time),
        Beginning::Earliest => Some(Timestamp(0)),
    }
}

impl Source for Listening {
    fn opening(&self) -> Option<u64> {
        self.entries.opening()
    }

    async fn read(&mut self) -> Option<Delivery> {
        let (mut told, entries) = self.entries.read().await?;
        for entry in entries {
            match &entry.kind {
                Kind::Event(Event::Gap { topic, until, missing, .. })
                    if *topic == self.topic && *until > self.since =>
                {
                    let count = missing.as_ref().map(|it| it.next.saturating_sub(it.first));
                    told.missed = told.missed.and(count.map_or(Missed::Unknown, Missed::Count));
                }
                _ => {}
            }
            if self.is_repeated(&entry) {
                continue;
            }
            if let Some(message) = self.message(&entry) {
                let data = serde_json::json!(message).to_string();
                told.events.push((Some(entry.offset.0), "message", data));
            }
        }
        Some(told)
    }
}

impl Listening {
    /// Whether an entry is an event of a member that the caller has.
    fn is_repeated(&mut self, entry: &Entry) -> bool {
        let Kind::Event(Event::Message { topic, origin: Origin::Member(event), .. }) = &entry.kind else {
            return false;
        };
        if *topic != self.topic {
            return false;
        }
        let next = self.received.entry((event.writer.clone(), event.incarnation)).or_default();
        let is_repeated = event.sequence < *next;
        *next = (event.sequence + 1).max(*next);
        is_repeated
    }

    fn message(&self, entry: &Entry) -> Option<Message> {
        let Kind::Event(Event::Message { topic, data, origin }) = &entry.kind else { return None };
        (*topic == self.topic).then(|| {
            let event = EventIdentity::of(origin);
            let (origin, from) = match origin {
                Origin::Plugin(name) => (MessageOrigin::Plugin, Some(name.to_string())),
                Origin::Host => (MessageOrigin::Host, None),
                Origin::Peer(peer) => (MessageOrigin::Peer, Some(peer.to_string())),
                Origin::Member(event) => (MessageOrigin::Member, Some(event.writer.to_string())),
            };
            let (data, data_multibase) = match std::str::from_utf8(data) {
                Ok(text) => (Some(text.to_owned()), None),
                Err(_) => (None, Some(multibase::encode(Base::Base64Url, data))),
            };
            Message { topic: topic.clone(), time: entry.time, origin, from, event, data, data_multibase }
        })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.host.exchange.links.interest.want_topic(&self.topic, self.party.clone(), false);
    }
}
