//! Owns the writer's thread: it commits the waiting work in one transaction after the other.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dim_model::entry::{Entry, Event, Kind, Offset, Origin};
use redb::WriteTransaction;
use tokio_util::sync::CancellationToken;

use super::apply::{NameChanges, Wakes, apply, entries_of};
use super::code_change::{self, Announcements};
use super::durability::Disk;
use super::queue::{ApiPublish, Queue, Submitted, Work};
use super::{Commit, Durability};
use crate::effect::Publish;
use crate::event_log::EventLog;
use crate::{Store, StoreError, Sync, catch_ups, outbox};

/// How long log entries wait for a batch that shares their transaction.
const LINGER: Duration = Duration::from_millis(20);

impl Commit {
    /// Runs the writer's thread: commits until `stop` is cancelled and no work waits. All commits are on the
    /// disk when it returns.
    pub fn run(&self, store: &Store, log: &EventLog, stop: &CancellationToken) -> Result<(), StoreError> {
        let outcome = self.run_until(store, log, stop);
        // After an error nothing is acknowledged any more. Dropping the queue reports the failure to all
        // waiting callers.
        let mut queue = self.queue.lock().expect("no one panics while holding the queue");
        *queue = Queue { closed: true, ..Queue::default() };
        outcome
    }

    /// Commits the waiting work once, on this thread. For callers that step a plugin by hand.
    pub fn run_once(&self, store: &Store, log: &EventLog) -> Result<(), StoreError> {
        let Some(work) = self.take(false) else { return Ok(()) };
        if work.is_empty() && !log.has_pending() {
            return Ok(());
        }
        let mut disk = Disk { synced_at: Instant::now(), behind: false };
        self.commit(store, log, work, &mut disk, false)
    }

    fn run_until(&self, store: &Store, log: &EventLog, stop: &CancellationToken) -> Result<(), StoreError> {
        let mut since: Option<Instant> = None;
        let mut disk = Disk { synced_at: Instant::now(), behind: false };
        loop {
            let stopping = stop.is_cancelled();
            let Some(work) = self.take(stopping && !log.has_pending() && !disk.behind) else { return Ok(()) };
            if work.is_empty() && !stopping {
                let pause = if log.has_pending() {
                    LINGER.saturating_sub(since.get_or_insert_with(Instant::now).elapsed())
                } else {
                    since = None;
                    disk.pause(self.durability.most_behind())
                };
                if !pause.is_zero() {
                    std::thread::park_timeout(pause);
                    continue;
                }
            }
            since = None;
            self.commit(store, log, work, &mut disk, stopping)?;
        }
    }

    /// Takes the waiting work; `None` once the queue is empty and closed for good.
    fn take(&self, last: bool) -> Option<Work> {
        let mut queue = self.queue.lock().expect("no one panics while holding the queue");
        let work = queue.take();
        if last && work.is_empty() {
            queue.closed = true;
            return None;
        }
        Some(work)
    }

    fn commit(
        &self,
        store: &Store,
        log: &EventLog,
        mut work: Work,
        disk: &mut Disk,
        stopping: bool,
    ) -> Result<(), StoreError> {
        let begun = Instant::now();
        let mut write = store.begin()?;
        // Small writes run before the pending entries are collected, so that their entries share the transaction.
        let (mut wakes, mut names) = (Wakes::default(), NameChanges::new(log.now()));
        let mut after = Vec::new();
        let mut worth = Sync::Later;
        let mut told = Announcements::default();
        for small in std::mem::take(&mut work.writes) {
            if small.sync == Sync::Now {
                worth = Sync::Now;
            }
            wakes.add(small.wakes);
            let (entries, done) = (small.run)(&write, &mut names, &mut told)?;
            log.append_now(entries);
            after.push(done);
        }
        if !work.publishes.is_empty() {
            worth = Sync::Now;
            wakes.outbox = true;
            log.append_now(publish_all(&write, &work.publishes)?);
        }
        for Submitted { batch, progress, undo, context } in &mut work.batches {
            progress.taken.store(batch.number, Ordering::Release);
            progress.mailbox.ring();
            *undo = code_change::begin(&write, batch, log.now(), &mut told)?;
            log.append_now(entries_of(batch));
            for (key, update) in &batch.requested.names {
                log.append_now(code_change::set_name(&write, *undo, key, update, &mut names)?);
            }
            if let Some(order) = &batch.code.take_back {
                let at = (log.now(), &mut names);
                *context = code_change::take_back(&write, batch, order, log.head(), at, &mut told)?;
                wakes.names = true;
            }
            log.append_now(std::mem::take(&mut told.entries));
        }
        wakes.outbox |= !told.changes.is_empty();
        let entries = log.pending();
        let sync = self.sync(worth, &work, &entries, disk, stopping);
        store.set_sync(&mut write, sync)?;
        crate::event_log_rows::append(&write, entries.iter().map(AsRef::as_ref))?;
        let are_catch_ups_changed = catch_ups::observe(&write, entries.iter().map(AsRef::as_ref))?;
        if let Some(last) = entries.last() {
            names.settle(&write, last.offset)?;
        }
        let now = log.now();
        for Submitted { batch, undo, .. } in
            work.batches.iter().filter(|it| it.batch.code.take_back.is_none())
        {
            apply(&write, batch, now, &self.dead_letters, *undo, &mut wakes)?;
        }
        // Before the commit: afterwards the outbox sees the rows and counts them down.
        for submitted in &work.batches {
            self.backlog.added(Some(&submitted.batch.plugin), submitted.batch.requested.publishes.len());
        }
        self.backlog.added(None, told.changes.len());
        let syncing = Instant::now();
        write.commit()?;
        if sync == Sync::Now {
            self.counters.syncs.observe(syncing.elapsed().as_secs_f64());
        }
        disk.committed(sync);
        if let Some(last) = entries.last() {
            log.committed(Offset(last.offset.0 + 1));
        }
        self.counters.commits.fetch_add(1, Ordering::Relaxed);
        let elapsed = dim_model::time::nanoseconds(begun.elapsed());
        self.counters.nanoseconds.fetch_add(elapsed, Ordering::Relaxed);
        told.changes.iter().for_each(|change| self.changes.tell(change));
        for submitted in work.batches {
            self.finish(submitted);
        }
        after.into_iter().for_each(|done| done());
        for ApiPublish { done, .. } in work.publishes {
            // The caller may have disconnected.
            let _ = done.send(());
        }
        self.announce(&wakes);
        if are_catch_ups_changed {
            self.catch_ups.notify_one();
        }
        Ok(())
    }

    /// Decides whether this commit waits for the disk. Proof of listening alone needs no sync: losing it only
    /// makes a gap begin earlier.
    fn sync(&self, writes: Sync, work: &Work, entries: &[Arc<Entry>], disk: &Disk, stopping: bool) -> Sync {
        let changes_world = |entry: &Arc<Entry>| {
            matches!(entry.kind, Kind::Heard(_) | Kind::NameConfirmed(_) | Kind::Peers { .. } | Kind::Tick(_))
        };
        let trifling = writes == Sync::Later
            && work.batches.iter().all(|submitted| submitted.batch.is_trifling())
            && entries.iter().all(changes_world);
        let may_lag = trifling || self.durability == Durability::Eventual;
        if may_lag && !stopping && disk.synced_at.elapsed() < self.durability.most_behind() {
            Sync::Later
        } else {
            Sync::Now
        }
    }

    fn finish(&self, submitted: Submitted) {
        let Submitted { batch, progress, context, .. } = submitted;
        self.counters.handled.fetch_add(batch.entries as u64, Ordering::Relaxed);
        match &context {
            Some(context) => self.interest.go_back(&batch.plugin, context),
            None => self.interest.update(&batch),
        }
        batch.send_replies();
        if let Some(handover) = &batch.code.handover {
            handover.tell();
        }
        progress.committed.store(batch.number, Ordering::Release);
        progress.mailbox.ring();
    }

    fn announce(&self, wakes: &Wakes) {
        for (due, notify) in
            [(wakes.outbox, &self.outbox), (wakes.names, &self.names), (wakes.retries, &self.retries)]
        {
            if due {
                notify.notify_one();
            }
        }
    }
}

/// Adds publishes of API callers to the outbox. Returns their entries: the plugins receive the messages, too.
fn publish_all(write: &WriteTransaction, publishes: &[ApiPublish]) -> Result<Vec<Kind>, StoreError> {
    outbox::enqueue_at(write, None, publishes.iter().map(|it| (&it.publish, it.at)))?;
    let entry = |ApiPublish { publish, .. }: &ApiPublish| {
        let Publish { topic, data } = publish.clone();
        Kind::Event(Event::Message { topic, data, origin: Origin::Host })
    };
    Ok(publishes.iter().map(entry).collect())
}
