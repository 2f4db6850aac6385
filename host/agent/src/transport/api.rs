//! Owns the transport to a host's API. It receives notices and heartbeats and sends them as API calls. A notice is
//! delivered when the host has it on its disk.

use std::time::Duration;

use async_trait::async_trait;
use dim_client::{Client, ClientError, Job, Problem};
use dim_model::ident::{NodeId, Topic};
use dim_network::lone_writer::Progress;
use dim_server::config::Topics;
use reqwest::Method;
use serde_json::Value;

use super::{Answer, Transport, Undelivered};
use crate::notice::{JobEvent, Notice, Word};

/// The time limit of a call, including its answer. A broken connection reports no error.
const PATIENCE: Duration = Duration::from_secs(15);

/// The transport to a host.
#[derive(Debug)]
pub struct Api {
    /// The client.
    pub client: Client,
    /// The node that sends.
    pub node: NodeId,
    /// The topics of results and heartbeats.
    pub topics: Topics,
}

#[async_trait]
impl Transport for Api {
    fn address(&self) -> String {
        self.client.http().address().to_string()
    }

    async fn tell(&self, notice: &Notice) -> Result<Answer, Undelivered> {
        let told = match &notice.word {
            Word::Event(event) => self.tell_event(notice, event).await,
            Word::Result(_) => {
                let message = notice.message(&self.node);
                within(self.client.pubsub().publish(self.topics.results_ready.as_str(), message)).await
            }
        };
        match told {
            Ok(()) => Ok(Answer::Taken),
            Err(Failure::Problem(problem)) if is_final(&problem) => Ok(Answer::Refused(problem.detail)),
            Err(failure) => Err(failure.into()),
        }
    }

    async fn beat(&self, heartbeat: String) -> Result<(), Undelivered> {
        let topic = self.topics.node_heartbeat.as_str();
        Ok(within(self.client.pubsub().publish(topic, heartbeat)).await?)
    }

    fn repeats(&self) -> &'static [Duration] {
        &[]
    }

    async fn progress(&self, _: &Topic) -> Progress {
        Progress::default()
    }

    async fn acknowledged_within(&self) -> Duration {
        Duration::ZERO
    }

    async fn audience(&self) -> Result<(), Undelivered> {
        Ok(())
    }
}

impl Api {
    async fn tell_event(&self, notice: &Notice, event: &JobEvent) -> Result<(), Failure> {
        let segments = ["jobs", notice.job.as_str(), "events"];
        let body = notice.body(&self.node);
        let sent = self.client.http().send_json::<Value>(Method::POST, &segments, &[], &body);
        match within(sent).await {
            Ok(_) => Ok(()),
            // If the answer of an earlier call was lost, the conflict may be with this same notice.
            Err(Failure::Problem(problem)) if problem.status == 409 => {
                let job = within(self.client.fleet().get_job(notice.job.as_str())).await?;
                if is_what_we_said(&job, event, &self.node) { Ok(()) } else { Err(Failure::Problem(problem)) }
            }
            Err(failure) => Err(failure),
        }
    }
}

/// The error of a call.
enum Failure {
    Problem(Problem),
    Away(String),
}

impl From<Failure> for Undelivered {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Away(why) => Self::Away(why),
            // A plugin that traps or has no more space may accept the next notice.
            Failure::Problem(problem) if matches!(problem.status, 422 | 500) => Self::NotNow(problem.detail),
            Failure::Problem(problem) => Self::Away(problem.detail),
        }
    }
}

/// Returns whether another call would have the same answer. The refusal of a plugin has another kind, because it may
/// be caused by a full state.
fn is_final(problem: &Problem) -> bool {
    ["invalid", "conflict", "too-large"].contains(&problem.kind.as_str())
}

async fn within<R>(call: impl Future<Output = Result<R, ClientError>>) -> Result<R, Failure> {
    match tokio::time::timeout(PATIENCE, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(ClientError::Problem(problem))) => Err(Failure::Problem(*problem)),
        Ok(Err(error)) => Err(Failure::Away(first_and_last(&error))),
        Err(_) => Err(Failure::Away(format!("no answer within {PATIENCE:?}"))),
    }
}

/// Returns the first and the last error of a chain. The errors between them are internal to the HTTP client.
fn first_and_last(error: &ClientError) -> String {
    let mut last: &dyn std::error::Error = error;
    while let Some(cause) = last.source() {
        last = cause;
    }
    let (first, last) = (error.to_string(), last.to_string());
    if first == last { first } else { format!("{first}: {last}") }
}

/// Returns whether a job has the state that an event of this node caused.
fn is_what_we_said(job: &Job, event: &JobEvent, node: &NodeId) -> bool {
    job.status == event.event_type.name()
        && job.node_id.as_deref() == Some(node.as_str())
        && event
            .result
            .as_ref()
            .is_none_or(|result| job.result.as_ref().is_some_and(|known| same(known, &result.value())))
}

/// Returns whether two values are equal, except for the last digits of fractions, which some readers of JSON change.
fn same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => {
            one == other
                || matches!((one.as_f64(), other.as_f64()), (Some(one), Some(other))
                    if (one - other).abs() <= 1e-12 * one.abs().max(other.abs()))
        }
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| same(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            one.len() == other.len()
                && one.iter().all(|(name, one)| other.get(name).is_some_and(|other| same(one, other)))
        }
        (one, other) => one == other,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_job_is_ours_only_with_our_node_and_our_result() {
        let node: NodeId = "n".parse().unwrap();
        let event: JobEvent =
            serde_json::from_str(r#"{"event_type":"completed","result":{"loss":0.1,"n":[1]}}"#).unwrap();
        let job = |change: Value| -> Job {
            let mut job = json!({
                "job_id": "j", "status": "completed", "updated_at": "2026-01-01T00:00:00Z", "node_id": "n",
                "result": { "loss": 0.10000000000000002, "n": [1] },
            });
            job.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            serde_json::from_value(job).unwrap()
        };
        assert!(is_what_we_said(&job(json!({})), &event, &node));
        for other in [
            json!({ "status": "failed" }),
            json!({ "node_id": "m" }),
            json!({ "node_id": null }),
            json!({ "result": null }),
            json!({ "result": { "loss": 0.2, "n": [1] } }),
            json!({ "result": { "loss": 0.1, "n": [1, 2] } }),
        ] {
            assert!(!is_what_we_said(&job(other.clone()), &event, &node), "{other}");
        }
    }

    #[test]
    fn only_what_stays_wrong_is_final() {
        let problem = |status, kind: &str| Problem {
            kind: kind.to_owned(),
            title: String::new(),
            status,
            missing: Vec::new(),
            digest: None,
            detail: String::new(),
        };
        assert!(is_final(&problem(409, "conflict")) && is_final(&problem(400, "invalid")));
        for (status, kind) in [(422, "refused"), (404, "no-plugin"), (503, "unavailable"), (429, "slow")] {
            assert!(!is_final(&problem(status, kind)), "{kind}");
        }
    }
}
