//! Owns the outbox: committed publishes that the backend has not accepted yet. It reads their rows and sends them in
//! order, one at a time and the plugins in turn, until the backend accepts them or they expire.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use dim_ipfs::Backend;
use dim_model::backoff::Backoff;
use dim_model::ident::{PluginName, Topic};
use dim_model::time::Clock;
use dim_store::commit::{Commit, CommitError};
use dim_store::outbox::{self, Backlog, Label, Row};
use dim_store::{OUTBOX, Store, StoreError};
use tokio_util::sync::CancellationToken;

use crate::own_messages::Echoes;
use crate::reliable_topics::{Input, Reliable, WaitingPublish};

/// The maximum number of waiting publishes of the API. Further publishes are refused. Plugins have their own limit.
pub const API_QUOTA: usize = 10_000;

/// The pause after each publish. A daemon loses messages that arrive faster.
const PACE: Duration = Duration::from_millis(2);

/// The number of accepted rows that are removed in one write.
const FORGET: usize = 64;

/// The counters of sent publishes.
#[derive(Debug, Default)]
pub struct Sent {
    /// Publishes that the backend accepted.
    pub accepted: AtomicUsize,
    /// Attempts that failed and are retried.
    pub retried: AtomicUsize,
    /// Publishes that expired.
    pub expired: AtomicUsize,
}

/// The task that sends publishes.
#[derive(Debug)]
pub struct Outbox {
    /// The store with the rows of the outbox.
    pub store: Arc<Store>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// The backend that receives the publishes.
    pub backend: Backend,
    /// The expected echoes.
    pub echoes: Arc<Echoes>,
    /// The number of waiting publishes.
    pub backlog: Arc<Backlog>,
    /// The counters.
    pub sent: Arc<Sent>,
    /// The reliable topics. Their publishes are passed on to the driver, and do not expire.
    pub reliable: Reliable,
    /// The duration after which a publish expires.
    pub expiry: Duration,
    /// The clock that measures pauses and the expiry.
    pub clock: Arc<dyn Clock>,
}

/// A waiting publish. Its content is read when it is sent.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    number: u64,
    /// The time at which it expires. Only the time in which this process tried counts, so a clock that is set ahead
    /// or a stopped host expires no publish that was never sent to a daemon.
    until: Instant,
}

/// The waiting publishes of one plugin, in order.
#[derive(Debug, Default)]
struct Line {
    waiting: VecDeque<Waiting>,
    backoff: Backoff,
    not_before: Option<Instant>,
}

/// The part of the outbox in memory.
#[derive(Debug, Default)]
struct Window {
    lines: BTreeMap<Option<PluginName>, Line>,
    /// The number of the last row that was loaded.
    loaded: u64,
    /// The plugin of the last publish; the inner `None` is the API.
    last: Option<Option<PluginName>>,
    accepted: Vec<u64>,
}

impl Outbox {
    /// Sends publishes until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let mut window = Window::default();
        let work = async {
            loop {
                match self.turn(&mut window).await {
                    Ok(()) => {}
                    Err(CommitError::Closed) => return,
                    Err(error) => {
                        tracing::error!("cannot read the outbox: {error}");
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                }
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
        // Accepted rows are removed, so that they are not sent again after the next start.
        let _ = self.forget(&mut window).await;
    }

    async fn turn(&self, window: &mut Window) -> Result<(), CommitError> {
        for (topic, publish) in self.load(window)? {
            self.reliable.send(Input::Waiting { topic, publish }).await;
        }
        let now = self.clock.monotonic();
        let Some(whose) = window.next(now) else {
            self.forget(window).await?;
            let pause = window.pause(now);
            tokio::select! {
                () = self.clock.sleep(pause) => {}
                () = self.commit.outbox.notified() => {}
            }
            return Ok(());
        };
        let line = window.lines.get_mut(&whose).expect("chosen from the lines");
        let first = *line.waiting.front().expect("chosen because it has one");
        let expired = now >= first.until;
        if expired || self.send(first.number, &whose).await? {
            line.waiting.pop_front();
            line.backoff.reset();
            line.not_before = None;
            window.accepted.push(first.number);
            self.count(&whose, expired);
            if self.backend.network {
                tokio::time::sleep(PACE).await;
            }
        } else {
            line.not_before = Some(now + line.backoff.next_pause());
            self.sent.retried.fetch_add(1, Ordering::Relaxed);
        }
        if window.accepted.len() >= FORGET {
            self.forget(window).await?;
        }
        Ok(())
    }

    /// Sends one publish. Returns false if it must be retried.
    async fn send(&self, number: u64, whose: &Option<PluginName>) -> Result<bool, StoreError> {
        let Some(row) = self.row(number)?.filter(|row| !row.is_void) else { return Ok(true) };
        let topic = row.topic()?;
        // The echo is expected before the send, because it may arrive before the answer.
        let expected = self.echoes.expect(&topic, &row.data);
        match self.backend.pubsub.publish(&topic, row.data.clone()).await {
            Ok(()) => Ok(true),
            Err(error) => {
                self.echoes.failed(expected, &error);
                let whose = whose.as_ref().map_or("the API", PluginName::as_str);
                tracing::debug!(%topic, whose, "not published yet: {error}");
                Ok(false)
            }
        }
    }

    fn row(&self, number: u64) -> Result<Option<Row>, StoreError> {
        let table = self.store.snapshot()?.table(OUTBOX)?;
        table.get(number)?.map(|row| Row::read(row.value())).transpose()
    }

    fn count(&self, whose: &Option<PluginName>, expired: bool) {
        self.backlog.length(whose.as_ref()).fetch_sub(1, Ordering::Relaxed);
        let counter = if expired { &self.sent.expired } else { &self.sent.accepted };
        counter.fetch_add(1, Ordering::Relaxed);
        if expired {
            tracing::warn!(after = ?self.expiry, "a publish expired before the backend accepted it");
        }
    }

    /// Loads the numbers of all rows that were committed since. It loads every row, so that the queue of one plugin
    /// does not hide another's.
    /// Returns those of reliable topics.
    fn load(&self, window: &mut Window) -> Result<Vec<(Topic, WaitingPublish)>, StoreError> {
        let table = self.store.snapshot()?.table(OUTBOX)?;
        let mut reliable = Vec::new();
        for row in table.range(window.loaded + 1..)? {
            let (number, bytes) = row?;
            let (number, label) = (number.value(), Label::read(bytes.value())?);
            let owner = label.owner()?;
            window.loaded = number;
            if self.reliable.is_used()
                && let topic = label.topic()?
                && self.reliable.is_reliable(&topic)
            {
                reliable.push((topic, WaitingPublish { number, owner }));
                continue;
            }
            let waiting = Waiting { number, until: self.clock.monotonic() + self.expiry };
            window.lines.entry(owner).or_default().waiting.push_back(waiting);
        }
        Ok(reliable)
    }

    /// Removes accepted rows. After a crash before this write they are sent again: delivery is at least once.
    async fn forget(&self, window: &mut Window) -> Result<(), CommitError> {
        let accepted = std::mem::take(&mut window.accepted);
        window.lines.retain(|_, line| !line.waiting.is_empty());
        if accepted.is_empty() {
            return Ok(());
        }
        self.commit.write_later(move |write| outbox::forget(write, &accepted)).await
    }
}

impl Window {
    /// Returns the next plugin, in turn, whose first publish can be sent now.
    fn next(&mut self, now: Instant) -> Option<Option<PluginName>> {
        let ready = |line: &Line| !line.waiting.is_empty() && line.not_before.is_none_or(|at| at <= now);
        let after = self.last.as_ref().and_then(|last| {
            let bounds = (std::ops::Bound::Excluded(last), std::ops::Bound::Unbounded);
            self.lines.range(bounds).find(|(_, line)| ready(line))
        });
        let (whose, _) = after.or_else(|| self.lines.iter().find(|(_, line)| ready(line)))?;
        self.last = Some(whose.clone());
        self.last.clone()
    }

    fn pause(&self, now: Instant) -> Duration {
        let soonest = self.lines.values().filter_map(|line| line.not_before).min();
        soonest
            .map_or(Duration::from_secs(60), |at| at.saturating_duration_since(now))
            .max(Duration::from_millis(1))
    }
}
