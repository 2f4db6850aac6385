//! What is wrong with a host, as programs and people read it.

use std::collections::BTreeMap;
use std::sync::Mutex;

use serde::Serialize;
use utoipa::ToSchema;

use crate::time::Timestamp;

/// How bad a trouble is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Something happened, or comes near a limit; the host does all of its work.
    Warning,
    /// The host does not do all of its work now.
    Error,
}

/// The kind of a trouble. It stays the same when the message is worded anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The host has failed and is started again.
    HostDown,
    /// The file of a key is gone.
    KeyLost,
    /// The disk is short: nothing is taken in.
    IntakeStopped,
    /// A plugin is refused.
    PluginNotLoaded,
    /// Plugins are still compiled.
    PluginsLoading,
    /// A plugin has failed to start too often.
    PluginQuarantined,
    /// A plugin does not start, and is tried again.
    PluginFailing,
    /// Another host of the fleet lacks what this one knows of jobs.
    JobsDiffer,
    /// The operator has paused a plugin.
    PluginPaused,
    /// New code of a plugin was taken back.
    PluginTakenBack,
    /// The folder of plugins is empty, cannot be read or is gone.
    PluginsFolder,
    /// The daemon does not answer.
    DaemonAway,
    /// Messages of a topic may be missed.
    NotListening,
    /// Publishes wait for long.
    PublishesLate,
    /// More publishes are refused.
    QueueFull,
    /// A name waits for long to be published.
    NameLate,
    /// The record of a name ends soon.
    RecordEnding,
    /// The operator has to decide about a name.
    NameOnHold,
    /// A document is too large to be published.
    DocumentTooLarge,
    /// A document is nearly too large.
    DocumentNearLimit,
    /// The log waits for a plugin that does not read it.
    LogTooLong,
    /// Messages of peers that may not speak on a topic were refused.
    MessagesRefused,
    /// Messages of a topic were lost.
    MessagesLost,
    /// Dead letters were dropped.
    LettersDropped,
    /// Rows of an imported document were left out.
    RowsLeftOut,
    /// The registry of another host cannot be merged.
    RegistryNotMerged,
    /// A name that is followed has not been found.
    NameNotFound,
}

/// What is wrong, or was.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Trouble {
    /// Its kind.
    pub code: Code,
    /// How bad it is.
    pub severity: Severity,
    /// Since when; null if that is not known.
    #[schema(required)]
    pub since: Option<Timestamp>,
    /// The plugin, topic, key or other thing that it is about; null for the host as a whole.
    #[schema(required)]
    pub subject: Option<String>,
    /// Whether it describes past events: it is shown until the operator acknowledges them.
    #[serde(rename = "past", serialize_with = "is_some")]
    #[schema(value_type = bool)]
    pub events: Option<u64>,
    /// What is wrong, why, and what to do, in a sentence.
    pub message: String,
}

/// Programs read whether there are events; how many is in the message.
fn is_some<S: serde::Serializer>(events: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bool(events.is_some())
}

impl Trouble {
    /// A trouble because of which the host does not do all of its work.
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

    /// A trouble that the operator should know of, while the host does all of its work.
    pub fn warning(code: Code, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(code, message) }
    }

    /// A number of past events that the operator should know of; none is no trouble.
    pub fn events(code: Code, count: u64, message: impl FnOnce() -> String) -> Option<Self> {
        (count > 0).then(|| Self { events: Some(count), ..Self::warning(code, message()) })
    }

    /// Says since when.
    #[must_use]
    pub fn since(self, since: Timestamp) -> Self {
        Self { since: Some(since), ..self }
    }

    /// Says what it is about.
    #[must_use]
    pub fn about(self, subject: impl ToString) -> Self {
        Self { subject: Some(subject.to_string()), ..self }
    }

    /// Whether the host does not do all of its work because of it.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

/// The past events that the operator has acknowledged: how many of each kind and subject there were by then.
#[derive(Debug, Default)]
pub struct Acknowledged(Mutex<BTreeMap<(Code, Option<String>), u64>>);

impl Acknowledged {
    /// Acknowledges what the troubles describe, as far as it is past.
    pub fn put_aside(&self, troubles: &[Trouble]) {
        let mut known = self.0.lock().expect(UNHURT);
        let past = troubles.iter().filter_map(|trouble| Some((trouble, trouble.events?)));
        known.extend(past.map(|(trouble, count)| ((trouble.code, trouble.subject.clone()), count)));
    }

    /// Whether a trouble is to be shown: it is present, or more has happened since it was acknowledged.
    pub fn shows(&self, trouble: &Trouble) -> bool {
        let Some(count) = trouble.events else { return true };
        // A count that has become less began anew.
        self.0.lock().expect(UNHURT).get(&(trouble.code, trouble.subject.clone())) != Some(&count)
    }
}

const UNHURT: &str = "no one panics while holding what is acknowledged";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_past_event_is_put_aside_until_the_next_one_of_its_kind_and_subject() {
        let acknowledged = Acknowledged::default();
        let refused = |topic: &str, count| {
            let trouble = Trouble::events(Code::MessagesRefused, count, || "refused".to_owned());
            trouble.expect("it has happened").about(topic)
        };
        let present = Trouble::warning(Code::DocumentNearLimit, "near");
        acknowledged.put_aside(&[refused("a", 1), present.clone()]);
        assert!(!acknowledged.shows(&refused("a", 1)));
        assert!(acknowledged.shows(&refused("a", 2)) && acknowledged.shows(&refused("b", 1)));
        assert!(acknowledged.shows(&present), "what is so now is not over");
        assert_eq!(Trouble::events(Code::MessagesLost, 0, || unreachable!("nothing has happened")), None);
    }
}
