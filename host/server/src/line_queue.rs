//! Owns the output of lines to standard error and standard output. It receives lines into a bounded queue and writes
//! them in a thread of its own. A blocked reader blocks that thread alone; lines that exceed the queue are dropped
//! and counted.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// The capacity of the queue, in bytes. The newest lines are dropped first, because the oldest show the cause of the
/// problem.
const CAPACITY: usize = 1 << 20;

/// The number of lines that all queues of this process dropped.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Returns the number of lines that this process dropped because of a blocked reader.
pub fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// A queue of lines with one writing thread. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct LineQueue(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    /// Notified after a line was added or written.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// The number of lines that were dropped since the last report.
    dropped: u64,
    /// Whether the thread holds a line that is not written yet.
    is_writing: bool,
}

impl LineQueue {
    /// Starts the thread that writes to `sink`. The thread ends with the process, because nothing can end a blocked
    /// write. It calls `report` with the number of dropped lines once the reader has caught up.
    ///
    /// # Errors
    /// Returns an error if the system cannot start a thread.
    pub fn start(
        sink: impl Write + Send + 'static,
        report: impl Fn(u64) + Send + 'static,
    ) -> io::Result<Self> {
        let queue = Self::default();
        let written = queue.clone();
        std::thread::Builder::new().name("lines".into()).spawn(move || written.write_to(sink, report))?;
        Ok(queue)
    }

    /// Adds bytes that are written in one piece. Never blocks.
    pub fn push(&self, line: Vec<u8>) {
        let mut waiting = self.lock();
        if waiting.bytes.saturating_add(line.len()) > CAPACITY {
            waiting.dropped += 1;
            DROPPED.fetch_add(1, Ordering::Relaxed);
            return;
        }
        waiting.bytes += line.len();
        waiting.lines.push_back(line);
        drop(waiting);
        self.0.changed.notify_all();
    }

    /// Waits until everything is written, for at most `longest`. Returns whether everything is written.
    pub fn flush(&self, longest: Duration) -> bool {
        let deadline = Instant::now() + longest;
        let mut waiting = self.lock();
        while waiting.is_writing || !waiting.lines.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            waiting = self.0.changed.wait_timeout(waiting, left).expect(UNPOISONED).0;
        }
        true
    }

    fn write_to(&self, mut sink: impl Write, report: impl Fn(u64)) {
        loop {
            let line = self.next();
            // The reader closed the pipe: nothing can be done here.
            let _ = sink.write_all(&line).and_then(|()| sink.flush());
            let dropped = self.written(line.len());
            if dropped > 0 {
                report(dropped);
            }
        }
    }

    fn next(&self) -> Vec<u8> {
        let mut waiting = self.lock();
        loop {
            if let Some(line) = waiting.lines.pop_front() {
                waiting.is_writing = true;
                return line;
            }
            waiting = self.0.changed.wait(waiting).expect(UNPOISONED);
        }
    }

    /// Marks a line of `bytes` as written. Returns the number of dropped lines if the queue is empty now.
    fn written(&self, bytes: usize) -> u64 {
        let mut waiting = self.lock();
        waiting.is_writing = false;
        // A line counts until it is written, because it takes memory until then.
        waiting.bytes -= bytes;
        let dropped = if waiting.lines.is_empty() { std::mem::take(&mut waiting.dropped) } else { 0 };
        drop(waiting);
        self.0.changed.notify_all();
        dropped
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.waiting.lock().expect(UNPOISONED)
    }
}

const UNPOISONED: &str = "no one panics while holding the lines";

/// Each write is one line: the log formats a whole line before it writes.
impl Write for LineQueue {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A reader that takes a line only when the test allows it.
    struct Reader {
        allowed: mpsc::Receiver<()>,
        read: mpsc::Sender<Vec<u8>>,
    }

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.allowed.recv();
            let _ = self.read.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_does_not_read_blocks_nobody_and_dropped_lines_are_reported_once() {
        let (allow, allowed) = mpsc::channel();
        let (to, read) = mpsc::channel();
        let (reporting, reports) = mpsc::channel();
        let queue = LineQueue::start(Reader { allowed, read: to }, move |dropped| {
            let _ = reporting.send(dropped);
        })
        .unwrap();
        let line = vec![b'x'; CAPACITY / 4];
        (0..7).for_each(|_| queue.push(line.clone()));
        assert!(!queue.flush(Duration::from_millis(1)), "nothing is read");
        drop(allow);
        assert!(queue.flush(Duration::from_secs(20)));
        assert_eq!(reports.recv_timeout(Duration::from_secs(20)), Ok(3));
        assert_eq!(read.try_iter().count(), 4);
        assert!(dropped() >= 3);
        assert!(reports.try_recv().is_err());
    }
}
