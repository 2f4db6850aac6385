//! Owns notices: the reports of a node's programs about jobs. It receives their JSON, and returns notices in the form
//! of the spool and of messages.

use dim_model::ident::{CidText, JobId, NodeId};
use dim_model::time::Timestamp;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use thiserror::Error;

/// A report about a job, with its time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Notice {
    /// The job.
    pub job: JobId,
    /// The time at which the notice was given. It may be sent much later.
    pub given: Timestamp,
    /// The content.
    pub word: Word,
}

/// The content of a notice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Word {
    /// The job changed its status.
    Event(JobEvent),
    /// The result of the job is available under a CID.
    Result(CidText),
}

/// A change of a job's status.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobEvent {
    /// The new status.
    pub event_type: EventType,
    /// Data of the event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Verbatim>,
    /// The result of the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Verbatim>,
}

/// JSON that is passed on unchanged. Every reader of JSON accepts it: its nesting is bounded, and its strings are
/// Unicode.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct Verbatim(Box<RawValue>);

impl<'de> Deserialize<'de> for Verbatim {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        let read: Result<Value, _> = serde_json::from_str(raw.get());
        read.map_err(D::Error::custom)?;
        Ok(Self(raw))
    }
}

impl Verbatim {
    /// Returns the parsed value.
    pub fn value(&self) -> Value {
        serde_json::from_str(self.0.get()).expect("it was read before")
    }
}

impl PartialEq for Verbatim {
    fn eq(&self, other: &Self) -> bool {
        self.0.get() == other.0.get()
    }
}

/// The statuses that a node can report, in the terms of the job tracker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventType {
    /// The node started the job.
    Running,
    /// The job completed.
    Completed,
    /// The job failed.
    Failed,
}

impl EventType {
    /// Returns the status as the tracker names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
        }
    }
}

impl Word {
    /// Returns the name of the content for log lines.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Event(event) => event.event_type.name(),
            Self::Result(_) => "result",
        }
    }
}

impl Notice {
    /// Returns the body of an API call about the job, which does not contain the job's id.
    pub fn body<'a>(&'a self, node: &'a NodeId) -> Body<'a> {
        let (event, result_cid) = match &self.word {
            Word::Event(event) => (Some(event), None),
            Word::Result(cid) => (None, Some(cid)),
        };
        Body {
            job_id: None,
            event_type: event.map(|event| event.event_type),
            data: event.and_then(|event| event.data.as_ref()),
            result: event.and_then(|event| event.result.as_ref()),
            result_cid,
            timestamp: self.given,
            node_id: node,
        }
    }

    /// Returns the message for a topic, in the form that all programs of a fleet use.
    pub fn message(&self, node: &NodeId) -> String {
        let message = Body { job_id: Some(&self.job), ..self.body(node) };
        serde_json::to_string(&message).expect("a notice is plain data")
    }
}

/// A notice as receivers read it.
#[derive(Debug, Serialize)]
pub struct Body<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    job_id: Option<&'a JobId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    event_type: Option<EventType>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'a Verbatim>,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<&'a Verbatim>,
    #[serde(skip_serializing_if = "Option::is_none")]
    result_cid: Option<&'a CidText>,
    timestamp: Timestamp,
    node_id: &'a NodeId,
}

/// A notice as a program of the node writes it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Given {
    job_id: JobId,
    event_type: Option<EventType>,
    result_cid: Option<CidText>,
    data: Option<Verbatim>,
    result: Option<Verbatim>,
}

/// The error of a body that is not a valid notice.
#[derive(Debug, Error)]
pub enum NotANotice {
    /// The notice has no content, or more than one.
    #[error("a notice has either an `event_type` (running, completed or failed) or a `result_cid`")]
    Either,
    /// The notice has fields that do not belong to a CID.
    #[error("`data` and `result` go with an `event_type`, not with a `result_cid`")]
    TooMuch,
}

impl Given {
    /// Returns the job and the content.
    ///
    /// # Errors
    /// The content is missing, given twice or mixed.
    pub fn read(self) -> Result<(JobId, Word), NotANotice> {
        let Self { job_id, event_type, result_cid, data, result } = self;
        let word = match (event_type, result_cid) {
            (Some(event_type), None) => Word::Event(JobEvent { event_type, data, result }),
            (None, Some(_)) if data.is_some() || result.is_some() => return Err(NotANotice::TooMuch),
            (None, Some(cid)) => Word::Result(cid),
            (Some(_), Some(_)) | (None, None) => return Err(NotANotice::Either),
        };
        Ok((job_id, word))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(text: &str) -> Result<(JobId, Word), String> {
        let given: Given = serde_json::from_str(text).map_err(|error| error.to_string())?;
        given.read().map_err(|error| error.to_string())
    }

    const CID: &str = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy";

    #[test]
    fn a_message_says_who_what_and_when() {
        let (job, word) =
            read(r#"{"job_id":"j","event_type":"failed","data":{"reason":"no disk"}}"#).unwrap();
        let notice = Notice { job, given: Timestamp(1_500_000_000), word };
        let message: Value = serde_json::from_str(&notice.message(&"n".parse().unwrap())).unwrap();
        let said = json!({
            "job_id": "j", "event_type": "failed", "data": { "reason": "no disk" },
            "node_id": "n", "timestamp": "1970-01-01T00:00:01.5Z",
        });
        assert_eq!(message, said);
        let kept: Notice = serde_json::from_slice(&serde_json::to_vec(&notice).unwrap()).unwrap();
        assert_eq!(kept, notice);
    }

    #[test]
    fn what_goes_with_a_notice_is_passed_on_to_the_letter() {
        let exact = r#"{"e":1E5, "d":{"b":1,"a":2.50},"s":"\u00e9\/"}"#;
        let (job, word) =
            read(&format!(r#"{{"job_id":"j","event_type":"completed","data":{exact},"result":{exact}}}"#))
                .unwrap();
        let notice = Notice { job, given: Timestamp(0), word };
        let kept: Notice = serde_json::from_slice(&serde_json::to_vec(&notice).unwrap()).unwrap();
        let message = kept.message(&"n".parse().unwrap());
        assert_eq!(message.matches(exact).count(), 2, "{message}");
    }

    #[test]
    fn what_is_no_notice_is_refused_with_the_reason() {
        let (_, word) = read(&format!(r#"{{"job_id":"j","result_cid":"{CID}"}}"#)).unwrap();
        assert_eq!(word.name(), "result");
        for (text, why) in [
            ("", "EOF"),
            ("{}", "job_id"),
            (r#"{"job_id":"j"}"#, "either"),
            (&format!(r#"{{"job_id":"j","event_type":"failed","result_cid":"{CID}"}}"#), "either"),
            (&format!(r#"{{"job_id":"j","result_cid":"{CID}","data":1}}"#), "go with an `event_type`"),
            (r#"{"job_id":"j","event_type":"exploded"}"#, "exploded"),
            (r#"{"job_id":"j","event_type":"failed","reason":"x"}"#, "unknown field `reason`"),
            (r#"{"job_id":"a\u0000b","event_type":"failed"}"#, "control character"),
            (r#"{"job_id":"..","event_type":"failed"}"#, "cannot be part of a URL"),
            (r#"{"job_id":"j","result_cid":"/ipfs/x"}"#, "cannot be read"),
        ] {
            let refused = read(text).unwrap_err();
            assert!(refused.contains(why), "{text}: {refused}");
        }
    }
}
