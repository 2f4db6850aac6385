//! Owns the other end of an actor: how the rest of the host asks, orders and sees how it is doing.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};

use tokio::sync::oneshot;

use super::{Order, PluginStatus};
use crate::entry::{Kind, Offset};
use crate::ident::{KeyName, PluginName};
use crate::log::{EventLog, Mailbox};
use crate::plugin::roster::Claim;
use crate::plugin::{Reply, ReplyError, Runnable};
use crate::room::Room;

/// Queries that wait at one plugin; one more is refused.
const QUERIES: usize = 1024;
/// A question to a plugin.
#[derive(Debug)]
pub struct Query {
    /// Which question.
    pub method: String,
    /// JSON.
    pub body: String,
    /// Where the answer goes.
    pub to: oneshot::Sender<Reply>,
}

/// Who waits for the reply of a command, by the offset of its entry; none once the actor has ended.
type Waiting = Mutex<Option<HashMap<Offset, oneshot::Sender<Reply>>>>;

fn wait_for(waiting: &Waiting, offset: Offset, to: oneshot::Sender<Reply>) {
    if let Some(waiting) = waiting.lock().expect("no one panics while holding the waiting").as_mut() {
        waiting.insert(offset, to);
    }
}

/// Which code is to go on; none once the actor has ended.
type Ordered = Mutex<Option<Option<Order>>>;

/// A plugin, as the rest of the host knows it.
#[derive(Clone, Debug)]
pub struct Handle {
    name: PluginName,
    log: Arc<EventLog>,
    room: Arc<Room>,
    mailbox: Arc<Mailbox>,
    queries: SyncSender<Query>,
    waiting: Arc<Waiting>,
    order: Arc<Ordered>,
    status: Arc<Mutex<PluginStatus>>,
    code: Arc<Mutex<Arc<Runnable>>>,
    fallback: Arc<Mutex<Option<Arc<Runnable>>>>,
    paused: Arc<AtomicBool>,
    quarantined: Arc<AtomicBool>,
    resumed: Arc<AtomicBool>,
    leaves: Arc<AtomicBool>,
}

/// The actor's end of its handle.
#[derive(Debug)]
pub struct Inbox {
    /// Rung when there is something to do.
    pub mailbox: Arc<Mailbox>,
    /// Questions, in the order in which they came.
    pub queries: Receiver<Query>,
    waiting: Arc<Waiting>,
    order: Arc<Ordered>,
    status: Arc<Mutex<PluginStatus>>,
    code: Arc<Mutex<Arc<Runnable>>>,
    fallback: Arc<Mutex<Option<Arc<Runnable>>>>,
    paused: Arc<AtomicBool>,
    quarantined: Arc<AtomicBool>,
    resumed: Arc<AtomicBool>,
}

/// The two ends between the actor of `name`, which runs `code`, and the rest of the host.
pub fn pair(name: PluginName, code: &Runnable, log: Arc<EventLog>, room: Arc<Room>) -> (Handle, Inbox) {
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
        paused: Arc::default(),
        quarantined: Arc::default(),
        resumed: Arc::default(),
    };
    let handle = Handle {
        name,
        log,
        room,
        mailbox: inbox.mailbox.clone(),
        queries: to_queries,
        waiting: inbox.waiting.clone(),
        order: inbox.order.clone(),
        status: inbox.status.clone(),
        code: inbox.code.clone(),
        fallback: inbox.fallback.clone(),
        paused: inbox.paused.clone(),
        quarantined: inbox.quarantined.clone(),
        resumed: inbox.resumed.clone(),
        leaves: Arc::default(),
    };
    (handle, inbox)
}

impl Drop for Inbox {
    /// Tells whoever waits that there will be no reply.
    fn drop(&mut self) {
        self.waiting.lock().expect("no one panics while holding the waiting").take();
        self.order.lock().expect("no one panics while holding the order").take();
    }
}

impl Inbox {
    /// Who waits for the reply of the command at `offset`.
    pub fn take_waiting(&self, offset: Offset) -> Option<oneshot::Sender<Reply>> {
        self.waiting.lock().expect("no one panics while holding the waiting").as_mut()?.remove(&offset)
    }

    /// Tells who waits for the reply of a command before `first` that it will not be carried out.
    pub fn forget_waiting(&self, first: Offset) {
        let mut waiting = self.waiting.lock().expect("no one panics while holding the waiting");
        let gone = waiting.iter_mut().flat_map(|waiting| waiting.extract_if(|offset, _| *offset < first));
        for (_, to) in gone {
            let reason = "it was too far behind, and will not carry out the order";
            // Whoever asked may have gone away.
            let _ = to.send(Err(ReplyError::Unavailable(reason.to_owned())));
        }
    }

    /// Lets who waits for the reply of the command at `offset` wait on: it is handled again.
    pub fn wait_again(&self, offset: Offset, to: oneshot::Sender<Reply>) {
        wait_for(&self.waiting, offset, to);
    }

    /// Whether other code is to go on.
    pub fn has_order(&self) -> bool {
        let order = self.order.lock().expect("no one panics while holding the order");
        order.as_ref().is_some_and(Option::is_some)
    }

    /// Which code is to go on.
    pub fn take_order(&self) -> Option<Order> {
        self.order.lock().expect("no one panics while holding the order").as_mut()?.take()
    }

    /// Whether nothing is handled for now.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Says whether the plugin is quarantined.
    pub fn show_quarantined(&self, quarantined: bool) {
        self.quarantined.store(quarantined, Ordering::Relaxed);
    }

    /// Whether it was resumed since this was last asked.
    pub fn take_resumed(&self) -> bool {
        self.resumed.swap(false, Ordering::Relaxed)
    }

    /// Says which code runs.
    pub fn show_code(&self, code: &Runnable) {
        *self.code.lock().expect("no one panics while holding the code") = Arc::new(code.clone());
    }

    /// Says which code runs again if that fails.
    pub fn show_fallback(&self, fallback: Option<&Arc<Runnable>>) {
        *self.fallback.lock().expect("no one panics while holding the code") = fallback.cloned();
    }

    /// Says how the plugin is doing.
    pub fn show(&self, status: &PluginStatus) {
        *self.status.lock().expect("no one panics while holding a status") = status.clone();
    }
}

impl Handle {
    /// How the plugin is doing.
    pub fn status(&self) -> PluginStatus {
        self.status.lock().expect("no one panics while holding a status").clone()
    }

    /// Gives an order: an entry of the log. The reply comes once its effects are durable.
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
        self.room.check()?;
        let (to, reply) = oneshot::channel();
        self.log.room().await;
        {
            // Held while appending, so that the plugin finds who waits.
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
                    "it was removed before it had carried out the order, and will if it comes back".into()
                }
                false => "the host is shutting down".into(),
            }))
        })
    }

    /// Waits for the reply of a command that is in the log already.
    pub fn reply_of(&self, offset: Offset) -> oneshot::Receiver<Reply> {
        let (to, reply) = oneshot::channel();
        wait_for(&self.waiting, offset, to);
        reply
    }

    /// Asks a question.
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

    /// Has it handle nothing from the next entry on, or go on.
    pub fn pause(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
        self.resumed.store(!paused, Ordering::Relaxed);
        self.mailbox.ring();
    }

    /// Has it take no more orders: it is removed.
    pub fn leave(&self) {
        self.leaves.store(true, Ordering::Relaxed);
    }

    fn leaves(&self) -> bool {
        self.leaves.load(Ordering::Relaxed)
    }

    /// Whether nothing is handled for now.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Whether it is not even started until it is resumed or has other code.
    pub fn is_quarantined(&self) -> bool {
        self.quarantined.load(Ordering::Relaxed)
    }

    /// What runs.
    pub fn code(&self) -> Arc<Runnable> {
        self.code.lock().expect("no one panics while holding the code").clone()
    }

    /// What runs again if that fails on probation.
    pub fn fallback(&self) -> Option<Arc<Runnable>> {
        self.fallback.lock().expect("no one panics while holding the code").clone()
    }

    /// The keys of what runs, and of what runs again if that fails.
    pub fn claims(&self) -> impl Iterator<Item = Claim> + use<> {
        [Some(self.code()), self.fallback()].into_iter().flatten().map(|run| Claim::of(&run.reach))
    }

    /// Whether what runs publishes under a key or reads it, or what runs again if that fails.
    pub fn uses(&self, key: &KeyName) -> bool {
        let runs = [Some(self.code()), self.fallback()];
        runs.into_iter().flatten().any(|run| run.reach.keys().any(|used| used == key))
    }

    /// Lets other code go on between two entries; an order before it must have been obeyed. Who waits is told
    /// if the plugin has ended.
    pub fn order(&self, order: Order) {
        if let Some(slot) = self.order.lock().expect("no one panics while holding the order").as_mut() {
            *slot = Some(order);
        }
        self.mailbox.ring();
    }

    /// Wakes the plugin's thread, for it to see that it was told to stop, or what is in the log.
    pub fn wake(&self) {
        self.mailbox.ring();
    }
}
