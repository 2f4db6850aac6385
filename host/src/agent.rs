//! What a node runs beside its jobs: it says that the node is alive and what it has to spare, and what
//! happened to jobs, and lets no such notice be lost.
//!
//! ```text
//! the node's daemon
//!    │ notice, through the agent's socket
//! spool           on the disk before the answer; in order; bounded
//!    │ notice
//! sender          one at a time, until it is taken or refused for good
//!    │                       heartbeat   the machine's figures; never kept
//!    │                           │
//! way             a host's API, or a Kubo daemon
//! ```
//!
//! A notice bears the time when it was given, so that the job tracker orders it rightly although it
//! comes late; telling it twice changes nothing.

mod notice;
mod spool;
mod socket;
mod pending;
mod sender;
mod machine;
mod heartbeat;
mod way;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt as _;
use thiserror::Error;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

pub use socket::SOCKET;
pub use spool::SpoolError;

use crate::backend::kubo;
use crate::config::Topics;
use crate::contact::Contact;
use crate::ident::NodeId;
use crate::plugin::MESSAGE_BYTES;
use crate::store::Absent;
use crate::time::Timestamp;

use heartbeat::{Heartbeat, Said};
use machine::Machine;
use sender::Sender;
use socket::{Desk, Socket};
use spool::{Room, Spool, on_disk};
use way::Way;

/// Why an agent cannot start, or cannot go on.
#[derive(Debug, Error)]
pub enum AgentError {
    /// Its directory, or what lies in it.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// Its socket.
    #[error("cannot listen on the agent's socket {path}")]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The machine does not show its figures.
    #[error("cannot look at this machine: {0}")]
    Machine(String),
    /// A heartbeat would be larger than a message.
    #[error("a heartbeat with these models has {0} bytes; pubsub loses what is over {MESSAGE_BYTES}")]
    Models(usize),
    /// The client of a daemon.
    #[error("cannot make a client for the Kubo daemon")]
    Kubo(#[from] kubo::ClientError),
    /// A part of it ended by itself.
    #[error("a part of the agent ended: {0}")]
    Ended(String),
}

/// What an agent is.
#[derive(Debug)]
pub struct Options {
    /// Where it keeps what it could not send.
    pub dir: PathBuf,
    /// What happens where that is missing although an agent has run there.
    pub absent: Absent,
    /// Who it speaks for.
    pub node: NodeId,
    /// How often it sends a heartbeat.
    pub every: Duration,
    /// The models that the node holds.
    pub models: Vec<String>,
    /// What is said where.
    pub topics: Topics,
    /// To whom it speaks.
    pub to: To,
}

/// To whom an agent speaks.
#[derive(Clone, Debug)]
pub enum To {
    /// A host, through its API.
    Host(dim_client::Client),
    /// Whoever listens, through a Kubo daemon.
    Kubo(kubo::Settings),
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    /// Where its socket is.
    pub socket: PathBuf,
    /// Whom it tells.
    pub to: String,
    spool: Arc<Spool>,
    stop: CancellationToken,
    parts: JoinSet<std::io::Result<()>>,
}

impl Agent {
    /// Starts an agent; its socket answers when this returns. Whom it tells need not be there.
    pub async fn start(options: Options) -> Result<Self, AgentError> {
        let machine = Machine::new().map_err(|error| AgentError::Machine(format!("{error:?}")))?;
        let machine = checked(&options, machine).await?;
        let way = way(&options)?;
        let (dir, absent) = (options.dir.clone(), options.absent);
        let spool = tokio::task::spawn_blocking(move || Spool::open(&dir, Room::default(), absent));
        let spool = Arc::new(spool.await.expect("the spool does not panic")?);
        let socket = Socket::listen(&options.dir)
            .map_err(|source| AgentError::Socket { path: options.dir.join(SOCKET), source })?;
        let (notices, heartbeats) = (Contact::new("notices"), Contact::new("heartbeats"));
        let desk = Desk {
            node: options.node.clone(),
            instance: heartbeat::new_instance(),
            way: way.clone(),
            spool: spool.clone(),
            notices: Arc::new(notices),
            heartbeats: Arc::new(heartbeats),
            beat: Arc::new(Mutex::new(None)),
            every: options.every,
            started: Timestamp::wall(),
        };
        let mut agent = Self {
            socket: socket.path().to_owned(),
            to: way.address(),
            spool,
            stop: CancellationToken::new(),
            parts: JoinSet::new(),
        };
        agent.run(socket, Arc::new(desk), options, machine);
        Ok(agent)
    }

    fn run(&mut self, socket: Socket, desk: Arc<Desk>, options: Options, machine: Machine) {
        let sender =
            Sender { spool: self.spool.clone(), way: desk.way.clone(), contact: desk.notices.clone() };
        let heartbeat = Heartbeat {
            node: options.node,
            instance: desk.instance.clone(),
            models: options.models,
            every: options.every,
            way: desk.way.clone(),
            contact: desk.heartbeats.clone(),
            last: desk.beat.clone(),
        };
        let stop = || self.stop.child_token();
        let (sending, beating) = (sender.run(stop()), heartbeat.run(machine, stop()));
        let serving = socket.serve(desk, stop());
        self.parts.spawn(sending.map(Ok));
        self.parts.spawn(beating.map(Ok));
        self.parts.spawn(serving);
    }

    /// Waits until a part of it ends by itself, which none should. Cancel safe.
    pub async fn ended(&mut self) -> AgentError {
        match self.parts.join_next().await {
            Some(end) => AgentError::Ended(words(end)),
            None => AgentError::Ended("nothing is left of it".to_owned()),
        }
    }

    /// Ends the agent; returns how many notices the next one will find.
    pub async fn shutdown(mut self) -> Result<u64, AgentError> {
        self.stop.cancel();
        while self.parts.join_next().await.is_some() {}
        Ok(on_disk(&self.spool, Spool::contents).await?.waiting)
    }
}

fn words(end: Result<std::io::Result<()>, JoinError>) -> String {
    match end {
        Ok(Ok(())) => "without a reason".to_owned(),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => panic.to_string(),
    }
}

fn way(options: &Options) -> Result<Arc<dyn Way>, AgentError> {
    let (node, topics) = (options.node.clone(), options.topics.clone());
    Ok(match &options.to {
        To::Host(client) => Arc::new(way::Api { client: client.clone(), node, topics }),
        To::Kubo(settings) => Arc::new(way::Kubo { backend: kubo::backend(settings)?, node, topics }),
    })
}

/// A machine whose heartbeat is no larger than a message, whatever the models are.
async fn checked(options: &Options, mut machine: Machine) -> Result<Machine, AgentError> {
    let look = tokio::task::spawn_blocking(move || (machine.look(), machine));
    let (resources, machine) = look.await.expect("a look at the machine does not panic");
    let instance = heartbeat::new_instance();
    let Options { node, every, models, .. } = options;
    let said = Said { node, instance: &instance, every: *every, models };
    let length = heartbeat::message(&said, Timestamp::wall(), &resources).len();
    if length > MESSAGE_BYTES { Err(AgentError::Models(length)) } else { Ok(machine) }
}
