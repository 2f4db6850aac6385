//! Owns `/v1/fleet`: shows the fleet as the host knows it, and takes in its roster.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::Bytes;
use dim_model::ident::{GroupName, IpnsName, MemberLabel, Topic};
use dim_model::time::Timestamp;
use dim_network::reliable_topics::FleetState;
use dim_server::host::Host;
use dim_store::topic_rows::TopicState;
use dim_topics::block::MAX_BLOCK;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ApiError;
use crate::extract::{Current, Path, Plain};
use crate::openapi::{Binary, Missing, TooLarge};

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
    /// The members.
    members: Vec<FleetMember>,
    /// The groups.
    groups: Vec<FleetGroup>,
    /// The rosters that were refused, because the admins have signed others of their versions.
    alarms: Vec<String>,
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
    fn of(state: FleetState) -> Self {
        let roster = state.roster.map(|signed| signed.roster);
        let epochs: BTreeMap<_, _> = state.epochs.into_iter().collect();
        let members = roster.iter().flat_map(|roster| &roster.members);
        let members: Vec<FleetMember> = members
            .map(|(id, row)| FleetMember {
                name: row.label.clone(),
                id: id.name(),
                groups: row.groups.iter().cloned().collect(),
                is_keeper: row.is_keeper,
                since: row.since,
            })
            .collect();
        let groups = roster.iter().flat_map(|roster| &roster.groups).map(|(name, group)| FleetGroup {
            name: name.clone(),
            rekeyed: group.rekeyed,
            has_history: group.history,
            epoch: epochs.get(name).cloned().flatten(),
        });
        Self {
            line: format!("{}:{}", state.id, state.sealing),
            is_member: members.iter().any(|member| member.id == state.id),
            version: roster.as_ref().map(|it| it.version),
            expires: roster.as_ref().map(|it| it.expires),
            groups: groups.collect(),
            members,
            alarms: state.forks.iter().map(ToString::to_string).collect(),
            name: state.name,
            id: state.id,
        }
    }
}

async fn state(host: &Host) -> Result<FleetState, ApiError> {
    let why = "the fleet of this host has no roster: `fleet.name` in the config is not the name of one, or no topic is reliable";
    host.exchange.links.reliable.fleet().await.ok_or_else(|| ApiError::not_found(why))
}

/// Shows the fleet as this host knows it.
#[utoipa::path(get, path = "/fleet", tag = "fleet", operation_id = "show_fleet",
    responses((status = 200, body = Fleet), Missing))]
pub async fn show(Current(host): Current) -> Result<Json<Fleet>, ApiError> {
    Ok(Json(Fleet::of(state(&host).await?)))
}

/// Returns the newest roster: a block that its admins have signed.
#[utoipa::path(get, path = "/fleet/roster", tag = "fleet", operation_id = "get_roster",
    responses((status = 200, body = inline(Binary), content_type = "application/octet-stream"), Missing))]
pub async fn roster(Current(host): Current) -> Result<Bytes, ApiError> {
    let roster = state(&host).await?.roster;
    let roster = roster.ok_or_else(|| ApiError::not_found("this host has no roster yet"))?;
    Ok(roster.to_block())
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
