//! Owns the common parts of all streams of server-sent events: the ids, the continuation after a reconnect, and the
//! event `lagged`. It receives a source and returns the response.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use dim_model::entry::{Entry, Offset};
use dim_model::feed::{Feed, Missed, Reader};
use dim_server::host::Host;
use dim_store::event_log::{Followed, Follower};
use futures::Stream;
use tokio_util::sync::CancellationToken;

/// The header in which a reconnecting caller sends the last id that it received.
pub const LAST_EVENT_ID: &str = "last-event-id";

/// The number of ids after which a stream without events sends its id alone.
const SILENT: u64 = 128;

/// The start of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// From now on.
    Now,
    /// After the event with this id.
    After(u64),
    /// From the entry at this offset on.
    At(Offset),
    /// After an event with an id that is not of this host.
    Elsewhere,
}

impl<S: Send + Sync> FromRequestParts<S> for Start {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        // A browser sends an empty header if it had no id.
        let header = parts.headers.get(LAST_EVENT_ID).filter(|id| !id.is_empty());
        let id = header.map(|id| id.to_str().ok().and_then(|id| id.parse().ok()));
        Ok(id.map_or(Self::Now, |id| id.map_or(Self::Elsewhere, Self::After)))
    }
}

/// The source of a stream.
pub trait Source: Send + 'static {
    /// Returns the id that a caller gets before the first event. Returns `None` if the caller must first get an event
    /// `lagged`, because it could lose the connection in between.
    fn opening(&self) -> Option<u64>;

    /// Waits for the next events; `None` ends the stream. It is called repeatedly, and a waiting call is dropped only
    /// together with the source.
    fn read(&mut self) -> impl Future<Output = Option<Delivery>> + Send;
}

/// The events that are sent together.
#[derive(Debug, Default)]
pub struct Delivery {
    /// The events that were missed before.
    pub missed: Missed,
    /// The events: each with its kind and its data, and with an id if a caller can continue after it.
    pub events: Vec<(Option<u64>, &'static str, String)>,
    /// The id after all of them.
    pub upto: u64,
}

impl Delivery {
    /// Returns the events to send. The last one gets an id; after many ids without an event, an id alone is sent.
    fn sent(self, last: &mut u64) -> VecDeque<Event> {
        let Self { missed, mut events, upto } = self;
        let lagged = match missed {
            Missed::Nothing => None,
            Missed::Count(count) => Some(count.to_string()),
            Missed::Unknown => Some("null".to_owned()),
        };
        if let Some(count) = lagged {
            events.insert(0, (None, "lagged", count));
        }
        if let Some((id, ..)) = events.last_mut() {
            *last = *id.get_or_insert(upto);
        } else if upto >= last.saturating_add(SILENT) {
            *last = upto;
            return VecDeque::from([id_alone(upto)]);
        }
        events.into_iter().map(|(id, kind, data)| event(id, kind, &data)).collect()
    }
}

fn event(id: Option<u64>, kind: &str, data: &str) -> Event {
    let event = Event::default().event(kind).data(data);
    match id {
        Some(id) => event.id(id.to_string()),
        None => event,
    }
}

/// Makes an event without data: the caller only stores the id.
fn id_alone(id: u64) -> Event {
    Event::default().id(id.to_string())
}

/// Answers with the events of a source until it ends, or until `ended` is cancelled.
pub fn answer(source: impl Source, ended: CancellationToken) -> Response {
    let (ready, last) = source.opening().map_or((VecDeque::new(), 0), |id| ([id_alone(id)].into(), id));
    let events = events(Telling { source, ready, last, ended });
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

struct Telling<S> {
    source: S,
    ready: VecDeque<Event>,
    /// The last id that was sent.
    last: u64,
    ended: CancellationToken,
}

fn events<S: Source>(telling: Telling<S>) -> impl Stream<Item = Result<Event, Infallible>> {
    futures::stream::unfold(telling, |mut telling| async {
        loop {
            if let Some(event) = telling.ready.pop_front() {
                return Some((Ok(event), telling));
            }
            let told = telling.ended.run_until_cancelled(telling.source.read()).await??;
            telling.ready = told.sent(&mut telling.last);
        }
    })
}

/// The entries of the log. Their ids are their offsets.
#[derive(Debug)]
pub struct Entries {
    follower: Follower,
    /// The entries that were missed before the first read.
    missed: Missed,
}

impl Entries {
    /// Returns the entries from `start` on.
    pub fn from(host: &Host, start: Start) -> Self {
        let (from, missed) = match start {
            Start::Now => (None, Missed::Nothing),
            Start::At(offset) => (Some(offset), Missed::Nothing),
            Start::After(id) if id < host.storage.log.head().0 => (Some(Offset(id + 1)), Missed::Nothing),
            Start::After(_) | Start::Elsewhere => (None, Missed::Unknown),
        };
        Self { follower: host.storage.log.follow(from), missed }
    }

    /// Makes the stream begin with an event `lagged`.
    pub fn doubt(&mut self) {
        self.missed = Missed::Unknown;
    }

    /// Returns the id before the first entry.
    pub fn opening(&self) -> Option<u64> {
        self.last().filter(|_| self.missed == Missed::Nothing)
    }

    /// Returns the id of the last entry that was read.
    fn last(&self) -> Option<u64> {
        self.follower.next_offset().0.checked_sub(1)
    }

    /// Waits for entries. Returns them with a delivery that contains what was missed; `None` if the store fails.
    pub async fn read(&mut self) -> Option<(Delivery, VecDeque<Arc<Entry>>)> {
        let missed = std::mem::take(&mut self.missed);
        if missed != Missed::Nothing {
            let upto = self.last().unwrap_or_default();
            return Some((Delivery { missed, events: Vec::new(), upto }, VecDeque::new()));
        }
        let Followed { missed, entries } = match self.follower.read().await {
            Ok(followed) => followed,
            Err(error) => {
                tracing::warn!("a stream of events ends because the log cannot be read: {error}");
                return None;
            }
        };
        let missed = if missed == 0 { Missed::Nothing } else { Missed::Count(missed) };
        let upto = self.last().unwrap_or_default();
        Some((Delivery { missed, events: Vec::new(), upto }, entries))
    }
}

/// A feed as a source of events of one kind, with JSON data.
pub struct OfFeed<T, W> {
    reader: Reader<T>,
    kind: &'static str,
    wanted: W,
}

impl<T: Clone, W: Fn(&T) -> bool> OfFeed<T, W> {
    /// Returns the items of `feed` from `start` on that match `wanted`.
    pub fn from(feed: &Arc<Feed<T>>, start: Start, kind: &'static str, wanted: W) -> Self {
        let after = match start {
            Start::Now | Start::At(_) => None,
            Start::After(id) => Some(id),
            Start::Elsewhere => Some(u64::MAX),
        };
        Self { reader: feed.follow(after), kind, wanted }
    }
}

impl<T, W> Source for OfFeed<T, W>
where
    T: Clone + serde::Serialize + Send + 'static,
    W: Fn(&T) -> bool + Send + 'static,
{
    fn opening(&self) -> Option<u64> {
        (!self.reader.has_missed()).then(|| self.reader.next_number() - 1)
    }

    async fn read(&mut self) -> Option<Delivery> {
        let dim_model::feed::Read { missed, items } = self.reader.read().await;
        let wanted = items.iter().filter(|(_, item)| (self.wanted)(item));
        let json = |item: &T| serde_json::to_string(item).expect("it is plain data");
        let events = wanted.map(|(id, item)| (Some(*id), self.kind, json(item))).collect();
        Some(Delivery { missed, events, upto: self.reader.next_number() - 1 })
    }
}
