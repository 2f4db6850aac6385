//! Owns the publishes that were committed and not yet accepted by the backend: sent in order, one
//! at a time, plugins in turn, until the backend accepts them or they expire.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use redb::{ReadableTable, ReadableTableMetadata as _, WriteTransaction};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backend::Backend;
use crate::backoff::Backoff;
use crate::commit::{Commit, CommitError};
use crate::echo::Echoes;
use crate::ident::{PluginName, Topic};
use crate::plugin::Publish;
use crate::store::{self, OUTBOX, Store, StoreError};
use crate::time::Timestamp;

/// Publishes of the API that may wait; one more is refused. Plugins have a limit of their own.
pub const API_QUOTA: u64 = 10_000;

/// Accepted publishes that are forgotten together.
const FORGET: usize = 64;

/// Puts publishes into the outbox, in the transaction of the commit.
pub fn enqueue(
    write: &WriteTransaction,
    plugin: Option<&PluginName>,
    publishes: &[Publish],
    now: Timestamp,
) -> Result<(), StoreError> {
    let first = store::next_numbers(write, "outbox", publishes.len() as u64)?;
    let mut table = write.open_table(OUTBOX)?;
    for (number, publish) in (first..).zip(publishes) {
        let row = Row {
            plugin: plugin.map(PluginName::to_string),
            topic: publish.topic.to_string(),
            data: publish.data.clone(),
            time: now.0,
        };
        table.insert(number, row.encode_to_vec().as_slice())?;
    }
    Ok(())
}

/// How many publishes wait, and since when the oldest does.
pub fn waiting(store: &Store) -> Result<(u64, Option<Timestamp>), StoreError> {
    let table = store.snapshot()?.table(OUTBOX)?;
    let oldest = match table.first()? {
        Some((_, row)) => Some(Timestamp(Row::read(row.value())?.time)),
        None => None,
    };
    Ok((table.len()?, oldest))
}

#[derive(Clone, PartialEq, prost::Message)]
struct Row {
    #[prost(string, optional, tag = "1")]
    plugin: Option<String>,
    #[prost(string, tag = "2")]
    topic: String,
    #[prost(bytes = "bytes", tag = "3")]
    data: Bytes,
    #[prost(fixed64, tag = "4")]
    time: u64,
}

impl Row {
    fn read(bytes: &[u8]) -> Result<Self, StoreError> {
        Row::decode(bytes).map_err(|error| StoreError::corrupt("outbox", error))
    }
}

/// Counts of the outbox, for the operator and for the quota of each plugin.
#[derive(Debug, Default)]
pub struct Tally {
    lengths: Mutex<BTreeMap<PluginName, Arc<AtomicUsize>>>,
    /// Publishes that the backend accepted.
    pub sent: AtomicUsize,
    /// Publishes that were refused and tried again.
    pub retried: AtomicUsize,
    /// Publishes that were given up after their time.
    pub expired: AtomicUsize,
}

impl Tally {
    /// How many publishes of a plugin wait.
    pub fn length(&self, plugin: &PluginName) -> Arc<AtomicUsize> {
        let mut lengths = self.lengths.lock().expect("no one panics while holding the lengths");
        lengths.entry(plugin.clone()).or_default().clone()
    }

    /// Counts what the store holds; called once before anything is added.
    pub fn restore(&self, store: &Store) -> Result<(), StoreError> {
        for row in store.snapshot()?.table(OUTBOX)?.iter()? {
            if let Some(plugin) = owner(&Row::read(row?.1.value())?)? {
                self.length(&plugin).fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Adds what a batch has put in.
    pub fn added(&self, plugin: &PluginName, count: usize) {
        self.length(plugin).fetch_add(count, Ordering::Relaxed);
    }
}

fn owner(row: &Row) -> Result<Option<PluginName>, StoreError> {
    row.plugin.as_deref().map(str::parse).transpose().map_err(|error| StoreError::corrupt("outbox", error))
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
    /// The counts.
    pub tally: Arc<Tally>,
    /// How long a publish is tried.
    pub expiry: Duration,
}

/// One publish that waits; what it says is read when it is its turn.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    number: u64,
    time: Timestamp,
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
        let expired = Timestamp::wall().since(first.time) > self.expiry;
        if expired || self.send(first.number, &whose).await? {
            line.waiting.pop_front();
            line.backoff.reset();
            line.not_before = None;
            window.accepted.push(first.number);
            self.count(&whose, expired);
        } else {
            line.not_before = Some(now + line.backoff.next());
            self.tally.retried.fetch_add(1, Ordering::Relaxed);
        }
        if window.accepted.len() >= FORGET {
            self.forget(window).await?;
        }
        Ok(())
    }

    /// Sends one publish; false if it has to be tried again.
    async fn send(&self, number: u64, whose: &Option<PluginName>) -> Result<bool, StoreError> {
        let Some(row) = self.row(number)? else { return Ok(true) };
        let topic: Topic = row.topic.parse().map_err(|error| StoreError::corrupt("outbox", error))?;
        // Expected before it is sent: the echo may be faster than the answer.
        let expected = self.echoes.expect(&topic, &row.data);
        match self.backend.pubsub.publish(&topic, row.data.clone()).await {
            Ok(()) => Ok(true),
            Err(error) => {
                if error.certainly_not_sent() {
                    self.echoes.forget(expected);
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
        if let Some(plugin) = whose {
            self.tally.length(plugin).fetch_sub(1, Ordering::Relaxed);
        }
        let counter = if expired { &self.tally.expired } else { &self.tally.sent };
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
            let row = Row::read(bytes.value())?;
            let waiting = Waiting { number: number.value(), time: Timestamp(row.time) };
            window.loaded = waiting.number;
            window.lines.entry(owner(&row)?).or_default().waiting.push_back(waiting);
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
        self.commit
            .write_later(move |write| {
                let mut table = write.open_table(OUTBOX)?;
                for number in accepted {
                    table.remove(number)?;
                }
                Ok(())
            })
            .await
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
