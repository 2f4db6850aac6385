//! Owns the backend of a Kubo daemon. It receives settings and returns a backend that uses the daemon's HTTP RPC.

mod address;
mod content;
mod names;
mod pubsub;
mod rpc;
mod swarm;

use std::sync::Arc;

use secrecy::SecretString;
use thiserror::Error;

pub use address::{Address, AddressError};

use crate::Backend;
use dim_model::connectivity::Connectivity;
use rpc::Rpc;

/// The settings of the connection to a daemon.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The address of its RPC.
    pub address: Address,
    /// The value of the header `Authorization`, as in Kubo's `API.Authorizations`.
    pub authorization: Option<SecretString>,
}

/// The error of making a client.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The HTTP client cannot be made.
    #[error("cannot make an HTTP client")]
    Http(#[from] reqwest::Error),
    /// The authorization is not a valid value of a header.
    #[error("the authorization contains characters that an HTTP header cannot contain")]
    Authorization,
}

/// Makes the backend. The daemon need not run yet.
pub fn backend(settings: &Settings) -> Result<Backend, ClientError> {
    let rpc = Arc::new(Rpc::new(settings)?);
    Ok(Backend {
        name: "kubo",
        address: settings.address.to_string(),
        content: Arc::new(content::Files::new(rpc.clone())),
        names: Arc::new(names::Names::new(rpc.clone())),
        pubsub: Arc::new(pubsub::Topics::new(rpc.clone())),
        swarm: Arc::new(swarm::Connections::new(rpc)),
        network: true,
        connectivity: Arc::new(Connectivity::new("calls of the daemon")),
    })
}
