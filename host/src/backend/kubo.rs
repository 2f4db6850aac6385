//! The backend that is a Kubo daemon, over its HTTP RPC.

mod address;
mod content;
mod names;
mod pubsub;
mod rpc;

use std::sync::Arc;

use secrecy::SecretString;
use thiserror::Error;

pub use address::{Address, AddressError};

use super::Backend;
use crate::contact::Contact;
use rpc::Rpc;

/// How to reach a daemon.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where its RPC is.
    pub address: Address,
    /// What is sent as `Authorization`, as in Kubo's `API.Authorizations`.
    pub authorization: Option<SecretString>,
}

/// Why a client cannot be made.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The HTTP client cannot be made.
    #[error("cannot make an HTTP client")]
    Http(#[from] reqwest::Error),
    /// Not a header's value.
    #[error("the authorization holds characters that a header cannot")]
    Authorization,
}

/// Makes the backend. The daemon need not be there.
pub fn backend(settings: &Settings) -> Result<Backend, ClientError> {
    let rpc = Arc::new(Rpc::new(settings)?);
    Ok(Backend {
        name: "kubo",
        address: settings.address.to_string(),
        content: Arc::new(content::Files::new(rpc.clone())),
        names: Arc::new(names::Names::new(rpc.clone())),
        pubsub: Arc::new(pubsub::Topics::new(rpc)),
        network: true,
        contact: Arc::new(Contact::new("calls of the daemon")),
    })
}
