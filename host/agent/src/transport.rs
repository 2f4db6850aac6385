//! Owns the interface of the transports. A transport receives notices and heartbeats, sends them to a host or a
//! daemon, and returns whether they were accepted.

mod api;
mod kubo;

use std::fmt::Debug;
use std::time::Duration;

use async_trait::async_trait;
use dim_model::ident::Topic;
use dim_network::lone_writer::Progress;
use thiserror::Error;

use crate::notice::Notice;

pub use api::Api;
pub use kubo::Kubo;

/// A connection to the receivers of notices and heartbeats.
#[async_trait]
pub trait Transport: Debug + Send + Sync + 'static {
    /// Returns the address, for the operator.
    fn address(&self) -> String;

    /// Sends a notice. The sender calls it for one notice at a time, and may call it again for the same notice, which
    /// must do no harm.
    async fn tell(&self, notice: &Notice) -> Result<Answer, Undelivered>;

    /// Sends a heartbeat. It is never called twice with the same heartbeat.
    async fn beat(&self, heartbeat: String) -> Result<(), Undelivered>;

    /// Returns the pauses before a notice is sent again. It is empty if the first answer proves the delivery.
    fn repeats(&self) -> &'static [Duration];

    /// Returns what became of the notices that were published on a topic since the start.
    async fn progress(&self, topic: &Topic) -> Progress;

    /// Returns the time within which a published notice is usually acknowledged.
    async fn acknowledged_within(&self) -> Duration;

    /// Checks that a receiver exists. The sender calls it at intervals while notices must be repeated.
    async fn audience(&self) -> Result<(), Undelivered>;
}

/// The answer to a notice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The notice was accepted.
    Taken,
    /// The notice was published on a reliable topic. It is accepted once the receipt is acknowledged.
    Published(Receipt),
    /// The notice was finally refused, with the reason.
    Refused(String),
}

/// The place of a published notice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The topic.
    pub topic: Topic,
    /// The number of the notice among those of the topic since the start.
    pub number: u64,
    /// The time after which the notice is published again if it is not acknowledged.
    pub again: Duration,
}

/// The error of a notice or heartbeat that was not sent. A later call may succeed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Undelivered {
    /// There is no receiver.
    #[error("{0}")]
    Away(String),
    /// This notice was not accepted; another one may be.
    #[error("{0}")]
    NotNow(String),
}
