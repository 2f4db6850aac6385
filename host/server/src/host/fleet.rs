//! Owns the fleet of a host: which one it is at the start, and the change to another one while the host runs.

use std::time::Duration;

use dim_model::ident::IpnsName;
use dim_network::reliable_topics::{Identity, IdentityError, JoinError, has_roster, keys_line};
use dim_store::commit::CommitError;
use dim_store::{Store, StoreError, topic_rows};
use thiserror::Error;

use super::Host;
use crate::config::FleetConfig;

/// The time for which a join waits for events that are being sent.
const PATIENCE: Duration = Duration::from_secs(10);

/// The pause between attempts to join.
const AGAIN: Duration = Duration::from_millis(100);

/// A fleet that a host has joined.
#[derive(Clone, Debug)]
pub struct JoinedFleet {
    /// The public keys of the host, for an admin of the fleet.
    pub line: String,
    /// Whether the host has reliable topics.
    pub has_reliable_topics: bool,
}

/// The reason why a host does not join a fleet.
#[derive(Debug, Error)]
pub enum JoinFleetError {
    /// The config names another fleet.
    #[error(
        "the config of the host names the fleet {0}: remove `fleet.name`, or set it to the name of the new fleet, and restart the host"
    )]
    Configured(String),
    /// The host belongs to another fleet with a roster.
    #[error("the host belongs to the fleet {0}: `dim fleet join --leave` leaves it")]
    Joined(String),
    /// Events of the present fleet are not sent yet.
    #[error(transparent)]
    Unsent(#[from] JoinError),
    /// The keys of the host cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The store failed.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The host stops.
    #[error("the host is shutting down")]
    Stopping,
}

/// The fleet of a host at its start: that of the config, else the one that it has joined.
pub(super) fn of_start(config: &FleetConfig, store: &Store) -> Result<String, StoreError> {
    if config.name.is_stated() {
        return Ok(config.name.to_string());
    }
    let joined = topic_rows::fleet(store)?.filter(|fleet| has_roster(fleet));
    Ok(joined.unwrap_or_else(|| config.name.to_string()))
}

impl Host {
    /// Joins a fleet with a roster: the reliable topics of the host are those of the fleet from now on, also after a
    /// restart. The host is a member once an admin has added its keys, which the result has. `leaves` allows it to leave
    /// another fleet with a roster.
    pub async fn join_fleet(&self, fleet: &IpnsName, leaves: bool) -> Result<JoinedFleet, JoinFleetError> {
        let configured = self.config.now().fleet.clone();
        if configured.name.is_stated() && configured.name.as_str() != fleet.as_str() {
            return Err(JoinFleetError::Configured(configured.name.to_string()));
        }
        // One after the other.
        let _turn = self.exchange.joins.lock().await;
        let reliable = &self.exchange.links.reliable;
        let present = reliable.channels().fleet().to_owned();
        if has_roster(&present) && present != fleet.as_str() && !leaves {
            return Err(JoinFleetError::Joined(present));
        }
        if present != fleet.as_str() {
            self.switch_to(fleet).await?;
        }
        let line = keys_line(&self.storage.keys)?;
        Ok(JoinedFleet { line, has_reliable_topics: reliable.is_used() })
    }

    /// Lets the driver of reliable topics continue in another fleet, once the events of the present one are sent.
    async fn switch_to(&self, fleet: &IpnsName) -> Result<(), JoinFleetError> {
        let until = tokio::time::Instant::now() + PATIENCE;
        loop {
            let (keys, name) = (self.storage.keys.clone(), fleet.to_string());
            let now = self.storage.log.clock().wall();
            let identity = tokio::task::spawn_blocking(move || Identity::new(&keys, &name, now));
            let identity = identity.await.expect("reading keys does not panic")?;
            let joined = self.exchange.links.reliable.join(identity).await;
            match joined.ok_or(JoinFleetError::Stopping)? {
                Ok(()) => return Ok(()),
                Err(_) if tokio::time::Instant::now() < until => tokio::time::sleep(AGAIN).await,
                Err(why) => return Err(why.into()),
            }
        }
    }
}
