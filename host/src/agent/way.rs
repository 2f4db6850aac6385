//! The ways out of the machine: who is told of notices and heartbeats, and what counts as told.

mod api;
mod kubo;

use std::fmt::Debug;
use std::time::Duration;

use async_trait::async_trait;
use thiserror::Error;

use super::notice::Notice;

pub use api::Api;
pub use kubo::Kubo;

/// Someone to tell.
#[async_trait]
pub trait Way: Debug + Send + Sync + 'static {
    /// Where it leads, for the operator.
    fn address(&self) -> String;

    /// Tells a notice. Called for one at a time, and again for one that was told: that must do no harm.
    async fn tell(&self, notice: &Notice) -> Result<Answer, Untold>;

    /// Sends a heartbeat. Never called again with the same one.
    async fn beat(&self, heartbeat: String) -> Result<(), Untold>;

    /// Pauses after which a notice is told once more. None where the first answer is proof.
    fn repeats(&self) -> &'static [Duration];

    /// Fails if nobody could have heard a notice. Asked now and then while there are repeats to come.
    async fn audience(&self) -> Result<(), Untold>;
}

/// What a notice that was told has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was taken.
    Taken,
    /// It is refused for good; the reason.
    Refused(String),
}

/// Why something was not told; it may be later.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Untold {
    /// There is nobody to tell anything.
    #[error("{0}")]
    Away(String),
    /// This one was not taken; another may be.
    #[error("{0}")]
    NotNow(String),
}
