//! Owns the handle of an actor: the rest of the host sends commands, queries and orders through it, and
//! receives replies and the plugin's status.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};

use dim_model::entry::{Kind, Offset};
use dim_model::ident::{KeyName, PluginName};
use dim_store::batch::{Reply, ReplyError};
use dim_store::disk_monitor::DiskMonitor;
use dim_store::event_log::{EventLog, Mailbox};
use dim_store::plugin_registry::Claim;
use tokio::sync::oneshot;

use super::{Order, PluginStatus};
use crate::Runnable;

/// Most queries that wait at one plugin; the handle refuses more.
const QUERIES: usize = 1024;
/// A query to a plugin.
#[derive(Debug)]
pub struct Query {
    /// The method.
    pub method: String,
    /// The body, in JSON.
    pub body: String,
    /// The channel for the answer.
    pub to: oneshot::Sender<Reply>,
}

/// The callers that wait for replies of commands, by the offset of the entry; `None` once the actor has ended.
type Waiting = Mutex<Option<HashMap<Offset, oneshot::Sender<Reply>>>>;

fn wait_for(waiting: &Waiting, offset: Offset, to: oneshot::Sender<Reply>) {
    if let Some(waiting) = waiting.lock().expect("no one panics while holding the waiting").as_mut() {
        waiting.insert(offset, to);
    }
}

/// The pending order; `None` once the actor has ended.
type Ordered = Mutex<Option<Option<Order>>>;

/// The interface of a plugin for the rest of the host.
#[derive(Clone, Debug)]
pub struct Handle {
    name: PluginName,
    log: Arc<EventLog>,
    disk: Arc<DiskMonitor>,
    mailbox: Arc<Mailbox>,
    queries: SyncSender<Query>,
    waiting: Arc<Waiting>,
    order: Arc<Ordered>,
    status: Arc<Mutex<PluginStatus>>,
    code: Arc<Mutex<Arc<Runnable>>>,
    fallback: Arc<Mutex<Option<Arc<Runnable>>>>,
    flags: Flags,
}

/// The orders and states that an actor and its handle share.
#[derive(Clone, Debug, Default)]
struct Flags {
    /// Whether the plugin is paused.
    paused: Arc<AtomicBool>,
    /// Whether the plugin is quarantined.
    quarantined: Arc<AtomicBool>,
    /// Whether the operator has ended a quarantine.
    resumed: Arc<AtomicBool>,
    /// Whether the plugin is being removed.
    leaves: Arc<AtomicBool>,
}

/// The actor's side of its handle.
#[derive(Debug)]
pub struct Inbox {
    /// Rung when there is work.
    pub mailbox: Arc<Mailbox>,
    /// Queries, in the order of their arrival.
    pub queries: Receiver<Query>,
    waiting: Arc<Waiting>,
    order: Arc<Ordered>,
    status: Arc<Mutex<PluginStatus>>,
    code: Arc<Mutex<Arc<Runnable>>>,
    fallback: Arc<Mutex<Option<Arc<Runnable>>>>,
    flags: Flags,
}

/// Creates both sides of the handle of the actor of `name`, which runs `code`.
pub fn pair(
    name: PluginName,
    code: &Runnable,
    log: Arc<EventLog>,
    disk: Arc<DiskMonitor>,
) -> (Handle, Inbox) {
    let (to_queries, queries) = sync_channel(QUERIES);
    let waiting = Arc::new(Mutex::new(Some(HashMap::new())));
    let inbox = Inbox {
        mailbox: Arc::new(Mailbox::new()),
        queries,
        waiting,
        order: Arc::new(Mutex::new(Some(None))),
        status: Arc::default(),
        code: Arc::new(Mutex::new(Arc::new(code.clone()))),
        fallback: Arc::default(),
        flags: Flags::default(),
    };
    let handle = Handle {
        name,
        log,
        disk,
        mailbox: inbox.mailbox.clone(),
        queries: to_queries,
        waiting: inbox.waiting.clone(),
        order: inbox.order.clone(),
        status: inbox.status.clone(),
        code: inbox.code.clone(),
        fallback: inbox.fallback.clone(),
        flags: inbox.flags.clone(),
    };
    (handle, inbox)
}

impl Drop for Inbox {
    /// Drops the waiting channels, so that their callers receive an error.
    fn drop(&mut self) {
        self.waiting.lock().expect("no one panics while holding the waiting").take();
        self.order.lock().expect("no one panics while holding the order").take();
    }
}

impl Inbox {
    /// Takes the caller that waits for the reply of the command at `offset`.
    pub fn take_waiting(&self, offset: Offset) -> Option<oneshot::Sender<Reply>> {
        self.waiting.lock().expect("no one panics while holding the waiting").as_mut()?.remove(&offset)
    }

    /// Reports to the callers of commands before `first` that the plugin will not handle them.
    pub fn forget_waiting(&self, first: Offset) {
        let mut waiting = self.waiting.lock().expect("no one panics while holding the waiting");
        let gone = waiting.iter_mut().flat_map(|waiting| waiting.extract_if(|offset, _| *offset < first));
        for (_, to) in gone {
            let reason = "it was too far behind, and will not handle the command";
            // The caller may have disconnected.
            let _ = to.send(Err(ReplyError::Unavailable(reason.to_owned())));
        }
    }

    /// Registers the caller of the command at `offset` again, because the command is handled again.
    pub fn wait_again(&self, offset: Offset, to: oneshot::Sender<Reply>) {
        wait_for(&self.waiting, offset, to);
    }

    /// Whether an order waits.
    pub fn has_order(&self) -> bool {
        let order = self.order.lock().expect("no one panics while holding the order");
        order.as_ref().is_some_and(Option::is_some)
    }

    /// Takes the waiting order.
    pub fn take_order(&self) -> Option<Order> {
        self.order.lock().expect("no one panics while holding the order").as_mut()?.take()
    }

    /// Whether the plugin is paused.
    pub fn is_paused(&self) -> bool {
        self.flags.paused.load(Ordering::Relaxed)
    }

    /// Sets whether the plugin is quarantined.
    pub fn show_quarantined(&self, quarantined: bool) {
        self.flags.quarantined.store(quarantined, Ordering::Relaxed);
    }

    /// Whether the plugin was resumed since the last call.
    pub fn take_resumed(&self) -> bool {
        self.flags.resumed.swap(false, Ordering::Relaxed)
    }

    /// Publishes the code that runs.
    pub fn show_code(&self, code: &Runnable) {
        *self.code.lock().expect("no one panics while holding the code") = Arc::new(code.clone());
    }

    /// Publishes the code that runs again if the current code fails.
    pub fn show_fallback(&self, fallback: Option<&Arc<Runnable>>) {
        *self.fallback.lock().expect("no one panics while holding the code") = fallback.cloned();
    }

    /// Publishes the status of the plugin.
    pub fn show(&self, status: &PluginStatus) {
        *self.status.lock().expect("no one panics while holding a status") = status.clone();
    }
}

impl Handle {
    /// The status of the plugin.
    pub fn status(&self) -> PluginStatus {
        self.status.lock().expect("no one panics while holding a status").clone()
    }

    /// Sends a command, which becomes an entry of the log. Waits for the reply, which comes once the effects
    /// are durable.
    pub async fn command(&self, method: String, body: String) -> Reply {
        if let Some(reason) = self.status().reason {
            return Err(ReplyError::Unavailable(reason));
        }
        if self.is_paused() {
            return Err(ReplyError::Unavailable("it is paused".into()));
        }
        if self.leaves() {
            return Err(ReplyError::Unavailable("it is being removed".into()));
        }
        self.disk.check()?;
        let (to, reply) = oneshot::channel();
        self.log.room().await;
        {
            // The lock is held while the entry is appended, so that the plugin finds the waiting caller.
            let mut waiting = self.waiting.lock().expect("no one panics while holding the waiting");
            let Some(waiting) = waiting.as_mut() else {
                return Err(ReplyError::Unavailable("it has stopped".into()));
            };
            let kind = Kind::Command { plugin: self.name.clone(), method, body };
            let offset = self.log.append_command(kind);
            waiting.insert(offset, to);
        }
        reply.await.unwrap_or_else(|_| {
            Err(ReplyError::Unavailable(match self.leaves() {
                true => {
                    "it was removed before it handled the command, and will handle it if it is installed again".into()
                }
                false => "the host is shutting down".into(),
            }))
        })
    }

    /// Registers for the reply of a command that is in the log already.
    pub fn reply_of(&self, offset: Offset) -> oneshot::Receiver<Reply> {
        let (to, reply) = oneshot::channel();
        wait_for(&self.waiting, offset, to);
        reply
    }

    /// Sends a query and waits for the answer.
    pub async fn query(&self, method: String, body: String) -> Reply {
        let (to, reply) = oneshot::channel();
        match self.queries.try_send(Query { method, body, to }) {
            Ok(()) => self.mailbox.ring(),
            Err(TrySendError::Full(_)) => {
                return Err(ReplyError::Unavailable(format!("{QUERIES} queries are waiting")));
            }
            Err(TrySendError::Disconnected(_)) => {
                return Err(ReplyError::Unavailable("it has stopped".into()));
            }
        }
        reply.await.unwrap_or_else(|_| Err(ReplyError::Unavailable("it has stopped".into())))
    }

    /// Pauses the plugin from the next entry on, or resumes it.
    pub fn pause(&self, paused: bool) {
        self.flags.paused.store(paused, Ordering::Relaxed);
        self.flags.resumed.store(!paused, Ordering::Relaxed);
        self.mailbox.ring();
    }

    /// Refuses commands from now on, because the plugin is being removed.
    pub fn leave(&self) {
        self.flags.leaves.store(true, Ordering::Relaxed);
    }

    fn leaves(&self) -> bool {
        self.flags.leaves.load(Ordering::Relaxed)
    }

    /// Whether the plugin is paused.
    pub fn is_paused(&self) -> bool {
        self.flags.paused.load(Ordering::Relaxed)
    }

    /// Whether the plugin is quarantined: it is not started until it is resumed or has other code.
    pub fn is_quarantined(&self) -> bool {
        self.flags.quarantined.load(Ordering::Relaxed)
    }

    /// The code that runs.
    pub fn code(&self) -> Arc<Runnable> {
        self.code.lock().expect("no one panics while holding the code").clone()
    }

    /// The code that runs again if the current code fails on probation.
    pub fn fallback(&self) -> Option<Arc<Runnable>> {
        self.fallback.lock().expect("no one panics while holding the code").clone()
    }

    /// The claims of the current code and of the fallback.
    pub fn claims(&self) -> impl Iterator<Item = Claim> + use<> {
        [Some(self.code()), self.fallback()].into_iter().flatten().map(|run| Claim::of(&run.reach))
    }

    /// Whether the current code or the fallback publishes under a key or reads it.
    pub fn uses(&self, key: &KeyName) -> bool {
        let runs = [Some(self.code()), self.fallback()];
        runs.into_iter().flatten().any(|run| run.reach.keys().any(|used| used == key))
    }

    /// Sends an order, which the actor executes between two entries. The earlier order must be finished. If the
    /// actor has ended, the order is dropped and its caller receives an error.
    pub fn order(&self, order: Order) {
        if let Some(slot) = self.order.lock().expect("no one panics while holding the order").as_mut() {
            *slot = Some(order);
        }
        self.mailbox.ring();
    }

    /// Wakes the plugin's thread to check for a stop or new entries.
    pub fn wake(&self) {
        self.mailbox.ring();
    }
}
