//! Pubsub topics: publishes, subscribes, and lists topics and peers.

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

/// Access to topics through a host.
#[derive(Clone, Debug)]
pub struct Pubsub {
    http: Http,
    stop: CancellationToken,
}

/// A topic that the host is subscribed to.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Topic {
    /// The name of the topic.
    pub topic: String,
    /// The time at which the host opened its current stream of the topic.
    pub connected_since: Option<jiff::Timestamp>,
    /// The time until which the host proved that it could receive messages.
    pub listening_proven_until: Option<jiff::Timestamp>,
    /// The number of known peers.
    pub peers: u64,
}

/// A message on a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The topic.
    pub topic: String,
    /// The sender's bytes.
    pub data: Bytes,
    /// The log time at which the host received it.
    pub time: jiff::Timestamp,
    /// The publisher.
    pub origin: Origin,
    /// The identity of the event, on a reliable topic.
    pub event: Option<EventIdentity>,
    /// The id after which a later subscription resumes ([`Beginning::After`]).
    pub id: String,
}

/// The identity of an event of a member on a reliable topic. The events of a member come in the order of its sequences.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct EventIdentity {
    /// The process start of the member, in hex.
    pub incarnation: String,
    /// The number of the event in the incarnation, from 0.
    pub sequence: u64,
    /// The hybrid logical time of the event.
    pub time: jiff::Timestamp,
}

/// The message with which a subscription begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Beginning {
    /// The next one.
    Head,
    /// The first one that the host's log has. If nobody listens to the topic yet and it is reliable, the host reads what
    /// its writers keep.
    Earliest,
    /// The first one that the host received at this time or later.
    Time(jiff::Timestamp),
    /// The one after the message with this id. What the host does not have any more is [`ClientError::Lagged`].
    After(String),
}

/// The publisher of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A plugin of the host, by its name.
    Plugin(String),
    /// The operator or a program that uses the host's API.
    Host,
    /// A peer of the network, by its base58 peer id.
    Peer(String),
    /// A member of the fleet, on a reliable topic, by the IPNS name of its key.
    Member(String),
}

impl Pubsub {
    pub(crate) fn new(http: Http, stop: CancellationToken) -> Self {
        Self { http, stop }
    }

    /// Publishes `data`, at most 60 KiB, on `topic`. Returns when the publish is durable.
    ///
    /// The host's plugins receive the message immediately. The host's outbox sends it to the network.
    pub async fn publish(&self, topic: &str, data: impl Into<Bytes>) -> Result<(), ClientError> {
        self.http.send_bytes::<Value>(Method::POST, &["topics", topic, "messages"], &[], data).await.map(drop)
    }

    /// Subscribes to `topic`. Returns when the subscription is active; earlier messages are not delivered.
    pub async fn subscribe(&self, topic: &str) -> Result<Subscription<Message>, ClientError> {
        self.subscribe_from(topic, Beginning::Head).await
    }

    /// Subscribes to `topic`, from `beginning` on. Returns when the subscription is active.
    pub async fn subscribe_from(
        &self,
        topic: &str,
        beginning: Beginning,
    ) -> Result<Subscription<Message>, ClientError> {
        let request = self.http.request(Method::GET, &["topics", topic, "messages"])?;
        let request = match beginning {
            Beginning::Head => request,
            Beginning::Earliest => request.query(&[("from", "earliest")]),
            Beginning::Time(time) => request.query(&[("from", time.to_string())]),
            Beginning::After(id) => request.header("Last-Event-ID", id),
        };
        let events = self.http.events_of(request).await?;
        let http = self.http.clone();
        Ok(Subscription::new(events, self.stop.clone(), move |event| message_of(&http, &event)))
    }

    /// Returns the peers that the host's backend knows on a topic now, as base58 peer ids.
    pub async fn list_peers(&self, topic: &str) -> Result<Vec<String>, ClientError> {
        self.http.get(&["topics", topic, "peers"], &[]).await
    }

    /// Returns the topics that the host is subscribed to, for plugins or clients.
    pub async fn list_topics(&self) -> Result<Vec<Topic>, ClientError> {
        self.http.get(&["topics"], &[]).await
    }
}

/// A stream of items from a host. It ends with [`Subscription::unsubscribe`] or when it is dropped, with
/// [`Client::stop`](crate::Client::stop), and when the host ends.
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

    /// Returns the next item, or none at the end. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<T, ClientError>> {
        StreamExt::next(self).await
    }

    /// Ends the subscription.
    pub fn unsubscribe(self) {}
}

impl<T: Send + 'static> Stream for Subscription<T> {
    type Item = Result<T, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = self.items.poll_next_unpin(context);
        if let Poll::Ready(None) = next {
            // Close the connection, so that the host sees the end of the subscription.
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
        event: Option<EventIdentity>,
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
        ("member", Some(member)) => Origin::Member(member),
        (other, _) => return Err(http.strange(format!("a message from {other:?}"))),
    };
    let id = event.id.clone().unwrap_or_default();
    Ok(Message { topic: told.topic, data, time: told.time, origin, event: told.event, id })
}
