//! A job and its state machine: queued, running, then one of three final statuses, which never changes.

use std::borrow::Cow;
use std::time::Duration;

use dim_guest::Failure;
use dim_guest::id;
use dim_guest::time::Time;
use dim_guest::verbatim::{self, Verbatim};
use serde::{Deserialize, Serialize};

/// Maximum lead of a sender's clock over the host's clock. A timestamp further ahead is replaced by the current time.
const AHEAD: Duration = Duration::from_secs(300);

/// The status of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Queued,
    Running,
    Completed,
    Failed,
    Cancelled,
}

impl Status {
    /// Returns the status for an event type, or none if the type is unknown. Fleets use several words for a status.
    pub fn of(event_type: &str) -> Option<Self> {
        Some(match event_type {
            "queued" | "created" | "submitted" | "pending" => Self::Queued,
            "running" | "started" | "assigned" | "progress" => Self::Running,
            "completed" | "succeeded" => Self::Completed,
            "failed" | "error" => Self::Failed,
            "cancelled" | "canceled" => Self::Cancelled,
            _ => return None,
        })
    }

    pub fn is_final(self) -> bool {
        self.rank() == 2
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    fn rank(self) -> u8 {
        match self {
            Self::Queued => 0,
            Self::Running => 1,
            Self::Completed | Self::Failed | Self::Cancelled => 2,
        }
    }
}

/// A job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    pub job_id: String,
    pub status: Status,
    pub updated_at: Time,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "verbatim::if_readable")]
    pub data: Option<Verbatim>,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "verbatim::if_readable")]
    pub result: Option<Verbatim>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result_cid: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_id: Option<String>,
    /// The verdict that the node is dead, while the job is running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_dead: Option<NodeDead>,
}

/// A verdict that the node of a job is dead.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeDead {
    pub observer: String,
    pub since: Time,
}

/// An event of a job, from a message or a command.
#[derive(Debug, Serialize, Deserialize)]
pub struct JobEvent {
    pub job_id: String,
    pub event_type: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<Time>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Verbatim>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Verbatim>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_id: Option<String>,
}

impl JobEvent {
    pub fn parse(data: &[u8]) -> Result<Self, Failure> {
        let event: Self = serde_json::from_slice(data)
            .map_err(|error| Failure::Reject(format!("not a job event: {error}")))?;
        event.check().map_err(Failure::Reject)?;
        Ok(event)
    }

    pub fn check(&self) -> Result<(), String> {
        id::check("a job_id", &self.job_id, MAX_ID)?;
        if let Some(node) = self.node() {
            id::check("a node_id", &node, MAX_NODE_ID)?;
        }
        if Status::of(&self.event_type).is_none() {
            return Err(format!(
                "unknown event_type {:?}: expected queued, running, completed, failed or cancelled",
                self.event_type
            ));
        }
        Ok(())
    }

    fn node(&self) -> Option<Cow<'_, str>> {
        let said = || self.data.as_ref()?.member("node_id").map(Cow::Owned);
        self.node_id.as_deref().map(Cow::Borrowed).or_else(said)
    }

    fn result(&self) -> Option<Verbatim> {
        self.result.clone().or_else(|| self.data.as_ref()?.member("result"))
    }
}

/// Maximum length of a job's id and of a CID, in bytes.
const MAX_ID: usize = 128;

/// Maximum length of a node's id, in bytes.
const MAX_NODE_ID: usize = 256;

/// Checks the id of a job.
pub fn check_job_id(id: &str) -> Result<(), String> {
    id::check("a job_id", id, MAX_ID)
}

/// Checks the id of a node.
pub fn check_node_id(id: &str) -> Result<(), String> {
    id::check("a node_id", id, MAX_NODE_ID)
}

/// Returns a sender's timestamp, or the current time if it is missing or too far ahead.
fn believed(time: Option<Time>, now: Time) -> Time {
    time.filter(|time| time.since(now) <= AHEAD).unwrap_or(now)
}

/// The announcement of a stored result.
#[derive(Debug, Deserialize)]
pub struct ResultReady {
    pub job_id: String,
    pub result_cid: String,
    #[serde(default)]
    timestamp: Option<Time>,
}

impl ResultReady {
    /// Returns the time at which the result was ready.
    pub fn time(&self, now: Time) -> Time {
        believed(self.timestamp, now)
    }

    pub fn parse(data: &[u8]) -> Result<Self, Failure> {
        let ready: Self = serde_json::from_slice(data)
            .map_err(|error| Failure::Reject(format!("not a result: {error}")))?;
        id::check("a job_id", &ready.job_id, MAX_ID).map_err(Failure::Reject)?;
        id::check("a result_cid", &ready.result_cid, MAX_ID).map_err(Failure::Reject)?;
        Ok(ready)
    }
}

/// A verdict of a watchdog on a node.
#[derive(Debug, Deserialize)]
pub struct Verdict {
    pub node_id: String,
    pub status: String,
    #[serde(default)]
    pub observer: String,
    #[serde(default)]
    pub timestamp: Option<Time>,
}

/// The statement of a verdict about a node's death. Other verdicts, for example `suspect`, are `Unsaid`.
pub enum Death {
    Dead(NodeDead),
    Alive,
    Unsaid,
}

impl Verdict {
    pub fn parse(data: &[u8]) -> Result<Self, Failure> {
        let verdict: Self = serde_json::from_slice(data)
            .map_err(|error| Failure::Reject(format!("not a verdict on a node: {error}")))?;
        id::check("a node_id", &verdict.node_id, MAX_NODE_ID).map_err(Failure::Reject)?;
        Ok(verdict)
    }

    /// Returns the time of the verdict.
    pub fn time(&self, now: Time) -> Time {
        believed(self.timestamp, now)
    }

    /// Returns the verdict's statement about the node's death.
    pub fn death(&self, now: Time) -> Death {
        match self.status.as_str() {
            "dead" => {
                let since = self.time(now);
                Death::Dead(NodeDead { observer: self.observer.clone(), since })
            }
            "alive" | "recovered" => Death::Alive,
            _ => Death::Unsaid,
        }
    }
}

impl Job {
    /// Returns the job after an event, or none if the event changes nothing: it is late, repeated or impossible.
    pub fn after(known: Option<&Job>, event: &JobEvent, now: Time) -> Option<Job> {
        let status = Status::of(&event.event_type)?;
        let time = believed(event.timestamp, now);
        let Some(known) = known else {
            return Some(Job {
                job_id: event.job_id.clone(),
                status,
                updated_at: time,
                data: event.data.clone(),
                result: event.result(),
                result_cid: None,
                node_id: event.node().map(Cow::into_owned),
                node_dead: None,
            });
        };
        let moves_on = status.rank() > known.status.rank();
        let same = status == known.status && !status.is_final();
        // A job without data and node accepts both from a late event.
        let learns = same && known.data.is_none() && known.node_id.is_none();
        let newer = same && time > known.updated_at;
        if !moves_on && !learns && !newer {
            return known.completed_by(event, status);
        }
        let node_id = event.node().map(Cow::into_owned).or_else(|| known.node_id.clone());
        let stays = status == Status::Running && node_id == known.node_id;
        Some(Job {
            status,
            updated_at: time.max(known.updated_at),
            data: event.data.clone().or_else(|| known.data.clone()),
            result: event.result().or_else(|| known.result.clone()),
            node_dead: known.node_dead.clone().filter(|_| stays),
            node_id,
            ..known.clone()
        })
    }

    /// Returns the job with missing members from an older event of the same status, or none if the event adds nothing.
    ///
    /// Known members are unchanged. An earlier timestamp does not make new members wrong, because the clocks of
    /// different senders differ.
    fn completed_by(&self, event: &JobEvent, status: Status) -> Option<Job> {
        if status != self.status || status.is_final() {
            return None;
        }
        let node_id = self.node_id.clone().or_else(|| event.node().map(Cow::into_owned));
        let data = self.data.clone().or_else(|| event.data.clone());
        let adds = node_id != self.node_id || data != self.data;
        adds.then(|| Job { node_id, data, ..self.clone() })
    }

    /// Returns the job with its result, or none if that changes nothing.
    pub fn with_result(&self, result_cid: &str) -> Option<Job> {
        let changes = self.result_cid.as_deref() != Some(result_cid);
        changes.then(|| Job { result_cid: Some(result_cid.to_owned()), ..self.clone() })
    }

    /// Returns whether an event can add a job that was removed at `removed`: the job was queued again later.
    pub fn comes_back(event: &JobEvent, removed: Time, now: Time) -> bool {
        let is_queued = Status::of(&event.event_type) == Some(Status::Queued);
        is_queued && event.timestamp.is_some_and(|at| believed(Some(at), now) > removed)
    }

    /// Returns whether this job is more recent than `other`: it has a later status, or the same status and a later
    /// time.
    pub fn comes_after(&self, other: &Job) -> bool {
        self.stage() > other.stage()
    }

    fn stage(&self) -> (u8, Time) {
        (self.status.rank(), self.updated_at)
    }

    /// Merges the records of two hosts: the more recent one, with members that only the other has. The merge is
    /// commutative: if both are equally recent, both hosts choose the same one.
    pub fn joined(&self, other: &Job) -> Job {
        let text = |job: &Job| {
            let members = (job.status.name(), &job.node_id, job.data.as_ref().map(Verbatim::get));
            serde_json::to_string(&(members, &job.result, &job.result_cid)).unwrap_or_default()
        };
        let order = self.stage().cmp(&other.stage()).then_with(|| text(self).cmp(&text(other)));
        let (late, early) = if order.is_ge() { (self, other) } else { (other, self) };
        Job {
            data: late.data.clone().or_else(|| early.data.clone()),
            result: late.result.clone().or_else(|| early.result.clone()),
            result_cid: late.result_cid.clone().or_else(|| early.result_cid.clone()),
            node_id: late.node_id.clone().or_else(|| early.node_id.clone()),
            node_dead: self
                .node_dead
                .clone()
                .filter(|_| late.status == Status::Running && late.node_id == self.node_id),
            ..late.clone()
        }
    }

    /// Returns whether another host has an equivalent record. Times and verdicts on the node are ignored, because each
    /// host has its own.
    pub fn is_alike(&self, other: &Job) -> bool {
        let own = (&self.job_id, self.status, &self.node_id, &self.data, &self.result, &self.result_cid);
        own == (&other.job_id, other.status, &other.node_id, &other.data, &other.result, &other.result_cid)
    }

    /// Returns the record of another host without its verdict. A time that is too far ahead becomes the current time.
    pub fn believed(self, now: Time) -> Job {
        Job { updated_at: believed(Some(self.updated_at), now), node_dead: None, ..self }
    }

    /// Returns the job with the verdict on its node, or none if that changes nothing.
    pub fn on_node(&self, dead: Option<&NodeDead>) -> Option<Job> {
        let changes = self.status == Status::Running && self.node_dead.is_some() != dead.is_some();
        changes.then(|| Job { node_dead: dead.cloned(), ..self.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(status: Status, millis: i64, members: &str) -> Job {
        let known: Job = serde_json::from_str(&format!(
            "{{\"job_id\":\"a\",\"status\":\"queued\",\"updated_at\":0{members}}}"
        ))
        .unwrap();
        Job { status, updated_at: Time::of_millis(millis), ..known }
    }

    #[test]
    fn two_hosts_join_what_they_know_to_the_same_whoever_begins() {
        let members =
            ["", r#","node_id":"n1""#, r#","data":[1.0],"node_id":"n2""#, r#","data":{"step":1},"result":7"#];
        let statuses = [Status::Queued, Status::Running, Status::Completed, Status::Cancelled];
        let jobs: Vec<Job> = statuses
            .iter()
            .flat_map(|status| [1, 2].map(|millis| (status, millis)))
            .flat_map(|(status, millis)| members.map(|members| job(*status, millis, members)))
            .collect();
        for one in &jobs {
            assert_eq!(one.joined(one), *one);
            for other in &jobs {
                let joined = one.joined(other);
                assert_eq!(joined, other.joined(one), "{one:?} and {other:?}");
                assert_eq!(
                    joined.joined(one),
                    joined,
                    "a second merge changes nothing: {one:?} and {other:?}"
                );
                assert_eq!(joined.joined(other), joined);
                assert!(joined.stage() >= one.stage() && joined.stage() >= other.stage());
            }
        }
    }
}
