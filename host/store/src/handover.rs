//! Owns the part of a batch about the plugin's code: the takeover by new code, or the rollback of failed code.

use std::sync::Mutex;

use dim_model::entry::{Generation, Offset};
use dim_model::ident::{IpnsName, KeyName};
use thiserror::Error;
use tokio::sync::oneshot;

use crate::change::{Change, Pause};
use crate::plugin_registry::{Claim, Code, Setup};
use crate::probation::Rates;

/// The result of a takeover: the committed takeover, or the reason why the old code stays.
pub type Succession = Result<TakenOver, StartFailure>;

/// The reason why code does not start: the error that its `start` returned, or the trap that ended the call. It is
/// the text that the log records.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct StartFailure(pub String);

/// A takeover of new code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TakenOver {
    /// The first entry that the new code handles.
    pub at: Offset,
    /// The time in which the plugin handled nothing.
    pub pause: Pause,
}

/// The takeover of new code in a batch.
#[derive(Debug)]
pub struct Handover {
    /// The new code, as the store records it.
    pub code: Code,
    /// The source that the code follows, if it comes from a source that changes.
    pub follows: Option<String>,
    /// The plugin's settings beside the config.
    pub setup: Setup,
    /// The keys that the plugin owns.
    pub claim: Claim,
    /// The record of the change.
    pub change: Change,
    /// The measurements of the code before.
    pub rates: Rates,
    /// The takeover that becomes durable with the batch.
    pub taken_over: TakenOver,
    /// The caller that waits for the result; `None` once it has received it.
    pub waiting: Mutex<Option<oneshot::Sender<Succession>>>,
}

impl Handover {
    /// Reports the durable takeover to the waiting caller.
    pub fn tell(&self) {
        self.end(Ok(self.taken_over));
    }

    /// Sends the result to the waiting caller.
    pub fn end(&self, succession: Succession) {
        if let Some(done) = self.waiting.lock().expect("no one panics while holding it").take() {
            // The caller may have disconnected.
            let _ = done.send(succession);
        }
    }
}

/// The rollback to a checkpoint in a batch.
#[derive(Debug)]
pub struct TakeBack {
    /// The first generation whose effects are reverted.
    pub to: Generation,
    /// Whether the cause is a failed probation (true) or an order of the operator (false).
    pub is_verdict: bool,
    /// The reason for the record.
    pub reason: String,
    /// The code that runs after the rollback, as the store records it.
    pub code: Code,
    /// The plugin's own keys and their names.
    pub own: Vec<(KeyName, IpnsName)>,
}
