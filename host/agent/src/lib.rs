//! The agent of a node. It receives job notices from the node's programs and reads the machine's figures. It sends
//! notices and heartbeats to a host or a Kubo daemon, and loses no accepted notice.
//!
//! ```text
//! a program of the node
//!    │ notice, through the agent's socket
//! spool           on the disk before the answer; in order; bounded
//!    │ notice
//! sender          one at a time, until it is accepted or finally refused
//!    │                       heartbeat   the machine's figures; never stored
//!    │                           │
//! transport       a host's API, or a Kubo daemon
//! ```
//!
//! Over a daemon the agent is a writer of its own on the topics that are reliable: a notice is delivered once another
//! member of the fleet has it on its disk.
//!
//! A notice has the time at which it was given, so that the job tracker orders it correctly although it arrives late.
//! Sending it again changes nothing.

mod notice;
mod spool;
mod socket;
mod notice_order;
mod sender;
mod machine;
mod heartbeat;
mod transport;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cap_std::ambient_authority;
use cap_std::fs::Dir;
use futures::FutureExt as _;
use thiserror::Error;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

pub use socket::SOCKET;
pub use spool::SpoolError;

use dim_ipfs::keys::Keyring;
use dim_ipfs::kubo;
use dim_model::connectivity::Connectivity;
use dim_model::ident::NodeId;
use dim_model::time::{Clock, Timestamp};
use dim_network::lone_writer::{self, LoneWriter, Tasks};
use dim_network::reliable_topics::{Deliveries, IdentityError, ReliableTopic, reliable_topic};
use dim_server::config::Topics;
use dim_store::Absent;
use dim_store::plugin_limits::MESSAGE_BYTES;

use heartbeat::{Heartbeat, Said};
use machine::Machine;
use sender::Sender;
use socket::{Desk, Socket};
use spool::{Room, Spool, on_disk};
use transport::Transport;

/// The name of the directory for reliable topics inside an agent's directory.
const WRITER: &str = "writer";

/// The error that ends an agent or its start.
#[derive(Debug, Error)]
pub enum AgentError {
    /// The agent's directory or a file in it cannot be used.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The agent cannot listen on its socket.
    #[error("cannot listen on the agent's socket {path}")]
    Socket {
        /// The path of the socket.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The figures of the machine cannot be read.
    #[error("cannot read the figures of this machine: {0}")]
    Machine(String),
    /// A heartbeat would exceed the maximum size of a message.
    #[error("a heartbeat with these models has {0} bytes; pubsub allows {MESSAGE_BYTES}")]
    Models(usize),
    /// The client for a Kubo daemon cannot be made.
    #[error("cannot make a client for the Kubo daemon")]
    Kubo(#[from] kubo::ClientError),
    /// The store for reliable topics cannot be opened.
    #[error("cannot write reliable topics")]
    Writer(#[from] lone_writer::OpenError),
    /// A task of the agent ended by itself.
    #[error("a part of the agent ended: {0}")]
    Ended(String),
}

/// The options of an agent.
#[derive(Debug)]
pub struct Options {
    /// The directory with the spool and the socket.
    pub dir: PathBuf,
    /// The behaviour if the spool is missing although an agent has run there.
    pub absent: Absent,
    /// The node of the agent.
    pub node: NodeId,
    /// The time between two heartbeats.
    pub every: Duration,
    /// The models that the node has.
    pub models: Vec<String>,
    /// The topics of notices and heartbeats.
    pub topics: Topics,
    /// The receiver.
    pub to: To,
    /// The clock that measures pauses: the machine, except in tests of time.
    pub clock: Arc<dyn Clock>,
}

/// The receiver of notices and heartbeats.
#[derive(Clone, Debug)]
pub enum To {
    /// A host, over its API.
    Host(dim_client::Client),
    /// The subscribers of the topics, through a Kubo daemon.
    Kubo(ToKubo),
}

/// A Kubo daemon as the receiver.
#[derive(Clone, Debug)]
pub struct ToKubo {
    /// The daemon.
    pub settings: kubo::Settings,
    /// The name of the fleet.
    pub fleet: String,
    /// The delivery of the topics. The agent is a writer of its own on reliable ones.
    pub deliveries: Deliveries,
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    /// The path of its socket.
    pub socket: PathBuf,
    /// The address of the receiver, for the operator.
    pub to: String,
    spool: Arc<Spool>,
    stop: CancellationToken,
    parts: JoinSet<std::io::Result<()>>,
}

impl Agent {
    /// Starts an agent. Its socket answers when this returns. The receiver need not be reachable.
    pub async fn start(options: Options) -> Result<Self, AgentError> {
        let machine = Machine::new().map_err(|error| AgentError::Machine(format!("{error:?}")))?;
        let machine = checked(&options, machine).await?;
        let (dir, absent) = (options.dir.clone(), options.absent);
        let spool = tokio::task::spawn_blocking(move || Spool::open(&dir, Room::default(), absent));
        let spool = Arc::new(spool.await.expect("the spool does not panic")?);
        // The spool has the lock of the directory.
        let (transport, writing) = transport(&options).await?;
        let socket = Socket::listen(&options.dir)
            .map_err(|source| AgentError::Socket { path: options.dir.join(SOCKET), source })?;
        let (notices, heartbeats) = (Connectivity::new("notices"), Connectivity::new("heartbeats"));
        let desk = Desk {
            node: options.node.clone(),
            instance: heartbeat::new_instance(),
            transport: transport.clone(),
            spool: spool.clone(),
            notices: Arc::new(notices),
            heartbeats: Arc::new(heartbeats),
            beat: Arc::new(Mutex::new(None)),
            every: options.every,
            started: Timestamp::wall(),
        };
        let mut agent = Self {
            socket: socket.path().to_owned(),
            to: transport.address(),
            spool,
            stop: CancellationToken::new(),
            parts: JoinSet::new(),
        };
        agent.run(socket, Arc::new(desk), options, machine);
        if let Some(writing) = writing {
            let stop = agent.stop.child_token();
            agent.parts.spawn(async move { writing.run(stop).await.map_err(std::io::Error::other) });
        }
        Ok(agent)
    }

    fn run(&mut self, socket: Socket, desk: Arc<Desk>, options: Options, machine: Machine) {
        let sender = Sender {
            spool: self.spool.clone(),
            transport: desk.transport.clone(),
            connectivity: desk.notices.clone(),
            clock: options.clock.clone(),
        };
        let heartbeat = Heartbeat {
            node: options.node,
            instance: desk.instance.clone(),
            models: options.models,
            every: options.every,
            transport: desk.transport.clone(),
            connectivity: desk.heartbeats.clone(),
            last: desk.beat.clone(),
            clock: options.clock,
        };
        let stop = || self.stop.child_token();
        let (sending, beating) = (sender.run(stop()), heartbeat.run(machine, stop()));
        let serving = socket.serve(desk, stop());
        self.parts.spawn(sending.map(Ok));
        self.parts.spawn(beating.map(Ok));
        self.parts.spawn(serving);
    }

    /// Waits until a task of the agent ends by itself, which is always an error.
    ///
    /// Cancel safe.
    pub async fn ended(&mut self) -> AgentError {
        match self.parts.join_next().await {
            Some(end) => AgentError::Ended(words(end)),
            None => AgentError::Ended("nothing is left of it".to_owned()),
        }
    }

    /// Ends the agent. Returns the number of notices that the next agent will find.
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

/// Returns the public keys of the agent in a directory in one line, as an admin adds it to a fleet with a roster. Directory
/// and keys are made once.
pub fn keys_line(dir: &Path) -> Result<String, KeysError> {
    let dir = dir.join(WRITER);
    dim_store::owner_only::create_dir_all(&dir)?;
    let dir = Dir::open_ambient_dir(&dir, ambient_authority())?;
    Ok(dim_network::reliable_topics::keys_line(&Keyring::open(&dir).map_err(IdentityError::from)?)?)
}

/// The reason why an agent has no keys for a fleet.
#[derive(Debug, Error)]
pub enum KeysError {
    /// The directory cannot be used.
    #[error("cannot use the directory of the agent")]
    Directory(#[from] std::io::Error),
    /// The keys cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// Returns the transport, and the tasks of the writer of reliable topics if it has one.
async fn transport(options: &Options) -> Result<(Arc<dyn Transport>, Option<Tasks>), AgentError> {
    let (node, topics) = (options.node.clone(), options.topics.clone());
    let ToKubo { settings, fleet, deliveries } = match &options.to {
        To::Host(client) => {
            return Ok((Arc::new(transport::Api { client: client.clone(), node, topics }), None));
        }
        To::Kubo(to) => to.clone(),
    };
    let backend = kubo::backend(&settings)?;
    let mut kubo = transport::Kubo { backend: backend.clone(), node, topics, writer: None };
    if !kubo.used_topics().into_iter().any(|topic| reliable_topic(&deliveries, topic).is_some()) {
        return Ok((Arc::new(kubo), None));
    }
    let (dir, clock) = (options.dir.join(WRITER), options.clock.clone());
    let room = Room::default();
    // What retention removes was acknowledged, or is published again before.
    let kept = |it: ReliableTopic| ReliableTopic { bytes: it.bytes.max(4 * room.bytes), ..it };
    let deliveries = deliveries.into_iter().map(|(pattern, it)| (pattern, it.map(kept))).collect();
    let options = lone_writer::Options { dir, fleet, deliveries, backend, clock };
    let opened = tokio::task::spawn_blocking(move || LoneWriter::open(options)).await;
    let (writer, tasks) = opened.expect("opening does not panic")?;
    kubo.writer = Some(writer);
    Ok((Arc::new(kubo), Some(tasks)))
}

/// Checks that a heartbeat with the given models fits into a message. Returns the machine.
async fn checked(options: &Options, mut machine: Machine) -> Result<Machine, AgentError> {
    let look = tokio::task::spawn_blocking(move || (machine.look(), machine));
    let (resources, machine) = look.await.expect("a look at the machine does not panic");
    let instance = heartbeat::new_instance();
    let Options { node, every, models, .. } = options;
    let said = Said { node, instance: &instance, every: *every, models };
    let length = heartbeat::message(&said, Timestamp::wall(), &resources).len();
    if length > MESSAGE_BYTES { Err(AgentError::Models(length)) } else { Ok(machine) }
}
