//! Owns how many connections an API has at a time: those of callers that are known, and apart from them a few of
//! strangers, who have not shown yet that they may ask.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Most connections of strangers at a time; one more waits.
const STRANGERS: usize = 64;

/// How long a stranger may take to show that it may ask.
const PATIENCE: Duration = Duration::from_secs(5);

/// The room of an API.
#[derive(Clone, Debug)]
pub struct Admission {
    /// For those who are known.
    room: Arc<Semaphore>,
    /// For those who are not. Absent: whoever can connect is known.
    porch: Option<Arc<Semaphore>>,
}

impl Admission {
    /// Room for `most` callers, whoever can connect.
    pub fn for_all(most: usize) -> Self {
        Self { room: Arc::new(Semaphore::new(most)), porch: None }
    }

    /// Room for `most` callers that have shown that they may ask.
    pub fn for_known(most: usize) -> Self {
        Self { porch: Some(Arc::new(Semaphore::new(STRANGERS))), ..Self::for_all(most) }
    }

    /// The place of the next connection, as soon as there is one.
    pub async fn next(&self) -> Place {
        let held = take(self.porch.as_ref().unwrap_or(&self.room)).await;
        let caller = Caller { is_known: self.porch.is_none().into(), held: Mutex::new(held) };
        Place { room: self.room.clone(), caller: Arc::new(caller) }
    }
}

async fn take(places: &Arc<Semaphore>) -> OwnedSemaphorePermit {
    places.clone().acquire_owned().await.expect("it is never closed")
}

#[derive(Debug)]
struct Caller {
    is_known: AtomicBool,
    held: Mutex<OwnedSemaphorePermit>,
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
        if !self.caller.is_known.swap(true, Ordering::Relaxed) {
            let place = take(&self.room).await;
            *self.caller.held.lock().expect("nobody panics with it") = place;
        }
    }

    /// Returns once the caller has been a stranger for too long.
    pub async fn overstayed(&self) {
        tokio::time::sleep(PATIENCE).await;
        if self.caller.is_known.load(Ordering::Relaxed) {
            std::future::pending().await
        }
    }
}
