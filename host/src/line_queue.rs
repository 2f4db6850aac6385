//! Owns the way of lines to standard error and standard output: a bounded queue, and a thread that writes. A
//! reader that does not read blocks that thread alone; lines that find no room are dropped and counted.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Most that waits to be written, in bytes. What comes beyond it is dropped, the newest first: the oldest lines say
/// how the trouble began.
const CAPACITY: usize = 1 << 20;

/// Lines that this process has dropped, of all its queues.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// How many lines this process has dropped because nobody read them.
pub fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// A queue of lines that one thread writes. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct LineQueue(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    /// A line came, or was written.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Lines that were dropped since the last report.
    dropped: u64,
    /// The thread holds a line that is not written yet.
    is_writing: bool,
}

impl LineQueue {
    /// Starts the thread that writes to `sink`. It ends with the process, because nothing can end a blocked write.
    /// `report` is called with the number of dropped lines once the reader has caught up.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn start(
        sink: impl Write + Send + 'static,
        report: impl Fn(u64) + Send + 'static,
    ) -> io::Result<Self> {
        let queue = Self::default();
        let written = queue.clone();
        std::thread::Builder::new().name("lines".into()).spawn(move || written.write_to(sink, report))?;
        Ok(queue)
    }

    /// Adds what is written as one piece. Never blocks.
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

    /// Waits until everything is written, for at most `longest`. Returns whether it is.
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
            // A closed pipe is nobody's trouble but the reader's.
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

    /// Notes that a line of `bytes` is written; returns how many were dropped if the reader has caught up.
    fn written(&self, bytes: usize) -> u64 {
        let mut waiting = self.lock();
        waiting.is_writing = false;
        // Counted until it is written: a line that is being written takes memory too.
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

    /// A reader that takes a line only when it is told to.
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
