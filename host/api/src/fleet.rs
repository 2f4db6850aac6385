//! Owns `/v1/fleet`: shows the fleet as the host knows it, lets the host join one, and takes in its roster.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::Bytes;
use axum::http::StatusCode;
use dim_model::error_chain::chain;
use dim_model::ident::{GroupName, IpnsName, MemberLabel, Topic};
use dim_model::time::Timestamp;
use dim_network::reliable_topics::{FleetState, ObservedMember, Refusal, Refused};
use dim_server::host::{Host, JoinFleetError, JoinedFleet};
use dim_store::topic_rows::TopicState;
use dim_topics::block::MAX_BLOCK;
use dim_topics::identity::WriterId;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::extract::{Body, Current, Path, Plain};
use crate::openapi::{Binary, Conflict, Missing, TooLarge};
use crate::{ApiError, to_its_end};

/// A fleet as a host knows it.
#[derive(Debug, Serialize, ToSchema)]
pub struct Fleet {
    /// The name of the fleet: the IPNS name of the key of its first admin.
    name: String,
    /// This host, by the IPNS name of its key.
    #[schema(value_type = String)]
    id: IpnsName,
    /// The keys of this host, as `dim fleet add` takes them.
    line: String,
    /// Whether this host is a member.
    is_member: bool,
    /// The version of the newest roster; null if this host has none yet.
    #[schema(required)]
    version: Option<u64>,
    /// The time after which members write no encrypted topics; null if this host has no roster yet.
    #[schema(required)]
    expires: Option<Timestamp>,
    /// The admins, by the IPNS names of their keys.
    #[schema(value_type = Vec<String>)]
    admins: Vec<IpnsName>,
    /// The number of admins that must sign a roster; null if this host has no roster yet.
    #[schema(required)]
    threshold: Option<u32>,
    /// The members.
    members: Vec<FleetMember>,
    /// The groups.
    groups: Vec<FleetGroup>,
    /// The rosters that were refused, because the admins have signed others of their versions.
    alarms: Vec<String>,
    /// What the operator should know of the fleet, the most important first. `alarms` are among it.
    problems: Vec<String>,
    /// What this host has refused since its start.
    refused: Vec<RefusedOfFleet>,
}

/// Messages and blocks that a host has refused for one reason.
#[derive(Debug, Serialize, ToSchema)]
pub struct RefusedOfFleet {
    /// A short name of the reason.
    reason: &'static str,
    /// The reason.
    text: String,
    /// The number of messages and blocks.
    count: u64,
    /// The writer of the last one, by the IPNS name of its key.
    #[schema(value_type = String)]
    writer: IpnsName,
    /// The time of the last one.
    at: Timestamp,
}

/// A member of a fleet.
#[derive(Debug, Serialize, ToSchema)]
pub struct FleetMember {
    /// The operator's name of the member.
    #[schema(value_type = String)]
    name: MemberLabel,
    /// The member, by the IPNS name of its key.
    #[schema(value_type = String)]
    id: IpnsName,
    /// The groups to which it belongs.
    #[schema(value_type = Vec<String>)]
    groups: Vec<GroupName>,
    /// Whether it issues keys.
    is_keeper: bool,
    /// The version of the roster with which it joined.
    since: u64,
    /// The time at which this host last heard it; null if it was not heard since the start of this host.
    #[schema(required)]
    heard: Option<Timestamp>,
    /// The version of the roster that it has, as far as this host knows.
    #[schema(required)]
    version: Option<u64>,
    /// For each group: the key epoch with which it wrote last, as far as this host knows.
    #[schema(value_type = BTreeMap<String, String>)]
    epochs: BTreeMap<GroupName, String>,
}

/// A group of members that share the keys of encrypted topics.
#[derive(Debug, Serialize, ToSchema)]
pub struct FleetGroup {
    /// The name.
    #[schema(value_type = String)]
    name: GroupName,
    /// The version of the roster since which new keys are required.
    rekeyed: u64,
    /// Whether new members receive earlier keys.
    has_history: bool,
    /// The key epoch with which this host writes; null if it has none.
    #[schema(required)]
    epoch: Option<String>,
}

/// The last bundle of a log of a member that is durable at this host.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct MemberLog {
    /// The topic.
    pub topic: Topic,
    /// The process start of the member: 16 random bytes in hex.
    pub incarnation: String,
    /// The sequence of the first event of the bundle.
    pub first: u64,
    /// The number of events of the bundle.
    pub count: u32,
    /// The hybrid time of the first event, in nanoseconds since 1970.
    pub time: u64,
    /// The CID of the bundle.
    pub cid: String,
}

impl Fleet {
    fn of(state: FleetState, now: Timestamp) -> Self {
        let problems = state.problems(now);
        let roster = state.roster.map(|signed| signed.roster);
        let problems = problems.iter().map(ToString::to_string).collect();
        let own: BTreeMap<_, _> = state.epochs.into_iter().collect();
        let own_version = roster.as_ref().map(|it| it.version);
        let mut observed = state.observed;
        let members = roster.iter().flat_map(|roster| &roster.members);
        let members: Vec<FleetMember> = members
            .map(|(id, row)| {
                let mut member = FleetMember {
                    name: row.label.clone(),
                    id: id.name(),
                    groups: row.groups.iter().cloned().collect(),
                    is_keeper: row.is_keeper,
                    since: row.since,
                    heard: None,
                    version: None,
                    epochs: BTreeMap::new(),
                };
                if member.id == state.id {
                    let epochs =
                        own.iter().filter_map(|(group, epoch)| Some((group.clone(), epoch.clone()?)));
                    (member.heard, member.version) = (Some(now), own_version);
                    member.epochs = epochs.collect();
                } else if let Some(observed) = observed.remove(id) {
                    let ObservedMember { heard, roster, epochs } = observed;
                    (member.heard, member.version, member.epochs) = (heard, roster, epochs);
                }
                member
            })
            .collect();
        let groups = roster.iter().flat_map(|roster| &roster.groups).map(|(name, group)| FleetGroup {
            name: name.clone(),
            rekeyed: group.rekeyed,
            has_history: group.history,
            epoch: own.get(name).cloned().flatten(),
        });
        Self {
            line: format!("{}:{}", state.id, state.sealing),
            is_member: members.iter().any(|member| member.id == state.id),
            version: roster.as_ref().map(|it| it.version),
            expires: roster.as_ref().map(|it| it.expires),
            admins: roster.iter().flat_map(|it| &it.admins().keys).map(WriterId::name).collect(),
            threshold: roster.as_ref().map(|it| it.admins().threshold),
            groups: groups.collect(),
            members,
            problems,
            refused: state.refused.into_iter().map(RefusedOfFleet::of).collect(),
            alarms: state.forks.iter().map(ToString::to_string).collect(),
            name: state.name,
            id: state.id,
        }
    }
}

impl RefusedOfFleet {
    fn of((reason, refused): (Refusal, Refused)) -> Self {
        let Refused { count, writer, at } = refused;
        Self { reason: reason.name(), text: reason.to_string(), count, writer: writer.name(), at }
    }
}

async fn state(host: &Host) -> Result<FleetState, ApiError> {
    let why = "the fleet of this host has no roster: join one with `dim fleet join`; without reliable topics there is no fleet";
    host.exchange.links.reliable.fleet().await.ok_or_else(|| ApiError::not_found(why))
}

/// Shows the fleet as this host knows it.
#[utoipa::path(get, path = "/fleet", tag = "fleet", operation_id = "show_fleet",
    responses((status = 200, body = Fleet), Missing))]
pub async fn show(Current(host): Current) -> Result<Json<Fleet>, ApiError> {
    Ok(Json(Fleet::of(state(&host).await?, host.storage.log.clock().wall())))
}

/// Returns the newest roster: a block that its admins have signed.
#[utoipa::path(get, path = "/fleet/roster", tag = "fleet", operation_id = "get_roster",
    responses((status = 200, body = inline(Binary), content_type = "application/octet-stream"), Missing))]
pub async fn roster(Current(host): Current) -> Result<Bytes, ApiError> {
    let roster = state(&host).await?.roster;
    let roster = roster.ok_or_else(|| ApiError::not_found("this host has no roster yet"))?;
    Ok(roster.to_block())
}

/// A fleet to join.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinFleet {
    /// The name of the fleet: the IPNS name that `dim fleet init` has printed.
    fleet: String,
    /// Whether the host leaves the fleet with a roster to which it belongs.
    #[serde(default)]
    leave: bool,
}

/// A fleet that the host has joined.
#[derive(Debug, Serialize, ToSchema)]
pub struct FleetJoined {
    /// The name of the fleet.
    #[schema(value_type = String)]
    name: IpnsName,
    /// The keys of this host, as `dim fleet add` takes them.
    line: String,
    /// Whether the host has reliable topics. Without them it encrypts and reads documents of the fleet only.
    has_reliable_topics: bool,
}

/// Joins a fleet with a roster. The host writes and reads its reliable topics there from now on, also after a restart.
///
/// It is a member once an admin has added its keys.
#[utoipa::path(post, path = "/fleet/join", tag = "fleet", operation_id = "join_fleet", request_body = JoinFleet,
    responses((status = 200, body = FleetJoined), Conflict))]
pub async fn join(
    Current(host): Current,
    Body(JoinFleet { fleet, leave }): Body<JoinFleet>,
) -> Result<Json<FleetJoined>, ApiError> {
    let fleet: IpnsName = fleet.parse()?;
    let name = fleet.clone();
    let joined = to_its_end(async move { host.join_fleet(&fleet, leave).await.map_err(refused) }).await?;
    let JoinedFleet { line, has_reliable_topics } = joined;
    Ok(Json(FleetJoined { name, line, has_reliable_topics }))
}

fn refused(error: JoinFleetError) -> ApiError {
    match error {
        JoinFleetError::Commit(error) => error.into(),
        JoinFleetError::Stopping => ApiError::unavailable(error),
        JoinFleetError::Configured(_)
        | JoinFleetError::Joined(_)
        | JoinFleetError::Unsent(_)
        | JoinFleetError::Identity(_) => ApiError::conflict(chain(&error)),
    }
}

/// Takes in a record of the fleet's IPNS name that points to the roster. The key of the first admin must have signed it.
///
/// The host publishes the record again and again, so that others find the roster.
#[utoipa::path(put, path = "/fleet/record", tag = "fleet", operation_id = "put_fleet_record",
    request_body(content = inline(Binary), content_type = "application/octet-stream"),
    responses((status = 204), Missing))]
pub async fn put_record(Current(host): Current, Plain(record): Plain<Bytes>) -> Result<StatusCode, ApiError> {
    state(&host).await?;
    let offered = host.exchange.links.reliable.offer_record(record.to_vec()).await;
    let offered = offered.ok_or_else(|| ApiError::unavailable("the host is shutting down"))?;
    offered.map_err(ApiError::invalid)?;
    Ok(StatusCode::NO_CONTENT)
}

/// The version of the newest roster.
#[derive(Debug, Serialize, ToSchema)]
pub struct RosterVersion {
    /// The version.
    version: u64,
}

/// Takes in a roster. Enough admins of the fleet must have signed it. The host passes it on to the other members.
#[utoipa::path(put, path = "/fleet/roster", tag = "fleet", operation_id = "put_roster",
    request_body(content = inline(Binary), content_type = "application/octet-stream"),
    responses((status = 200, body = RosterVersion), Missing, TooLarge))]
pub async fn put_roster(
    Current(host): Current,
    Plain(block): Plain<Bytes>,
) -> Result<Json<RosterVersion>, ApiError> {
    if block.len() > MAX_BLOCK {
        return Err(ApiError::too_large(format!("a roster has at most {MAX_BLOCK} bytes")));
    }
    state(&host).await?;
    let offered = host.exchange.links.reliable.offer_roster(block).await;
    let offered = offered.ok_or_else(|| ApiError::unavailable("the host is shutting down"))?;
    let version = offered.map_err(ApiError::invalid)?;
    Ok(Json(RosterVersion { version }))
}

/// Lists the ends of the logs of a member, as far as they are durable at this host. A roster that removes the member
/// names them.
#[utoipa::path(get, path = "/fleet/members/{id}/logs", tag = "fleet", operation_id = "list_member_logs",
    params(("id" = String, Path, description = "The IPNS name of the member's key")),
    responses((status = 200, body = [MemberLog])))]
pub async fn logs(Current(host): Current, Path(id): Path<String>) -> Result<Json<Vec<MemberLog>>, ApiError> {
    let id: IpnsName = id.parse()?;
    let state = TopicState::read(&host.storage.store.snapshot()?)?;
    let of_member = state.checkpoints.into_iter().filter(|(_, writer, _)| writer.name() == id);
    let log = |(topic, _, checkpoint): (Topic, _, dim_topics::action::Checkpoint)| {
        let last = checkpoint.last?;
        Some(MemberLog {
            topic,
            incarnation: checkpoint.incarnation.to_string(),
            first: last.first,
            count: last.count,
            time: last.time.0,
            cid: last.digest.to_string(),
        })
    };
    Ok(Json(of_member.filter_map(log).collect()))
}
