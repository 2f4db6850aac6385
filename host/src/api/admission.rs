//! Owns how many connections an API has at a time: those of callers that are known, and apart from them a few of
//! strangers, who have not asked yet for anything that they may ask for. What asks after the host's health needs no
//! place: it is answered however many others are there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use rand::RngExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::ApiError;

/// Most connections of strangers at a time. One more comes in the place of any of them: whoever shows at once that it
/// may ask is rarely hit, whatever others do.
const STRANGERS: usize = 64;

/// How long a stranger may take to show that it may ask.
const PATIENCE: Duration = Duration::from_secs(5);

/// Most callers that wait for a place among those who are known; one more is refused.
const WAITING: usize = 256;

/// What asks after the health of the host.
const PROBES: [&str; 3] = ["/livez", "/readyz", "/healthz"];

/// The room of an API.
#[derive(Clone, Debug)]
pub struct Admission {
    room: Room,
    strangers: Arc<Mutex<Vec<Weak<Caller>>>>,
}

/// The places of those who are known, and of those of them who wait for one.
#[derive(Clone, Debug)]
struct Room {
    places: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

impl Admission {
    /// Room for `most` callers that have shown that they may ask.
    pub fn new(most: usize) -> Self {
        let room =
            Room { places: Arc::new(Semaphore::new(most)), waiting: Arc::new(Semaphore::new(WAITING)) };
        Self { room, strangers: Arc::default() }
    }

    /// Takes in a connection that has come: a stranger, if need be in the place of another.
    pub fn let_in(&self) -> Place {
        let place = Place { room: self.room.clone(), caller: Arc::default() };
        let mut strangers = self.strangers.lock().expect("nobody panics with it");
        let is_stranger = |caller: Arc<Caller>| !caller.is_known.load(Ordering::Relaxed);
        strangers.retain(|other| other.upgrade().is_some_and(is_stranger));
        if strangers.len() >= STRANGERS {
            let any = rand::rng().random_range(0..strangers.len());
            if let Some(other) = strangers.swap_remove(any).upgrade() {
                other.let_go.cancel();
            }
        }
        strangers.push(Arc::downgrade(&place.caller));
        place
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

/// The place of a connection; it is free again with the last that holds it.
#[derive(Clone, Debug)]
pub struct Place {
    room: Room,
    caller: Arc<Caller>,
}

impl Place {
    /// Gives the caller, who has shown that it may ask, a place among its like; waits until there is one. An error if
    /// too many wait already.
    async fn enter(&self) -> Result<(), ApiError> {
        if self.caller.is_known.load(Ordering::Relaxed) {
            return Ok(());
        }
        let _waiting = self.room.waiting.try_acquire().map_err(|_| {
            ApiError::unavailable(format!("{WAITING} callers wait for one of the API's connections already"))
        })?;
        self.caller.is_known.store(true, Ordering::Relaxed);
        let place = self.room.places.clone().acquire_owned().await.expect("it is never closed");
        *self.caller.held.lock().expect("nobody panics with it") = Some(place);
        Ok(())
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

/// Lets whoever may ask wait for a place, unless it asks after the health of the host.
pub async fn enter(request: Request, next: Next) -> Result<Response, ApiError> {
    if !PROBES.contains(&request.uri().path())
        && let Some(place) = request.extensions().get::<Place>().cloned()
    {
        place.enter().await?;
    }
    Ok(next.run(request).await)
}
