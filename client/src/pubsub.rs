//! Topics: publishing, listening, and who else is there.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use reqwest::Method;
use serde::Deserialize;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::ClientError;
use crate::http::{Http, ServerEvent};

/// The topics of a host.
#[derive(Clone, Debug)]
pub struct Pubsub {
    http: Http,
    stop: CancellationToken,
}

/// A topic that the host listens to.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Topic {
    /// Its name.
    pub topic: String,
    /// Since when the host's stream is open.
    pub connected_since: Option<jiff::Timestamp>,
    /// Until when it is proven that the host could hear.
    pub listening_proven_until: Option<jiff::Timestamp>,
    /// How many peers are known on it.
    pub peers: u64,
}

/// A message on a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The topic.
    pub topic: String,
    /// The sender's bytes.
    pub data: Bytes,
    /// When it came into the host's log.
    pub time: jiff::Timestamp,
    /// Who published it.
    pub origin: Origin,
}

/// Who published a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A plugin of the host.
    Plugin(String),
    /// The operator or a program, through the host's API.
    Host,
    /// A peer of the network, by its base58 peer id.
    Peer(String),
}

impl Pubsub {
    pub(crate) fn new(http: Http, stop: CancellationToken) -> Self {
        Self { http, stop }
    }

    /// Publishes `data`, at most 60 KiB, on `topic`: to the host's plugins at once, to the network
    /// through the host's outbox. Returns once it is durable.
    pub async fn publish(&self, topic: &str, data: impl Into<Bytes>) -> Result<(), ClientError> {
        self.http.send_bytes::<Value>(Method::POST, &["topics", topic, "messages"], &[], data).await.map(drop)
    }

    /// Subscribes to `topic`; returns once the host has taken note. Messages from before are not told.
    pub async fn subscribe(&self, topic: &str) -> Result<Subscription<Message>, ClientError> {
        let events = self.http.events(&["topics", topic, "messages"]).await?;
        let http = self.http.clone();
        Ok(Subscription::new(events, self.stop.clone(), move |event| message_of(&http, &event)))
    }

    /// The peers of a topic, as the host's backend knows them now: base58 peer ids.
    pub async fn list_peers(&self, topic: &str) -> Result<Vec<String>, ClientError> {
        self.http.get(&["topics", topic, "peers"], &[]).await
    }

    /// The topics that anyone at the host listens to.
    pub async fn list_topics(&self) -> Result<Vec<Topic>, ClientError> {
        self.http.get(&["topics"], &[]).await
    }
}

/// What a host tells, as it happens. It ends with [`Subscription::unsubscribe`] or when it is dropped,
/// when the client is stopped, and with the host.
pub struct Subscription<T> {
    items: BoxStream<'static, Result<T, ClientError>>,
}

impl<T> std::fmt::Debug for Subscription<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subscription").finish_non_exhaustive()
    }
}

impl<T: Send + 'static> Subscription<T> {
    pub(crate) fn new(
        events: impl Stream<Item = Result<ServerEvent, ClientError>> + Send + 'static,
        stop: CancellationToken,
        read: impl Fn(ServerEvent) -> Result<T, ClientError> + Send + 'static,
    ) -> Self {
        let items = events.map(move |event| read(event?));
        Self { items: items.take_until(stop.cancelled_owned()).boxed() }
    }

    /// The next item; none at the end. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<T, ClientError>> {
        StreamExt::next(self).await
    }

    /// Ends it.
    pub fn unsubscribe(self) {}
}

impl<T: Send + 'static> Stream for Subscription<T> {
    type Item = Result<T, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = self.items.poll_next_unpin(context);
        if let Poll::Ready(None) = next {
            // What was stopped lets go of its connection, by which the host sees that no one listens.
            self.items = stream::empty().boxed();
        }
        next
    }
}

fn message_of(http: &Http, event: &ServerEvent) -> Result<Message, ClientError> {
    #[derive(Deserialize)]
    struct Told {
        topic: String,
        time: jiff::Timestamp,
        origin: String,
        from: Option<String>,
        data: Option<String>,
        data_multibase: Option<String>,
    }
    event.check_lagged()?;
    let told: Told = serde_json::from_str(&event.data).map_err(|error| http.strange(error.to_string()))?;
    let data = match (told.data, told.data_multibase) {
        (Some(text), _) => Bytes::from(text),
        (None, Some(text)) => {
            Bytes::from(multibase::decode(text).map_err(|error| http.strange(error.to_string()))?.1)
        }
        (None, None) => return Err(http.strange("a message without data".to_owned())),
    };
    let origin = match (told.origin.as_str(), told.from) {
        ("host", _) => Origin::Host,
        ("plugin", Some(plugin)) => Origin::Plugin(plugin),
        ("peer", Some(peer)) => Origin::Peer(peer),
        (other, _) => return Err(http.strange(format!("a message from {other:?}"))),
    };
    Ok(Message { topic: told.topic, data, time: told.time, origin })
}
