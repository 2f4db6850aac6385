//! Owns how many connections an API has at a time: those of callers that are known, and apart from them a few of
//! strangers, who have not shown yet that they may ask.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use rand::RngExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// Most connections of strangers at a time. One more comes in the place of any of them: whoever shows at once that it
/// may ask is rarely hit, whatever others do.
const STRANGERS: usize = 64;

/// How long a stranger may take to show that it may ask.
const PATIENCE: Duration = Duration::from_secs(5);

/// The room of an API.
#[derive(Clone, Debug)]
pub struct Admission {
    /// For those who are known.
    room: Arc<Semaphore>,
    /// Those who are not. Absent: whoever can connect is known.
    strangers: Option<Arc<Mutex<Vec<Weak<Caller>>>>>,
}

impl Admission {
    /// Room for `most` callers, whoever can connect.
    pub fn for_all(most: usize) -> Self {
        Self { room: Arc::new(Semaphore::new(most)), strangers: None }
    }

    /// Room for `most` callers that have shown that they may ask.
    pub fn for_known(most: usize) -> Self {
        Self { strangers: Some(Arc::default()), ..Self::for_all(most) }
    }

    /// The place of the next connection, as soon as there is one.
    pub async fn next(&self) -> Place {
        let caller = Arc::new(Caller::default());
        if self.strangers.is_none() {
            caller.take(self.room.clone()).await;
        }
        Place { room: self.room.clone(), caller }
    }

    /// Takes in that the connection has come: a stranger, if need be in the place of another.
    pub fn let_in(&self, place: &Place) {
        let Some(strangers) = &self.strangers else { return };
        let mut strangers = strangers.lock().expect("nobody panics with it");
        let is_stranger = |caller: Arc<Caller>| !caller.is_known.load(Ordering::Relaxed);
        strangers.retain(|other| other.upgrade().is_some_and(is_stranger));
        if strangers.len() >= STRANGERS {
            let any = rand::rng().random_range(0..strangers.len());
            if let Some(other) = strangers.swap_remove(any).upgrade() {
                other.let_go.cancel();
            }
        }
        strangers.push(Arc::downgrade(&place.caller));
    }
}

#[derive(Debug, Default)]
struct Caller {
    is_known: AtomicBool,
    /// Its place among those who are known.
    held: Mutex<Option<OwnedSemaphorePermit>>,
    /// Another has its place.
    let_go: CancellationToken,
}

impl Caller {
    async fn take(&self, room: Arc<Semaphore>) {
        self.is_known.store(true, Ordering::Relaxed);
        let place = room.acquire_owned().await.expect("it is never closed");
        *self.held.lock().expect("nobody panics with it") = Some(place);
    }
}

/// The place of a connection; it is free again with the last that holds it.
#[derive(Clone, Debug)]
pub struct Place {
    room: Arc<Semaphore>,
    caller: Arc<Caller>,
}

impl Place {
    /// Gives the caller, who has shown that it may ask, a place among its like; waits until there is one.
    pub async fn enter(&self) {
        if !self.caller.is_known.load(Ordering::Relaxed) {
            self.caller.take(self.room.clone()).await;
        }
    }

    /// Returns once the caller has been a stranger for too long, or when another takes its place.
    pub async fn overstayed(&self) {
        tokio::select! {
            biased;
            () = self.caller.let_go.cancelled() => {}
            () = tokio::time::sleep(PATIENCE) => {}
        }
        if self.caller.is_known.load(Ordering::Relaxed) {
            std::future::pending().await
        }
    }
}
