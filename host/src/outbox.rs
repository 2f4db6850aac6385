//! Owns the publishes that were committed and not yet accepted by the backend: sent in order, one
//! at a time, plugins in turn, until the backend accepts them or they expire.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backend::Backend;
use crate::backoff::Backoff;
use crate::commit::{Commit, CommitError};
use crate::echo::Echoes;
use crate::ident::PluginName;
use crate::store::outbox::{self, Backlog, Label, Row};
use crate::store::{OUTBOX, Store, StoreError};

/// Publishes of the API that may wait; one more is refused. Plugins have a limit of their own.
pub const API_QUOTA: usize = 10_000;

/// Time between two publishes: what a daemon is given faster it loses on the way.
const PACE: Duration = Duration::from_millis(2);

/// Accepted publishes that are forgotten together.
const FORGET: usize = 64;

/// Counts of what went out.
#[derive(Debug, Default)]
pub struct Sent {
    /// Publishes that the backend accepted.
    pub accepted: AtomicUsize,
    /// Publishes that were refused and tried again.
    pub retried: AtomicUsize,
    /// Publishes that were given up after their time.
    pub expired: AtomicUsize,
}

/// The task that sends.
#[derive(Debug)]
pub struct Outbox {
    /// Where publishes wait.
    pub store: Arc<Store>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// Where they go.
    pub backend: Backend,
    /// Which echoes to expect.
    pub echoes: Arc<Echoes>,
    /// How many wait.
    pub backlog: Arc<Backlog>,
    /// The counts.
    pub sent: Arc<Sent>,
    /// How long a publish is tried.
    pub expiry: Duration,
}

/// One publish that waits; what it says is read when it is its turn.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    number: u64,
    /// When it is given up. By the time for which this host has tried: neither a clock that is set ahead
    /// nor a host that was down gives up what no daemon was ever asked to take.
    until: Instant,
}

/// The publishes of one plugin, in order.
#[derive(Debug, Default)]
struct Line {
    waiting: VecDeque<Waiting>,
    backoff: Backoff,
    not_before: Option<Instant>,
}

/// What is held in memory.
#[derive(Debug, Default)]
struct Window {
    lines: BTreeMap<Option<PluginName>, Line>,
    /// The number of the last row that was loaded.
    loaded: u64,
    /// Whose turn came last.
    last: Option<Option<PluginName>>,
    accepted: Vec<u64>,
}

impl Outbox {
    /// Sends until `stop` is cancelled.
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
        // What was accepted need not be sent again after the next start.
        let _ = self.forget(&mut window).await;
    }

    async fn turn(&self, window: &mut Window) -> Result<(), CommitError> {
        self.load(window)?;
        let now = Instant::now();
        let Some(whose) = window.next(now) else {
            self.forget(window).await?;
            let pause = window.pause(now);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
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
            line.not_before = Some(now + line.backoff.next());
            self.sent.retried.fetch_add(1, Ordering::Relaxed);
        }
        if window.accepted.len() >= FORGET {
            self.forget(window).await?;
        }
        Ok(())
    }

    /// Sends one publish; false if it has to be tried again.
    async fn send(&self, number: u64, whose: &Option<PluginName>) -> Result<bool, StoreError> {
        let Some(row) = self.row(number)?.filter(|row| !row.is_void) else { return Ok(true) };
        let topic = row.topic()?;
        // Expected before it is sent: the echo may be faster than the answer.
        let expected = self.echoes.expect(&topic, &row.data);
        match self.backend.pubsub.publish(&topic, row.data.clone()).await {
            Ok(()) => Ok(true),
            Err(error) => {
                if error.certainly_not_sent() {
                    self.echoes.forget(expected);
                } else {
                    self.echoes.doubt(expected);
                }
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

    /// Takes in what was committed since: the numbers of all that waits, so that no plugin's queue
    /// hides another's.
    fn load(&self, window: &mut Window) -> Result<(), StoreError> {
        let table = self.store.snapshot()?.table(OUTBOX)?;
        for row in table.range(window.loaded + 1..)? {
            let (number, bytes) = row?;
            let owner = Label::read(bytes.value())?.owner()?;
            let waiting = Waiting { number: number.value(), until: Instant::now() + self.expiry };
            window.loaded = waiting.number;
            window.lines.entry(owner).or_default().waiting.push_back(waiting);
        }
        Ok(())
    }

    /// Removes accepted rows. Lost on a crash, they are sent again: at least once.
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
    /// The next plugin in turn whose first publish may be sent now.
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
