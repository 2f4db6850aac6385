//! Owns the driver of reliable topics: it connects the protocol (`dim-topics`) to the daemon, the store and the event
//! log. It receives waiting publishes from the outbox, messages from the subscriptions, and heads. It sends bundles and
//! heads, fetches missing bundles, and appends the events of others to the log.

mod catch_ups;
mod channel;
mod connections;
mod identity;
mod intake;
mod joining;
mod membership;
mod membership_files;
mod mirrors;
mod outgoing;
mod own_index;
mod plain_copies;
mod roster_name;
mod writer_log;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dim_ipfs::{Backend, BackendError};
use dim_model::beginning::Beginning;
use dim_model::ident::Topic;
use dim_store::commit::{Commit, CommitError};
use dim_store::disk_monitor::DiskMonitor;
use dim_store::event_log::EventLog;
use dim_store::outbox::Backlog;
use dim_store::topic_rows::{self, RaisedAlarm, TopicState};
use dim_store::{Store, StoreError};
use dim_topics::action::{Action, Stream};
use dim_topics::alarm::Alarm;
use dim_topics::identity::Digest;
use dim_topics::member::{Member, Setup};
use dim_topics::reader::Since;
use dim_topics::time::{Moment, Now};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::own_messages::Echoes;

pub use catch_ups::end_catch_ups_of_plain_topics;
pub use channel::{
    Activity, Channels, Deliveries, Input, Inputs, Reliable, ReliableTopic, WaitingPublish, reliable_topic,
};
pub use dim_topics::member::{MAX_WRITERS, MemberCounters};
pub use dim_topics::membership::Refusal;
pub use dim_topics::membership::observed::Refused;
pub use dim_topics::reader::ReaderCounters;
pub use identity::{Identity, IdentityError, has_roster, keys_line, own_writer};
pub use joining::{JoinError, enter_fleet};
pub use membership::{BlockKind, FleetProblem, FleetState, ObservedMember};
pub use plain_copies::{HOLD, Verdict};
pub use roster_name::NameError;
pub use writer_log::{ReaderPosition, WriterLog};

use catch_ups::CatchUps;
use connections::Connections;
use intake::Outcome;
use joining::Join;
use membership_files::MembershipFiles;
use mirrors::Mirrors;
use outgoing::{Outgoing, Waiting};
use own_index::OwnIndexes;
use roster_name::RosterName;

/// The maximum number of inputs that are handled before the actions that they cause.
const AT_ONCE: usize = 256;

/// The parts of the program that the driver uses.
#[derive(Clone, Debug)]
pub struct Parts {
    /// The store.
    pub store: Arc<Store>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// The log that receives the events of others.
    pub log: Arc<EventLog>,
    /// The state of the intake.
    pub disk: Arc<DiskMonitor>,
    /// The daemon.
    pub backend: Backend,
    /// The number of waiting publishes.
    pub backlog: Arc<Backlog>,
    /// The names of the pubsub topics, and the way to the driver.
    pub reliable: Reliable,
    /// The expected echoes of plain messages.
    pub echoes: Arc<Echoes>,
    /// The largest size of the queue of a plugin, in bytes.
    pub queue_bytes: u64,
}

impl Parts {
    /// Reads the block of an own bundle, if it is kept.
    fn stored_block(&self, digest: &Digest) -> Result<Option<Bytes>, StoreError> {
        topic_rows::block(&self.store.snapshot()?, digest)
    }
}

/// The driver of reliable topics.
#[derive(Debug)]
pub struct ReliableTopics {
    parts: Parts,
    member: Member,
    began: Instant,
    /// The publishes that are not in a bundle yet, by topic.
    waiting: BTreeMap<Topic, Waiting>,
    /// The blocks that are sent next.
    outgoing: Outgoing,
    /// The indexes of the own logs in the daemon.
    indexes: OwnIndexes,
    /// The logs of other writers in the daemon.
    mirrors: Mirrors,
    /// The connections of the daemon.
    connections: Connections,
    /// The results of the protocol that are made durable next.
    outcomes: VecDeque<Outcome>,
    /// The plugins that catch up.
    catch_ups: CatchUps,
    /// The files that keep the roster and the keys of the fleet.
    files: Option<MembershipFiles>,
    /// The IPNS name of the fleet, in a fleet with a roster.
    roster_name: Option<RosterName>,
    /// The callers that offered a roster which is not durable yet, with its version.
    offered_rosters: Vec<(u64, tokio::sync::oneshot::Sender<Result<u64, String>>)>,
    is_committing: bool,
    /// Whether small batches of results are delayed.
    is_delaying: bool,
    /// The fleet that the host joins next.
    joining: Option<Join>,
    tasks: TaskTracker,
    /// Cancelled when the host stops or leaves the fleet.
    stop: CancellationToken,
    /// Cancelled when the host stops.
    until: CancellationToken,
}

/// The driver of a host that may share nothing in its fleet yet.
#[derive(Debug)]
pub enum Driver {
    /// The host has reliable topics or encrypted documents, or is in a fleet with a roster.
    Working(Box<ReliableTopics>),
    /// The host shares nothing until it joins a fleet.
    Waiting(Box<Parts>, CancellationToken),
}

impl Driver {
    /// Creates the driver. Without an identity it waits until the host joins a fleet. `until` ends it.
    pub fn new(
        parts: Parts,
        identity: Option<Identity>,
        until: CancellationToken,
    ) -> Result<Self, StoreError> {
        Ok(match identity {
            Some(identity) => Self::Working(Box::new(ReliableTopics::new(parts, identity, until)?)),
            None => Self::Waiting(Box::new(parts), until),
        })
    }

    /// Runs until the host stops. Returns when its tasks have ended.
    pub async fn run(self, mut inputs: Inputs) {
        match self.run_in_fleets(&mut inputs).await {
            Ok(tasks) => {
                // A task that waits to send an input must not wait for ever.
                drop(inputs);
                tasks.close();
                tasks.wait().await;
            }
            Err(CommitError::Closed) => {}
            Err(error) => tracing::error!("reliable topics cannot start: {error}"),
        }
    }

    /// Works in one fleet after the other. Returns the tasks when the host stops.
    async fn run_in_fleets(self, inputs: &mut Inputs) -> Result<TaskTracker, CommitError> {
        let driver = match self {
            Self::Working(driver) => *driver,
            Self::Waiting(parts, until) => match joining::first_join(*parts, inputs, until).await? {
                Some(driver) => driver,
                None => return Ok(TaskTracker::new()),
            },
        };
        driver.run_in_fleets(inputs).await
    }
}

impl ReliableTopics {
    /// Creates the driver, which continues after the state in the store.
    fn new(parts: Parts, identity: Identity, until: CancellationToken) -> Result<Self, StoreError> {
        let snapshot = parts.store.snapshot()?;
        let (state, mirrored) = (TopicState::read(&snapshot)?, dim_store::mirrors::all(&snapshot)?);
        let mirrors = Mirrors::new(mirrored, parts.reliable.channels().fleet());
        let TopicState { past, logs, topics, checkpoints, kept, unsent, places, pins, alarmed } = state;
        let Identity { author, seed, membership } = identity;
        let (files, exchange) = membership.unzip();
        let wall = parts.log.clock().wall();
        let roster_name = files.as_ref().zip(author.fleet.parse().ok());
        let roster_name = roster_name.map(|(files, name)| {
            let stored = files
                .name()
                .inspect_err(|why| tracing::error!("cannot read the record of the fleet's name: {why}"));
            RosterName::new(name, stored.unwrap_or_default(), wall)
        });
        let setup = Setup { author, past, logs, topics, checkpoints, alarmed, seed, exchange };
        let began = parts.log.clock().monotonic();
        let now = Now { moment: Moment::default(), wall };
        let mut outgoing = Outgoing::default();
        let encrypted: Vec<_> = setup
            .topics
            .keys()
            .filter_map(|topic| Some((topic.clone(), parts.reliable.group(topic)?.clone())))
            .collect();
        let mut member = Member::new(setup, now);
        for (topic, group) in encrypted {
            member.encrypt(topic, group);
        }
        for (topic, time) in &kept {
            member.keep_since(topic, *time);
        }
        for (topic, places) in places {
            member.restore_index(&topic, places);
        }
        outgoing.resend(&unsent, &parts.reliable, now.wall);
        let catch_ups = CatchUps::new(parts.queue_bytes);
        Ok(Self {
            parts,
            member,
            began,
            waiting: BTreeMap::new(),
            outgoing,
            indexes: OwnIndexes::new(pins),
            mirrors,
            connections: Connections::default(),
            outcomes: VecDeque::new(),
            catch_ups,
            files,
            roster_name,
            offered_rosters: Vec::new(),
            is_committing: false,
            is_delaying: false,
            joining: None,
            tasks: TaskTracker::new(),
            stop: until.child_token(),
            until,
        })
    }

    /// Works in one fleet after the other. Returns the tasks when the host stops.
    async fn run_in_fleets(mut self, inputs: &mut Inputs) -> Result<TaskTracker, CommitError> {
        self.begin().await?;
        while let Some(join) = self.serve(inputs).await {
            self = self.enter(join, inputs).await?;
        }
        Ok(self.tasks)
    }

    /// Makes the process start durable, before anything is published.
    fn begin(&self) -> impl Future<Output = Result<(), CommitError>> + Send + use<> {
        let (incarnation, began) = (self.member.incarnation(), self.member.began());
        let (commit, fleet) = (self.parts.commit.clone(), self.parts.reliable.channels().fleet().to_owned());
        async move { commit.write(move |write| topic_rows::begin(write, &fleet, incarnation, began)).await }
    }

    /// Works until the host stops, or until it joins another fleet.
    async fn serve(&mut self, inputs: &mut Inputs) -> Option<Join> {
        self.listen_to_heads();
        self.watch_place();
        self.keep_connections();
        self.watch_catch_ups();
        self.watch_mirrors();
        self.remove_old_bundles();
        self.put_last_blocks();
        self.look_up_name();
        self.plan_indexes(Duration::ZERO);
        let stop = self.stop.clone();
        loop {
            let wait = self.member.deadline().since(self.now().moment);
            tokio::select! {
                biased;
                () = stop.cancelled() => return None,
                input = inputs.0.recv() => self.take(input?),
                () = self.parts.log.clock().sleep(wait) => {}
            }
            for _ in 1..AT_ONCE {
                if self.joining.is_some() {
                    break;
                }
                let Ok(input) = inputs.0.try_recv() else { break };
                self.take(input);
            }
            if let Some(join) = self.joining.take() {
                return Some(join);
            }
            if self.member.deadline() <= self.now().moment {
                self.member.wake(self.now());
            }
            self.act();
        }
    }

    fn now(&self) -> Now {
        let clock = self.parts.log.clock();
        Now { moment: Moment(clock.monotonic().saturating_duration_since(self.began)), wall: clock.wall() }
    }

    fn take(&mut self, input: Input) {
        let now = self.now();
        match input {
            Input::Bundle { bundle, channels } => {
                // It is of a fleet that the host has left, or everybody could have written it.
                let is_of_fleet = Arc::ptr_eq(&channels, &self.parts.reliable.channels());
                if !is_of_fleet || self.lacks_roster(&bundle.header.topic) {
                    return;
                }
                if self.member.is_member(&bundle.header.writer) {
                    self.mirror_bundle(&bundle);
                }
                self.member.receive(bundle, now);
            }
            Input::Head { head, block } => {
                let is_other_member = head.writer != self.member.id() && self.member.is_member(&head.writer);
                if let Some(daemon) = head.place.peer.as_ref().filter(|_| is_other_member)
                    && self.parts.reliable.has_both()
                {
                    self.parts.reliable.copies().head_names(head.writer, daemon);
                }
                if is_other_member {
                    self.mirror_head(&head, &block);
                }
                let writer = head.writer;
                if self.member.receive_head(*head, now) {
                    self.keep_connected(writer);
                }
            }
            Input::MirrorsDue => self.check_mirrors(),
            Input::RepeatHeads { unheard_since } => self.repeat_unheard(unheard_since),
            Input::Mirrored(attempt) => self.mirrored(*attempt),
            Input::MirrorEnded { mirror, is_unpinned } => self.mirror_ended(*mirror, is_unpinned),
            Input::Place(place) => self.set_place(place),
            Input::Subscribed(topic, beginning) => self.subscribe(topic, beginning, now),
            Input::Unsubscribed(topic) => self.unsubscribe(topic, now),
            Input::Waiting { topic, publish } => {
                self.waiting.entry(topic.clone()).or_default().queue.push_back(publish);
                self.form(&topic);
            }
            Input::Stored { topic, bundle, rows, is_void } => self.stored(&topic, bundle, rows, is_void),
            Input::Sent(result) => self.sent(result),
            Input::Retry => self.retry(),
            Input::Fetched { stream, writer, listed, bundle } => match bundle {
                Some(bundle) => self.member.fetched(&stream, &writer, &listed, bundle, now),
                None => {
                    self.connect_to(writer);
                    self.member.fetch_failed(&stream, &writer, &listed, now);
                }
            },
            Input::NodeFetched { stream, writer, digest, block } => {
                if block.is_none() {
                    self.connect_to(writer);
                }
                self.member.node_fetched(&stream, &writer, &digest, block.as_deref(), now);
            }
            Input::CatchUpsChanged => self.update_catch_ups(),
            Input::CatchUpsDue => self.catch_ups_due(),
            Input::OwnMessages(found) => self.searched_own(*found),
            Input::IndexesDue => self.provide_index(),
            Input::IndexProvided(provided) => self.index_provided(provided),
            Input::Committed { outcomes, ends } => self.committed(&outcomes, &ends, now),
            Input::MembershipFetched { block, kind } => self.membership_fetched(&block, kind),
            Input::RosterOffered { block, to } => self.offered_roster(&block, to),
            Input::RosterStored { version, written } => self.roster_stored(version, &written),
            Input::EpochsStored(number) => self.epochs_stored(number),
            Input::NameDue => self.look_up_name(),
            Input::NameFound(found) => self.name_found(found.map(|record| *record)),
            Input::RecordOffered { record, to } => self.offered_record(record, to),
            Input::Join { identity, to } => self.begin_join(identity, to),
            // The caller may have disconnected.
            Input::Activity(to) => {
                let written = self.member.own_topics().cloned().collect();
                // The caller may have disconnected.
                let _ = to.send(Activity { counters: self.member.counters(), written });
            }
            Input::Fleet(to) => drop(to.send(self.fleet_state())),
            // The caller may have disconnected.
            Input::DocumentKey { group, to } => drop(to.send(self.document_key(&group))),
            // The caller may have disconnected.
            Input::Secrets { fleet, group, epoch, to } => drop(to.send(self.secrets(&fleet, &group, &epoch))),
            Input::Writers { topic, to } => {
                // The caller may have disconnected.
                let _ = to.send(writer_log::of_topic(&self.member, &self.mirrors, &topic));
            }
            // The caller may have disconnected.
            Input::AcknowledgedWithin(to) => drop(to.send(self.member.acknowledged_within())),
            Input::CommitsDue => self.is_delaying = false,
            Input::Removed(kept) => {
                for (topic, time) in &kept {
                    self.member.keep_since(topic, *time);
                }
                self.shorten_indexes(kept.into_keys());
                self.forget_old_keys();
            }
        }
    }

    /// Carries out what the protocol asks for.
    fn act(&mut self) {
        for action in self.member.take_actions() {
            match action {
                Action::Publish { bundle, .. } => self.outgoing.bundle(&bundle, &self.parts.reliable),
                Action::PublishHead(head) => {
                    self.outgoing.head(self.parts.reliable.channels().heads.clone(), head);
                }
                Action::Fetch { stream, writer, listed } => self.fetch(stream, writer, listed),
                Action::FetchNode { stream, writer, digest } => self.fetch_node(stream, writer, digest),
                Action::Deliver(delivery) => self.outcomes.push_back(Outcome::Delivery(Box::new(delivery))),
                Action::CaughtUp(stream) => self.outcomes.push_back(Outcome::CaughtUp(stream)),
                Action::Resend(digest) => self.resend(&digest),
                Action::Alarm(alarm) => self.raise(alarm),
                Action::FetchRoster(digest) => self.fetch_membership(digest, BlockKind::Roster),
                Action::FetchGrant(digest) => self.fetch_membership(digest, BlockKind::Grant),
                Action::StoreRoster { version, block } => self.store_roster(version, block),
                Action::StoreEpochs { number, group, epochs } => self.store_epochs(number, group, epochs),
                Action::Provide(block) => self.provide(block),
                Action::ForgetEpochs { group, epochs } => self.forget_epochs(group, epochs),
                Action::RosterFork { fork, block } => self.raise_roster_fork(fork, block),
            }
        }
        self.send_next();
        self.commit_next();
    }

    fn subscribe(&mut self, topic: Topic, beginning: Beginning, now: Now) {
        let since = self.parts.reliable.settings(&topic).map(|it| it.from).unwrap_or_default();
        let since = match since.at(now.wall).min(beginning) {
            Beginning::Head => Since::Head(now.wall),
            Beginning::Time(time) => Since::Time(time),
            Beginning::Earliest => Since::Earliest,
        };
        self.encrypt_if_configured(&topic);
        if self.member.subscribe(topic.clone(), since, now) {
            self.write_since(topic);
            self.update_catch_ups();
        }
    }

    /// Stores the place from which on the events of a topic are wanted.
    fn write_since(&self, topic: Topic) {
        let Some(since) = self.member.since(&topic) else { return };
        let commit = self.parts.commit.clone();
        self.spawn_write(async move {
            commit.write_later(move |write| topic_rows::subscribe(write, &topic, since)).await
        });
    }

    /// Drops the results of some readings that are not durable.
    fn drop_outcomes(&mut self, is_gone: impl Fn(&Stream) -> bool, now: Now) {
        let dropped = self.outcomes.iter().filter(|it| is_gone(it.stream()));
        self.member.dropped(dropped.map(Outcome::bytes).sum(), now);
        self.outcomes.retain(|it| !is_gone(it.stream()));
    }

    fn unsubscribe(&mut self, topic: Topic, now: Now) {
        self.member.unsubscribe(&topic);
        self.end_catch_ups(&topic);
        self.drop_outcomes(|stream| stream.topic == topic, now);
        let commit = self.parts.commit.clone();
        self.spawn_write(async move {
            commit.write_later(move |write| topic_rows::unsubscribe(write, &topic)).await
        });
    }

    /// Runs a task until it ends or the driver stops.
    fn spawn_until_stop(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = work => {}
            }
        });
    }

    /// Runs a small write whose loss in a crash does no harm.
    fn spawn_write(&self, write: impl Future<Output = Result<(), CommitError>> + Send + 'static) {
        self.tasks.spawn(async move {
            match write.await {
                Ok(()) | Err(CommitError::Closed) => {}
                Err(error) => tracing::error!("cannot write the state of a reliable topic: {error}"),
            }
        });
    }

    /// Shows an alarm to the operator, also after a restart.
    fn raise(&self, alarm: Alarm) {
        let Alarm { topic, writer, finding } = alarm;
        tracing::warn!(%topic, %writer, "alarm: {finding}");
        let raised = RaisedAlarm {
            topic,
            writer,
            finding: finding.to_string(),
            at: self.now().wall,
            is_reported: finding.is_reported(),
            is_acknowledged: false,
        };
        let commit = self.parts.commit.clone();
        self.spawn_write(async move { commit.write(move |write| topic_rows::raise(write, &raised)).await });
    }

    /// Sends an own bundle again that another member cannot fetch, or provides the indexes again.
    fn resend(&mut self, digest: &Digest) {
        match self.parts.stored_block(digest) {
            Ok(Some(block)) => {
                self.put_block(*digest, block.clone());
                // It was published before.
                self.outgoing.send_again(block, &self.parts.reliable);
            }
            Ok(None) => {
                tracing::debug!(%digest, "a member asks for a node of an index, or for a bundle that is not kept");
                self.repair_indexes();
            }
            Err(error) => tracing::error!("cannot read a bundle: {error}"),
        }
    }
}

/// The result of sending a block.
type SendResult = (outgoing::Block, Result<(), BackendError>);
