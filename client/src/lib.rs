//! The client of a `dim` host, for programs that are no host themselves: it opens no store and runs no
//! plugin, it talks to the host's HTTP API.
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
pub use pubsub::{Message, Origin, Pubsub, Subscription, Topic};

/// Chooses who does the cryptography of TLS, once for the process.
pub fn install_tls() {
    // Another part of the process may have chosen already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A client of one host. Cheap to clone; clones share their connections and end together.
#[derive(Clone, Debug)]
pub struct Client {
    http: Http,
    stop: CancellationToken,
}

impl Client {
    /// A client for the host at `address`, which need not be there yet.
    pub fn new(address: Address) -> Result<Self, ClientError> {
        Ok(Self { http: Http::new(address)?, stop: CancellationToken::new() })
    }

    /// A client that shows a token, which a host asks for over TCP.
    pub fn with_token(address: Address, token: Option<&SecretString>) -> Result<Self, ClientError> {
        Ok(Self { http: Http::with_token(address, token)?, stop: CancellationToken::new() })
    }

    /// The API itself, for what has no call of its own.
    pub fn http(&self) -> &Http {
        &self.http
    }

    /// Names.
    pub fn ipns(&self) -> Ipns {
        Ipns::new(self.http.clone())
    }

    /// Topics.
    pub fn pubsub(&self) -> Pubsub {
        Pubsub::new(self.http.clone(), self.stop.clone())
    }

    /// Jobs and nodes.
    pub fn fleet(&self) -> Fleet {
        Fleet::new(self.http.clone(), self.pubsub(), self.stop.clone())
    }

    /// Ends all subscriptions.
    pub fn stop(&self) {
        self.stop.cancel();
    }
}
