//! Owns the health findings of a host, for programs and people. It receives findings and the operator's
//! acknowledgements, and returns which findings to show.

use std::collections::BTreeMap;
use std::sync::Mutex;

use serde::Serialize;
use utoipa::ToSchema;

use crate::time::Timestamp;

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Something happened, or a limit is near. The host does all of its work.
    Warning,
    /// The host does not do all of its work.
    Error,
}

/// The kind of a finding. It stays the same when the wording of the message changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The host failed and restarts.
    HostDown,
    /// The file of a key is missing.
    KeyLost,
    /// The disk is full and the intake is stopped.
    IntakeStopped,
    /// A plugin was refused.
    PluginNotLoaded,
    /// Plugins are still being compiled.
    PluginsLoading,
    /// A plugin failed to start too often and is in quarantine.
    PluginQuarantined,
    /// A plugin does not start; the host tries again.
    PluginFailing,
    /// Another host of the fleet lacks jobs that this host knows.
    JobsDiffer,
    /// The operator paused a plugin.
    PluginPaused,
    /// New code of a plugin was rolled back.
    PluginTakenBack,
    /// The folder of plugins is empty, unreadable or missing.
    PluginsFolder,
    /// The daemon does not answer.
    DaemonAway,
    /// The host may miss messages of a topic.
    NotListening,
    /// Publishes wait too long.
    PublishesLate,
    /// The outbox is full and further publishes are refused.
    QueueFull,
    /// A name waits too long for its publication.
    NameLate,
    /// The record of a name ends soon.
    RecordEnding,
    /// A name is on hold until the operator decides.
    NameOnHold,
    /// A document is too large to publish.
    DocumentTooLarge,
    /// The size of a document is near its maximum.
    DocumentNearLimit,
    /// The log grows because a plugin does not handle its entries.
    LogTooLong,
    /// Messages of peers that the config does not allow on a topic were refused.
    MessagesRefused,
    /// Messages of a topic were lost.
    MessagesLost,
    /// A writer of a reliable topic was copied, was restored from a backup, or has lost events.
    WriterAlarm,
    /// Writers of a reliable topic were refused, because there are too many.
    WritersRefused,
    /// The host cannot write or read encrypted topics of its fleet, or will not be able to soon.
    FleetProblem,
    /// The admins of the fleet have signed two rosters of one version.
    FleetAlarm,
    /// Dead letters were dropped.
    LettersDropped,
    /// Rows of an imported document were left out.
    RowsLeftOut,
    /// The registry of another host cannot be merged.
    RegistryNotMerged,
    /// A followed name was not found.
    NameNotFound,
    /// The published document of a name is not encrypted, although the config requires it.
    DocumentNotEncrypted,
    /// The config has settings for a key that the host does not have.
    KeyUnknown,
}

/// A problem of the host, present or past.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = Trouble)]
pub struct HealthFinding {
    /// Its kind.
    pub code: Code,
    /// Its severity.
    pub severity: Severity,
    /// Its start; null if the start is unknown.
    #[schema(required)]
    pub since: Option<Timestamp>,
    /// The subject: a plugin, topic, key or another thing; null for the host as a whole.
    #[schema(required)]
    pub subject: Option<String>,
    /// Whether it describes past events. It is shown until the operator acknowledges them.
    #[serde(rename = "past", serialize_with = "is_some")]
    #[schema(value_type = bool)]
    pub events: Option<u64>,
    /// The problem, its cause and the remedy, in one sentence.
    pub message: String,
}

/// Serializes only whether there are events. The message contains their number.
fn is_some<S: serde::Serializer>(events: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bool(events.is_some())
}

impl HealthFinding {
    /// Makes a finding of a problem that keeps the host from all of its work.
    pub fn error(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            severity: Severity::Error,
            since: None,
            subject: None,
            events: None,
            message: message.into(),
        }
    }

    /// Makes a finding that the operator should know, while the host does all of its work.
    pub fn warning(code: Code, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(code, message) }
    }

    /// Makes a finding of `count` past events, or returns `None` if `count` is 0.
    pub fn events(code: Code, count: u64, message: impl FnOnce() -> String) -> Option<Self> {
        (count > 0).then(|| Self { events: Some(count), ..Self::warning(code, message()) })
    }

    /// Sets the start.
    #[must_use]
    pub fn since(self, since: Timestamp) -> Self {
        Self { since: Some(since), ..self }
    }

    /// Sets the subject.
    #[must_use]
    pub fn about(self, subject: impl ToString) -> Self {
        Self { subject: Some(subject.to_string()), ..self }
    }

    /// Returns whether the problem keeps the host from all of its work.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

/// The past events that the operator acknowledged: their number for each kind and subject.
#[derive(Debug, Default)]
pub struct Acknowledged(Mutex<BTreeMap<(Code, Option<String>), u64>>);

impl Acknowledged {
    /// Acknowledges the past events of the findings. Findings of present problems are ignored.
    pub fn put_aside(&self, troubles: &[HealthFinding]) {
        let mut known = self.0.lock().expect(UNHURT);
        let past = troubles.iter().filter_map(|trouble| Some((trouble, trouble.events?)));
        known.extend(past.map(|(trouble, count)| ((trouble.code, trouble.subject.clone()), count)));
    }

    /// Returns whether a finding must be shown: the problem is present, or the number of events differs from the
    /// acknowledged one.
    pub fn shows(&self, trouble: &HealthFinding) -> bool {
        let Some(count) = trouble.events else { return true };
        // A number that decreased started again from zero.
        self.0.lock().expect(UNHURT).get(&(trouble.code, trouble.subject.clone())) != Some(&count)
    }
}

const UNHURT: &str = "no thread panics while it holds the acknowledged findings";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_past_event_is_put_aside_until_the_next_one_of_its_kind_and_subject() {
        let acknowledged = Acknowledged::default();
        let refused = |topic: &str, count| {
            let trouble = HealthFinding::events(Code::MessagesRefused, count, || "refused".to_owned());
            trouble.expect("it has happened").about(topic)
        };
        let present = HealthFinding::warning(Code::DocumentNearLimit, "near");
        acknowledged.put_aside(&[refused("a", 1), present.clone()]);
        assert!(!acknowledged.shows(&refused("a", 1)));
        assert!(acknowledged.shows(&refused("a", 2)) && acknowledged.shows(&refused("b", 1)));
        assert!(acknowledged.shows(&present), "what is so now is not over");
        assert_eq!(
            HealthFinding::events(Code::MessagesLost, 0, || unreachable!("nothing has happened")),
            None
        );
    }
}
