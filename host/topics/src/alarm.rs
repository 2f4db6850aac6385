//! Owns the alarms: findings that an operator must know, because a writer was copied, was restored from a backup, has
//! lost data, or misbehaves.

use std::fmt;

use dim_model::ident::Topic;

use crate::identity::{Digest, Incarnation, WriterId};

/// A finding about a writer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Alarm {
    /// The topic.
    pub topic: Topic,
    /// The writer.
    pub writer: WriterId,
    /// The finding.
    pub finding: Finding,
}

/// The kind of a finding, with its proof.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Finding {
    /// Two different bundles have an event under the same identity. The bundle that was seen first is valid.
    Fork {
        /// The incarnation.
        incarnation: Incarnation,
        /// The sequence of the first event of the bundle that is refused.
        first: u64,
        /// The bundle that was seen first, if its digest is still known.
        kept: Option<Digest>,
        /// The bundle that is refused.
        refused: Digest,
    },
    /// Two incarnations continue the same incarnation: the writer's state directory was copied or restored.
    RunningTwice {
        /// The incarnation that both continue.
        previous: Incarnation,
        /// The incarnation that was seen first.
        one: Incarnation,
        /// The other incarnation.
        other: Incarnation,
    },
    /// Two incarnations continue none: the writer has lost its whole log, or two programs have the same key.
    TwoBeginnings {
        /// The incarnation that was seen first.
        one: Incarnation,
        /// The other incarnation.
        other: Incarnation,
    },
    /// A writer was started again and does not know the end of its log: it has lost its newest events.
    Forgot {
        /// The incarnation whose end was lost.
        previous: Incarnation,
        /// The sequence after the last event that the writer remembers.
        remembered: u64,
        /// The sequence after the last event that this member has received.
        received: u64,
    },
    /// Another member has received events of a replaced incarnation that the writer no longer knows.
    Lost {
        /// The incarnation.
        incarnation: Incarnation,
        /// The sequence after its last event, as the writer knows it.
        remembered: u64,
        /// The sequence after the last event that the other member has received.
        received: u64,
    },
    /// Another program writes with the key of this member.
    OwnKey {
        /// The incarnation of the other program.
        incarnation: Incarnation,
    },
    /// The writer has more incarnations than a member follows. Further ones are refused.
    TooManyIncarnations,
    /// An incarnation appeared that is older than those that were removed. It is refused.
    Outdated {
        /// The incarnation.
        incarnation: Incarnation,
    },
    /// Another member has such a finding about the writer.
    Reported {
        /// The other member.
        by: WriterId,
    },
    /// The time of the writer is too far ahead. Its events are delivered.
    ClockAhead,
}

/// The maximum number of findings about one writer of a topic, and of those about this member. Further ones are not
/// reported: an operator must look at the writer anyway.
pub const MAX_FINDINGS: usize = 64;

impl Finding {
    /// What the finding is about, without the numbers and proofs that change while the trouble goes on. One finding is
    /// reported for each subject, so that a copy that runs on does not raise an alarm for each of its bundles.
    pub fn subject(&self) -> Self {
        match *self {
            Self::Fork { incarnation, .. } => {
                Self::Fork { incarnation, first: 0, kept: None, refused: Digest([0; 32]) }
            }
            Self::Forgot { previous, .. } => Self::Forgot { previous, remembered: 0, received: 0 },
            Self::Lost { incarnation, .. } => Self::Lost { incarnation, remembered: 0, received: 0 },
            ref other => other.clone(),
        }
    }

    /// Whether heads report the finding to the other members: it is about the identity of events.
    pub fn is_reported(&self) -> bool {
        match self {
            Self::Fork { .. }
            | Self::RunningTwice { .. }
            | Self::TwoBeginnings { .. }
            | Self::Forgot { .. }
            | Self::Lost { .. }
            | Self::OwnKey { .. } => true,
            Self::TooManyIncarnations | Self::Outdated { .. } | Self::Reported { .. } | Self::ClockAhead => {
                false
            }
        }
    }
}

impl fmt::Display for Alarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { topic, writer, finding } = self;
        write!(f, "topic {topic}, writer {writer}: {finding}")
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fork { incarnation, first, kept, refused } => {
                let kept = kept.map_or_else(String::new, |kept| format!(", bundle {kept},"));
                write!(
                    f,
                    "two different events have the number {first} of incarnation {incarnation}; the first one{kept} is valid and the bundle {refused} is refused"
                )
            }
            Self::RunningTwice { previous, one, other } => write!(
                f,
                "incarnations {one} and {other} both continue {previous}: the state directory was copied, or restored from a backup"
            ),
            Self::Forgot { previous, remembered, received } => write!(
                f,
                "it knows {remembered} events of its incarnation {previous}, but {received} were received, or others after it: it has lost its newest events"
            ),
            Self::Lost { incarnation, remembered, received } => write!(
                f,
                "it knows {remembered} events of incarnation {incarnation}, but another member has received {received}: it has lost its newest events"
            ),
            Self::OwnKey { incarnation } => write!(
                f,
                "another program writes with the key of this host, as incarnation {incarnation}: the state directory was copied, or restored from a backup"
            ),
            Self::TwoBeginnings { one, other } => write!(
                f,
                "incarnations {one} and {other} both continue none: it has lost its whole log, or two programs have the same key"
            ),
            Self::Reported { by } => write!(f, "member {by} reports an alarm about it"),
            Self::TooManyIncarnations => {
                f.write_str("it has too many incarnations; further ones are refused")
            }
            Self::Outdated { incarnation } => {
                write!(f, "incarnation {incarnation} is older than those that are remembered; it is refused")
            }
            Self::ClockAhead => f.write_str("its clock is too far ahead"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trouble_that_goes_on_is_one_finding() {
        let (one, other) = (Incarnation([1; 16]), Incarnation([2; 16]));
        let forgot = |previous, received| Finding::Forgot { previous, remembered: 1, received };
        assert_eq!(forgot(one, 5).subject(), forgot(one, 6).subject());
        assert_ne!(forgot(one, 5).subject(), forgot(other, 5).subject());
        let fork = |incarnation, first| {
            let kept = Some(Digest([3; 32]));
            Finding::Fork { incarnation, first, kept, refused: Digest([4; 32]) }
        };
        assert_eq!(fork(one, 5).subject(), fork(one, 6).subject());
        assert_ne!(fork(one, 5).subject(), fork(other, 5).subject());
        let reported = |by| Finding::Reported { by: WriterId([by; 32]) };
        assert_ne!(reported(1).subject(), reported(2).subject());
    }
}
