//! The node registry's work on a heartbeat in native code, on the same log, state and commit: the
//! limit that the sandbox is compared with.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dim_model::entry::{Event, Kind, Offset};
use dim_model::time::Timestamp;
use dim_runtime::{Mode, Session, SessionParts};
use dim_server::host::Host;
use dim_store::PluginId;
use dim_store::batch::{Batch, Effects, Timers};
use dim_store::catch_ups::KeptTopics;
use dim_store::commit::Progress;
use dim_store::entry_context::EntryContext;
use dim_store::event_log::Mailbox;
use dim_store::plugin_limits::Limits;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// A native stand-in for a plugin.
pub struct Registry {
    cursor: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Registry {
    pub fn start(host: &Arc<Host>) -> Self {
        let (cursor, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (host, shown, stopped) = (host.clone(), cursor.clone(), stop.clone());
        let thread = std::thread::spawn(move || run(&host, &shown, &stopped));
        Self { cursor, stop, thread }
    }

    pub fn cursor(&self) -> u64 {
        self.cursor.load(Ordering::Acquire)
    }

    pub fn stop(self) {
        self.stop.store(true, Ordering::Release);
        self.thread.join().expect("the stand-in does not panic");
    }
}

fn run(host: &Host, shown: &AtomicU64, stop: &AtomicBool) {
    let (plugin, id) = ("native".parse().expect("a name"), PluginId(1));
    let batch = Batch::new(plugin, id, dim_model::entry::Generation(1), 1, Offset(0));
    let parts = SessionParts {
        plugin: "native".parse().expect("a name"),
        id,
        reach: Arc::default(),
        limits: Limits::default(),
        context: EntryContext::default(),
        effects: Effects::new(batch, Timers::default(), 0),
        files: host.storage.store.clone(),
        store: host.storage.store.clone(),
        keys: host.storage.keys.clone(),
        outbox_len: Arc::default(),
        kept_topics: KeptTopics::All,
        listeners: dim_runtime::Lines::default(),
    };
    let mut session = Session::new(parts, "0".to_owned()).expect("a session");
    let mailbox = Arc::new(Mailbox::new());
    let progress = Arc::new(Progress::new(mailbox.clone()));
    let (mut buffer, mut begun) = (VecDeque::new(), Instant::now());
    while !stop.load(Ordering::Acquire) {
        session.settle(progress.committed()).expect("a snapshot");
        host.storage.log.read(session.effects.batch.cursor, 512, &mut buffer).expect("the log");
        let idle = buffer.is_empty();
        for entry in buffer.drain(..) {
            if let Kind::Event(Event::Message { data, .. }) = &entry.kind {
                session.begin(Mode::Entry, entry.time);
                heartbeat(&mut session, data);
                session.effects.batch.entries += 1;
            }
            session.effects.batch.cursor = Offset(entry.offset.0 + 1);
        }
        let waits = session.effects.in_flight.last().is_some_and(|batch| batch.number > progress.taken());
        let full = idle || begun.elapsed() > Duration::from_millis(20);
        if full && !waits && !session.effects.batch.is_empty() {
            begun = Instant::now();
            host.storage.commit.submit(session.seal(), progress.clone());
        }
        if idle && session.effects.batch.is_empty() {
            shown.store(session.effects.batch.cursor.0, Ordering::Release);
            mailbox.wait(Duration::from_millis(1));
        }
    }
}

/// Parses the heartbeat, reads the node's record and writes it anew.
fn heartbeat(session: &mut Session, data: &[u8]) {
    let beat: Beat<'_> = serde_json::from_slice(data).expect("a heartbeat");
    let key = format!("node/{}", beat.node_id);
    let known = session.get_state(key.as_bytes()).expect("the store").expect("a key");
    let known: Option<Record> = known.map(|record| serde_json::from_slice(&record).expect("a record"));
    let record = Record {
        node_id: beat.node_id.to_owned(),
        status: beat.status.to_owned(),
        resources: beat.resources.to_owned(),
        cached_models: beat.cached_models,
        last_seen: session.context.time(),
        sent_at: known.map_or(beat.timestamp.to_owned(), |known| known.sent_at),
    };
    let record = serde_json::to_vec(&record).expect("it is JSON");
    session.set_state(key.as_bytes(), Some(&record)).expect("the store").expect("granted");
}

/// A heartbeat, as far as it is read.
#[derive(Deserialize)]
struct Beat<'a> {
    node_id: &'a str,
    timestamp: &'a str,
    status: &'a str,
    #[serde(borrow)]
    resources: &'a RawValue,
    cached_models: Vec<String>,
}

/// What is kept of a node.
#[derive(Deserialize, Serialize)]
struct Record {
    node_id: String,
    status: String,
    resources: Box<RawValue>,
    cached_models: Vec<String>,
    last_seen: Timestamp,
    sent_at: String,
}
