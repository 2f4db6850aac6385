//! `/v1/topics`: publishing, listening, and who else is there.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Json;
use axum::body::Bytes;
use axum::http::StatusCode;
use axum::response::sse::{Event as Sse, KeepAlive, Sse as Stream};
use multibase::Base;
use serde_json::{Value, json};
use tokio::sync::broadcast;

use super::ApiError;
use super::extract::{Current, Path, Plain};
use crate::effect::Publish;
use crate::entry::{Entry, Event, Kind, Origin};
use crate::host::Host;
use crate::ident::Topic;
use crate::interest::Party;
use crate::outbox::API_QUOTA;
use crate::plugin::MESSAGE_BYTES;

/// The topics that anyone here listens to, and how well.
pub async fn list(Current(host): Current) -> Json<Value> {
    let hearings = host.hearings.all();
    let mut topics: BTreeMap<Topic, Value> = BTreeMap::new();
    for topic in host.interest.topics() {
        let hearing = hearings.get(&topic).cloned().unwrap_or_default();
        topics.insert(
            topic.clone(),
            json!({
                "topic": topic,
                "connected_since": hearing.connected_since,
                "listening_proven_until": hearing.proven_until,
                "peers": hearing.peer_count(),
            }),
        );
    }
    Json(topics.into_values().collect())
}

/// The peers of a topic, as the backend knows them now.
pub async fn peers(Current(host): Current, Path(topic): Path<String>) -> Result<Json<Value>, ApiError> {
    let topic: Topic = topic.parse()?;
    Ok(Json(json!(host.backend.pubsub.peers(&topic).await?)))
}

/// Publishes the body as it is: to the plugins with the commit, to the network through the outbox.
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

/// The messages of a topic from now on, as server-sent events.
pub async fn subscribe(
    Current(host): Current,
    Path(topic): Path<String>,
) -> Result<Stream<impl futures::Stream<Item = Result<Sse, Infallible>>>, ApiError> {
    let listening = Listening::new(host, topic.parse()?);
    let messages = futures::stream::unfold(listening, |mut listening| async {
        let event = listening.next().await?;
        Some((Ok(event), listening))
    });
    Ok(Stream::new(messages).keep_alive(KeepAlive::default()))
}

/// A caller that listens; the topic is wanted for as long as this lives.
struct Listening {
    host: Arc<Host>,
    topic: Topic,
    party: Party,
    entries: broadcast::Receiver<Arc<Entry>>,
}

impl Listening {
    fn new(host: Arc<Host>, topic: Topic) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let party = Party::Caller(NEXT.fetch_add(1, Ordering::Relaxed));
        let entries = host.log.listen();
        host.interest.want_topic(&topic, party.clone(), true);
        Self { host, topic, party, entries }
    }

    async fn next(&mut self) -> Option<Sse> {
        loop {
            let next = tokio::select! {
                biased;
                () = self.host.ended.cancelled() => return None,
                next = self.entries.recv() => next,
            };
            match next {
                Ok(entry) => {
                    if let Some(message) = self.message(&entry) {
                        return Some(
                            Sse::default()
                                .event("message")
                                .id(entry.offset.to_string())
                                .data(message.to_string()),
                        );
                    }
                }
                Err(broadcast::error::RecvError::Lagged(missed)) => {
                    return Some(Sse::default().event("lagged").data(missed.to_string()));
                }
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }

    fn message(&self, entry: &Entry) -> Option<Value> {
        let Kind::Event(Event::Message { topic, data, origin }) = &entry.kind else { return None };
        (*topic == self.topic).then(|| {
            let (origin, from) = match origin {
                Origin::Plugin(name) => ("plugin", Some(name.to_string())),
                Origin::Host => ("host", None),
                Origin::Peer(peer) => ("peer", Some(peer.to_string())),
            };
            let mut message = json!({ "topic": topic, "time": entry.time, "origin": origin, "from": from });
            // Text as text; what is not UTF-8 as multibase.
            match std::str::from_utf8(data) {
                Ok(text) => message["data"] = json!(text),
                Err(_) => message["data_multibase"] = json!(multibase::encode(Base::Base64Url, data)),
            }
            message
        })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.host.interest.want_topic(&self.topic, self.party.clone(), false);
    }
}
