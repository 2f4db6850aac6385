//! Checks the events in the log of a reader against what was published.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use dim_model::entry::{Event, Kind, Offset, Origin};
use dim_model::time::Timestamp;
use dim_server::host::Host;
use dim_tests::TestHost;

use crate::pair::heartbeat;

/// The number of entries that are read at once.
const AT_ONCE: usize = 4_096;

/// The pause before more entries are looked for.
const POLL: Duration = Duration::from_millis(1);

/// Follows the log of a host: the heartbeats of one writer must come once each, in order, and unchanged.
#[derive(Debug)]
pub struct Checker {
    host: Arc<Host>,
    /// The next entry.
    pub next: Offset,
    /// The number of heartbeats that were right.
    pub seen: u64,
    /// Of each hundredth heartbeat: the time of its publish, and how long it took until it was in the log of the reader.
    pub delays: Vec<(Timestamp, Duration)>,
}

impl Checker {
    /// Begins with the next entry of the log. The next heartbeat is the one with number `seen`.
    pub fn new(host: &TestHost, seen: u64) -> Self {
        let next = host.host.storage.log.head();
        Self { host: host.host.clone(), next, seen, delays: Vec::new() }
    }

    /// Begins with the first entry of the log.
    pub fn from_the_beginning(host: &TestHost) -> Self {
        Self { host: host.host.clone(), next: Offset(0), seen: 0, delays: Vec::new() }
    }

    /// Reads until the heartbeat before `count` has been seen.
    ///
    /// # Panics
    /// A heartbeat is lost, repeated, changed or not in its place.
    pub async fn read_to(&mut self, count: u64) {
        let mut entries = VecDeque::new();
        while self.seen < count {
            self.host.storage.log.read(self.next, AT_ONCE, &mut entries).expect("the log can be read");
            if entries.is_empty() {
                tokio::time::sleep(POLL).await;
            }
            for entry in entries.drain(..) {
                self.next = Offset(entry.offset.0 + 1);
                match &entry.kind {
                    Kind::Event(Event::Message { data, origin: Origin::Member(event), .. }) => {
                        assert_eq!(*data, heartbeat(self.seen), "sequence {}", event.sequence);
                        assert_eq!(event.sequence, self.seen, "events of one incarnation");
                        if self.seen.is_multiple_of(100) {
                            let delay = Duration::from_nanos(entry.time.0.saturating_sub(event.time.0));
                            self.delays.push((event.time, delay));
                        }
                        self.seen += 1;
                    }
                    Kind::Event(Event::Gap { topic, .. }) => panic!("a gap on {topic} after {}", self.seen),
                    _ => {}
                }
            }
        }
    }
}
