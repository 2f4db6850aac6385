//! `/v1/topics`: publishing, listening, and who else is there.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Json;
use axum::body::Bytes;
use axum::http::StatusCode;
use axum::response::Response;
use multibase::Base;
use serde::Serialize;
use utoipa::ToSchema;

use super::ApiError;
use super::extract::{Current, Path, Plain};
use super::openapi::{Binary, TooLarge};
use super::stream::{self, Entries, Source, Start, Told};
use crate::effect::Publish;
use crate::entry::{Entry, Event, Kind, Offset, Origin};
use crate::feed::Missed;
use crate::host::Host;
use crate::ident::{PeerName, Topic};
use crate::interest::Party;
use crate::outbox::API_QUOTA;
use crate::plugin::MESSAGE_BYTES;
use crate::store::StoreError;
use crate::time::Timestamp;

/// A topic that someone here listens to, and how well.
#[derive(Debug, Serialize, ToSchema)]
pub struct TopicListening {
    /// Its name.
    topic: Topic,
    /// Since when its stream is open; null while it is not.
    #[schema(required)]
    connected_since: Option<Timestamp>,
    /// Until when listening is proven; null before the first proof.
    #[schema(required)]
    listening_proven_until: Option<Timestamp>,
    /// How many other peers are on it, as far as is known.
    peers: usize,
    /// Whether only the peers that the config names may speak on it.
    is_restricted: bool,
    /// Messages of others that were refused since the host started.
    refused: u64,
    /// Who sent the last of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, nullable = false)]
    last_refused: Option<PeerName>,
}

/// The topics that anyone here listens to, and how well.
#[utoipa::path(get, path = "/topics", tag = "topics", operation_id = "list_topics",
    responses((status = 200, body = [TopicListening])))]
pub async fn list(Current(host): Current) -> Json<Vec<TopicListening>> {
    let hearings = host.hearings.all();
    let listening = host.interest.topics().into_iter().map(|topic| {
        let hearing = hearings.get(&topic).cloned().unwrap_or_default();
        TopicListening {
            is_restricted: host.config.now().speakers(&topic).is_some(),
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

/// The peers of a topic, as the backend knows them now.
#[utoipa::path(get, path = "/topics/{topic}/peers", tag = "topics", operation_id = "list_peers",
    params(("topic" = Topic, Path, description = "The topic")),
    responses((status = 200, body = [String], description = "Their peer ids")))]
pub async fn peers(
    Current(host): Current,
    Path(topic): Path<String>,
) -> Result<Json<Vec<PeerName>>, ApiError> {
    let topic: Topic = topic.parse()?;
    Ok(Json(host.backend.pubsub.peers(&topic).await?))
}

/// Publishes the body as it is: to the plugins with the commit, to the network through the outbox.
///
/// At most 61,440 bytes, whatever its content type.
#[utoipa::path(post, path = "/topics/{topic}/messages", tag = "topics", operation_id = "publish_message",
    params(("topic" = Topic, Path, description = "The topic")),
    request_body(content = inline(Binary), content_type = "application/octet-stream"),
    responses((status = 202, description = "It is durable, and will be sent"), TooLarge))]
pub async fn publish(
    Current(host): Current,
    Path(topic): Path<String>,
    Plain(data): Plain<Bytes>,
) -> Result<StatusCode, ApiError> {
    let topic: Topic = topic.parse()?;
    if data.len() > MESSAGE_BYTES {
        return Err(ApiError::too_large(format!(
            "the message has {} bytes; pubsub loses what is over {MESSAGE_BYTES}",
            data.len()
        )));
    }
    let waiting = host.backlog.length(None);
    if waiting.load(Ordering::Relaxed) >= API_QUOTA {
        return Err(ApiError::unavailable(format!("{API_QUOTA} publishes wait for the backend already")));
    }
    let now = host.log.now();
    // Before the outbox can see it and count it down.
    waiting.fetch_add(1, Ordering::Relaxed);
    if let Err(error) = host.commit.publish(Publish { topic, data }, now).await {
        waiting.fetch_sub(1, Ordering::Relaxed);
        return Err(error.into());
    }
    Ok(StatusCode::ACCEPTED)
}

/// What a topic's stream tells of a message.
#[derive(Debug, Serialize, ToSchema)]
pub struct Message {
    /// Its topic.
    topic: Topic,
    /// When it became an entry of the log.
    time: Timestamp,
    /// Who published it.
    origin: MessageOrigin,
    /// The plugin's name or the peer's id; null if it came through this API.
    #[schema(required)]
    from: Option<String>,
    /// What it says, if it is UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    data: Option<String>,
    /// What it says, if it is not: its bytes in multibase.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    data_multibase: Option<String>,
}

/// Who published a message.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum MessageOrigin {
    /// A plugin of this host.
    Plugin,
    /// A caller of this host.
    Host,
    /// Another program, over the network.
    Peer,
}

/// The messages of a topic from now on, as server-sent events.
///
/// The data of an event `message` is the message, and the event's id the offset of its entry in the log. A caller that
/// was cut off sends the last id that it had as `Last-Event-ID`, and gets what came since. An event `lagged` says how
/// many entries of the log were missed, because the log does not hold them any more; its data is null if that is not
/// known, as when the host could not hear the topic for a time. The stream goes on.
#[utoipa::path(get, path = "/topics/{topic}/messages", tag = "topics", operation_id = "subscribe_topic",
    params(
        ("topic" = Topic, Path, description = "The topic"),
        ("Last-Event-ID" = Option<String>, Header, description = "The last id that the caller had"),
    ),
    responses((status = 200, body = Message, content_type = "text/event-stream",
        description = "A stream without end; the schema is that of the data of an event `message`")))]
pub async fn subscribe(
    Current(host): Current,
    Path(topic): Path<String>,
    start: Start,
) -> Result<Response, ApiError> {
    let ended = host.ended.clone();
    Ok(stream::answer(Listening::begin(host, topic.parse()?, start).await?, ended))
}

/// A caller that listens; the topic is wanted for as long as this lives.
struct Listening {
    host: Arc<Host>,
    topic: Topic,
    party: Party,
    entries: Entries,
    /// From when on it wants to hear.
    since: Timestamp,
}

impl Listening {
    async fn begin(host: Arc<Host>, topic: Topic, start: Start) -> Result<Self, StoreError> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let party = Party::Caller(NEXT.fetch_add(1, Ordering::Relaxed));
        let mut entries = Entries::from(&host, start);
        let mut since = host.log.now();
        if let Start::After(id) = start {
            let log = host.log.clone();
            let read = tokio::task::spawn_blocking(move || {
                let mut had = VecDeque::new();
                log.read(Offset(id), 1, &mut had).map(|()| had.pop_front())
            });
            let had = read.await.expect("reading does not panic")?;
            since = had.map_or(since, |had| had.time);
            // Nobody may have listened meanwhile. What is published here becomes an entry all the same.
            let listened = host.hearings.listened_since(&topic).is_some_and(|listened| listened <= since);
            if host.backend.network && !listened {
                entries.doubt();
            }
        }
        host.interest.want_topic(&topic, party.clone(), true);
        Ok(Self { host, topic, party, entries, since })
    }
}

impl Source for Listening {
    fn opening(&self) -> Option<u64> {
        self.entries.opening()
    }

    async fn read(&mut self) -> Option<Told> {
        let (mut told, entries) = self.entries.read().await?;
        for entry in entries {
            match &entry.kind {
                Kind::Event(Event::Gap { topic, until, .. })
                    if *topic == self.topic && *until > self.since =>
                {
                    told.missed = Missed::Unknown;
                }
                _ => {}
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
    fn message(&self, entry: &Entry) -> Option<Message> {
        let Kind::Event(Event::Message { topic, data, origin }) = &entry.kind else { return None };
        (*topic == self.topic).then(|| {
            let (origin, from) = match origin {
                Origin::Plugin(name) => (MessageOrigin::Plugin, Some(name.to_string())),
                Origin::Host => (MessageOrigin::Host, None),
                Origin::Peer(peer) => (MessageOrigin::Peer, Some(peer.to_string())),
            };
            let (data, data_multibase) = match std::str::from_utf8(data) {
                Ok(text) => (Some(text.to_owned()), None),
                Err(_) => (None, Some(multibase::encode(Base::Base64Url, data))),
            };
            Message { topic: topic.clone(), time: entry.time, origin, from, data, data_multibase }
        })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.host.interest.want_topic(&self.topic, self.party.clone(), false);
    }
}
