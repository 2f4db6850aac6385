//! Owns what all streams of server-sent events have in common: the id of each event, where a caller goes on that was cut
//! off, and how a caller is told that it has missed something.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use futures::Stream;
use tokio_util::sync::CancellationToken;

use crate::entry::{Entry, Offset};
use crate::feed::{Feed, Missed, Reader};
use crate::host::Host;
use crate::log::{Followed, Follower};

/// The header in which a caller that was cut off sends the id that it had last.
pub const LAST_EVENT_ID: &str = "last-event-id";

/// How far a stream may be beyond the last id that it has sent.
const SILENT: u64 = 128;

/// Where a stream begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// With what comes from now on.
    Now,
    /// After the event with this id.
    After(u64),
    /// After an event that is none of this host.
    Elsewhere,
}

impl<S: Send + Sync> FromRequestParts<S> for Start {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        // A browser sends an empty one where it had none.
        let header = parts.headers.get(LAST_EVENT_ID).filter(|id| !id.is_empty());
        let id = header.map(|id| id.to_str().ok().and_then(|id| id.parse().ok()));
        Ok(id.map_or(Self::Now, |id| id.map_or(Self::Elsewhere, Self::After)))
    }
}

/// What a stream tells of.
pub trait Source: Send + 'static {
    /// The id that a caller has before the first event; none if it is to be told first that it has missed something, for
    /// it could be cut off in between.
    fn opening(&self) -> Option<u64>;

    /// Waits until there is something to tell; none at the end. It is called again and again, and dropped while it waits
    /// only with the whole source.
    fn read(&mut self) -> impl Future<Output = Option<Told>> + Send;
}

/// What is told at a time.
#[derive(Debug, Default)]
pub struct Told {
    /// What was missed before.
    pub missed: Missed,
    /// The events: each with its kind and its data, and with its id if a caller can go on after it.
    pub events: Vec<(Option<u64>, &'static str, String)>,
    /// The id after all of them.
    pub upto: u64,
}

impl Told {
    /// The events as they are sent. The last one that is sent has an id; where none is for long, an id alone is.
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

/// What has no data is no event: the caller notes the id.
fn id_alone(id: u64) -> Event {
    Event::default().id(id.to_string())
}

/// Tells of a source until it ends, or `ended` is cancelled.
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

/// The entries of the log, as a source reads them. The ids are their offsets.
#[derive(Debug)]
pub struct Entries {
    follower: Follower,
    /// What was missed already.
    missed: Missed,
}

impl Entries {
    /// The entries from `start` on.
    pub fn from(host: &Host, start: Start) -> Self {
        let (from, missed) = match start {
            Start::Now => (None, Missed::Nothing),
            Start::After(id) if id < host.log.head().0 => (Some(Offset(id + 1)), Missed::Nothing),
            Start::After(_) | Start::Elsewhere => (None, Missed::Unknown),
        };
        Self { follower: host.log.follow(from), missed }
    }

    /// Has the caller told that it may have missed something.
    pub fn doubt(&mut self) {
        self.missed = Missed::Unknown;
    }

    /// The id that a caller has before the first of them.
    pub fn opening(&self) -> Option<u64> {
        self.last().filter(|_| self.missed == Missed::Nothing)
    }

    /// The id of what was read last.
    fn last(&self) -> Option<u64> {
        self.follower.next_offset().0.checked_sub(1)
    }

    /// Waits for entries; what is to be told of them has what was missed before. None if the store fails.
    pub async fn read(&mut self) -> Option<(Told, VecDeque<Arc<Entry>>)> {
        let missed = std::mem::take(&mut self.missed);
        if missed != Missed::Nothing {
            let upto = self.last().unwrap_or_default();
            return Some((Told { missed, events: Vec::new(), upto }, VecDeque::new()));
        }
        let Followed { missed, entries } = match self.follower.read().await {
            Ok(followed) => followed,
            Err(error) => {
                tracing::warn!("a stream of events ends, for the log cannot be read: {error}");
                return None;
            }
        };
        let missed = if missed == 0 { Missed::Nothing } else { Missed::Count(missed) };
        let upto = self.last().unwrap_or_default();
        Some((Told { missed, events: Vec::new(), upto }, entries))
    }
}

/// A feed as a source: what it tells, by a kind and as JSON.
pub struct OfFeed<T, W> {
    reader: Reader<T>,
    kind: &'static str,
    wanted: W,
}

impl<T: Clone, W: Fn(&T) -> bool> OfFeed<T, W> {
    /// What `feed` tells from `start` on and `wanted` holds for, as events of a kind.
    pub fn from(feed: &Arc<Feed<T>>, start: Start, kind: &'static str, wanted: W) -> Self {
        let after = match start {
            Start::Now => None,
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

    async fn read(&mut self) -> Option<Told> {
        let crate::feed::Read { missed, items } = self.reader.read().await;
        let wanted = items.iter().filter(|(_, item)| (self.wanted)(item));
        let json = |item: &T| serde_json::to_string(item).expect("it is plain data");
        let events = wanted.map(|(id, item)| (Some(*id), self.kind, json(item))).collect();
        Some(Told { missed, events, upto: self.reader.next_number() - 1 })
    }
}
