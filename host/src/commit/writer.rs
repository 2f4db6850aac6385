//! Owns the writer's thread: what waits becomes one transaction, over and over.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::apply::{NameChanges, Wakes, apply, entries_of};
use super::code::{self, Told};
use super::disk::Disk;
use super::queue::{Queue, Submitted, Work};
use super::{Commit, Durability};
use crate::entry::{Entry, Kind, Offset};
use crate::log::EventLog;
use crate::store::{self, Store, StoreError, Sync};

/// How long entries wait for a batch to share a transaction with.
const LINGER: Duration = Duration::from_millis(20);

impl Commit {
    /// The writer's thread: commits until `stop` is cancelled and nothing waits any more. What is
    /// committed when it returns is on the disk.
    pub fn run(&self, store: &Store, log: &EventLog, stop: &CancellationToken) -> Result<(), StoreError> {
        let outcome = self.run_until(store, log, stop);
        // After an error nothing is acknowledged any more: who waits is told.
        let mut queue = self.queue.lock().expect("no one panics while holding the queue");
        *queue = Queue { closed: true, ..Queue::default() };
        outcome
    }

    /// Commits what waits, once, on this thread: for whoever drives a plugin by hand.
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

    /// What waits; none once the queue is empty and closed for good.
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
        // Before the pending entries are looked at, so that they share the transaction.
        let (mut wakes, mut names) = (Wakes::default(), NameChanges::new(log.now()));
        let mut after = Vec::new();
        let mut worth = Sync::Later;
        let mut told = Told::default();
        for small in std::mem::take(&mut work.writes) {
            if small.sync == Sync::Now {
                worth = Sync::Now;
            }
            wakes.add(small.wakes);
            let (entries, done) = (small.run)(&write, &mut names, &mut told)?;
            log.append_now(entries);
            after.push(done);
        }
        for Submitted { batch, progress, undo, world } in &mut work.batches {
            progress.taken.store(batch.number, Ordering::Release);
            progress.mailbox.ring();
            *undo = code::begin(&write, batch, log.now(), &mut told)?;
            log.append_now(entries_of(batch));
            for (key, update) in &batch.names {
                log.append_now(code::set_name(&write, *undo, key, update, &mut names)?);
            }
            if let Some(order) = &batch.take_back {
                let at = (log.now(), &mut names);
                *world = code::take_back(&write, batch, order, log.head(), at, &mut told)?;
                wakes.names = true;
            }
            log.append_now(std::mem::take(&mut told.entries));
        }
        wakes.outbox |= !told.changes.is_empty();
        let entries = log.pending();
        let sync = self.sync(worth, &work, &entries, disk, stopping);
        store.set_sync(&mut write, sync)?;
        store::log::append(&write, entries.iter().map(AsRef::as_ref))?;
        if let Some(last) = entries.last() {
            names.settle(&write, last.offset)?;
        }
        let now = log.now();
        for Submitted { batch, undo, .. } in work.batches.iter().filter(|it| it.batch.take_back.is_none()) {
            apply(&write, batch, now, &self.dead_letters, *undo, &mut wakes)?;
        }
        // Before the outbox can see them and count them down.
        for submitted in &work.batches {
            self.backlog.added(Some(&submitted.batch.plugin), submitted.batch.publishes.len());
        }
        self.backlog.added(None, told.changes.len());
        let syncing = Instant::now();
        write.commit()?;
        if sync == Sync::Now {
            self.tally.syncs.observe(syncing.elapsed().as_secs_f64());
        }
        disk.committed(sync);
        if let Some(last) = entries.last() {
            log.committed(Offset(last.offset.0 + 1));
        }
        self.tally.commits.fetch_add(1, Ordering::Relaxed);
        let elapsed = crate::time::nanoseconds(begun.elapsed());
        self.tally.nanoseconds.fetch_add(elapsed, Ordering::Relaxed);
        told.changes.iter().for_each(|change| self.changes.tell(change));
        for submitted in work.batches {
            self.finish(submitted);
        }
        after.into_iter().for_each(|done| done());
        self.announce(&wakes);
        Ok(())
    }

    /// Whether this commit waits for the disk. Proof of listening alone is not worth a sync: losing
    /// it only makes a gap begin earlier.
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
        let Submitted { batch, progress, world, .. } = submitted;
        self.tally.handled.fetch_add(batch.entries as u64, Ordering::Relaxed);
        match &world {
            Some(world) => self.interest.go_back(&batch.plugin, world),
            None => self.interest.update(&batch),
        }
        batch.send_replies();
        if let Some(handover) = &batch.handover {
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
