//! The client of a `dim` host, for programs that are not hosts. It uses the HTTP API of a host; it opens no
//! store and runs no plugin.
//!
//! ```no_run
//! use dim_client::{Client, JobUpdate};
//!
//! # async fn work() -> Result<(), dim_client::ClientError> {
//! let client = Client::new("unix:/var/lib/dim/api.sock".parse()?)?;
//!
//! let running = JobUpdate::new("running").data(serde_json::json!({ "node_id": "n1" }));
//! client.fleet().update_job_status("render-7", &running).await?;
//!
//! let mut updates = client.fleet().subscribe_to_job_updates().await?;
//! while let Some(job) = updates.next().await.transpose()? {
//!     println!("{} is {}", job.job_id, job.status);
//!     if job.status == "completed" {
//!         break;
//!     }
//! }
//!
//! let registry = client.ipns().get_state("dim-state-key").await?;
//! println!("the published registry has {} bytes", registry.len());
//! client.stop();
//! # Ok(())
//! # }
//! ```

mod address;
mod error;
mod fleet;
mod http;
mod ipns;
mod mask;
mod pubsub;

use secrecy::SecretString;
use tokio_util::sync::CancellationToken;

pub use address::{Address, SOCKET, TOKEN};
pub use error::{ClientError, Problem};
pub use fleet::{Fleet, Job, JobUpdate, Node, NodeDead};
pub use http::{Http, MAX_BODY, ServerEvent};
pub use ipns::{Ipns, Published, Resolution};
pub use mask::masked;
pub use pubsub::{Beginning, EventIdentity, Message, Origin, Pubsub, Subscription, Topic};

/// Installs the TLS crypto provider of the process. Has no effect if one is already installed.
pub fn install_tls() {
    // The error means that another part of the process has installed a provider.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A client of one host. Cheap to clone. Clones share connections, and [`Client::stop`] affects all of them.
#[derive(Clone, Debug)]
pub struct Client {
    http: Http,
    stop: CancellationToken,
}

impl Client {
    /// Creates a client of the host at `address`, without a token. The host does not need to run yet.
    pub fn new(address: Address) -> Result<Self, ClientError> {
        Ok(Self { http: Http::new(address)?, stop: CancellationToken::new() })
    }

    /// Creates a client that sends a token. A host requires the token over TCP.
    pub fn with_token(address: Address, token: Option<&SecretString>) -> Result<Self, ClientError> {
        Ok(Self { http: Http::with_token(address, token)?, stop: CancellationToken::new() })
    }

    /// Returns the HTTP client, for calls that have no method here.
    pub fn http(&self) -> &Http {
        &self.http
    }

    /// Returns the access to IPNS names.
    pub fn ipns(&self) -> Ipns {
        Ipns::new(self.http.clone())
    }

    /// Returns the access to topics.
    pub fn pubsub(&self) -> Pubsub {
        Pubsub::new(self.http.clone(), self.stop.clone())
    }

    /// Returns the access to jobs and nodes.
    pub fn fleet(&self) -> Fleet {
        Fleet::new(self.http.clone(), self.pubsub(), self.stop.clone())
    }

    /// Ends all subscriptions of this client and its clones.
    pub fn stop(&self) {
        self.stop.cancel();
    }
}
