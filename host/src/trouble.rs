//! What is wrong with a host, as programs and people read it.

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
    /// What is wrong, why, and what to do, in a sentence.
    pub message: String,
}

impl Trouble {
    /// A trouble because of which the host does not do all of its work.
    pub fn error(code: Code, message: impl Into<String>) -> Self {
        Self { code, severity: Severity::Error, since: None, subject: None, message: message.into() }
    }

    /// A trouble that the operator should know of, while the host does all of its work.
    pub fn warning(code: Code, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(code, message) }
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
