//! Owns the admission of connections. Callers that sent an authorised request share one number of places, and
//! connections without an authorised request, the strangers, share another, smaller one. Probes of the host's health
//! need no place and are answered under any load.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use rand::RngExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::ApiError;

/// The maximum number of strangers. A further stranger replaces a random one, so a caller that sends an authorised
/// request at once is rarely hit.
const STRANGERS: usize = 64;

/// The time after which a stranger is disconnected.
const PATIENCE: Duration = Duration::from_secs(5);

/// The maximum number of callers that wait for a place. Further ones are refused.
const WAITING: usize = 256;

/// The paths of the probes of the host's health.
const PROBES: [&str; 3] = ["/livez", "/readyz", "/healthz"];

/// The places of an API.
#[derive(Clone, Debug)]
pub struct Admission {
    room: Room,
    strangers: Arc<Mutex<Vec<Weak<Caller>>>>,
}

/// The places of known callers, and the limit on those that wait for one.
#[derive(Clone, Debug)]
struct Room {
    places: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

impl Admission {
    /// Makes places for `most` known callers.
    pub fn new(most: usize) -> Self {
        let room =
            Room { places: Arc::new(Semaphore::new(most)), waiting: Arc::new(Semaphore::new(WAITING)) };
        Self { room, strangers: Arc::default() }
    }

    /// Admits a new connection as a stranger, which may replace another stranger.
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
    /// Its place among the known callers.
    held: Mutex<Option<OwnedSemaphorePermit>>,
    /// Cancelled when another stranger replaces it.
    let_go: CancellationToken,
}

/// The place of a connection. It is released with its last clone.
#[derive(Clone, Debug)]
pub struct Place {
    room: Room,
    caller: Arc<Caller>,
}

impl Place {
    /// Makes the caller known and waits for a place. Returns an error if too many callers wait already.
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

    /// Returns when the caller has been a stranger for too long, or when another one replaces it. Never returns for a
    /// known caller.
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

/// Lets a caller with an authorised request wait for a place, unless it is a probe.
pub async fn enter(request: Request, next: Next) -> Result<Response, ApiError> {
    if !PROBES.contains(&request.uri().path())
        && let Some(place) = request.extensions().get::<Place>().cloned()
    {
        place.enter().await?;
    }
    Ok(next.run(request).await)
}
