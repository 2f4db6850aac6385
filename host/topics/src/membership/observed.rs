//! Owns what a member observes of the others: when it heard each member, with which roster and keys, and what it refused.
//! It receives heads, bundles and refusals that were checked.

use std::collections::BTreeMap;

use dim_model::ident::GroupName;
use dim_model::time::Timestamp;

use super::Refusal;
use crate::identity::WriterId;

/// What is known of a member since the start of this process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The own time at which its last head arrived.
    pub heard: Option<Timestamp>,
    /// The version of the roster that its last head stated; `None` if it had none.
    pub roster: Option<u64>,
    /// For each group: the key epoch of the last bundle that arrived as a message, by its identity.
    pub epochs: BTreeMap<GroupName, [u8; 16]>,
}

/// How often something was refused for one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The number of messages and blocks.
    pub count: u64,
    /// The writer of the last one.
    pub writer: WriterId,
    /// The own time of the last one.
    pub at: Timestamp,
}

/// What a member observes of the others. Only members have a row, so the roster bounds the number of rows.
#[derive(Debug, Default)]
pub struct Observations {
    members: BTreeMap<WriterId, Observed>,
    refused: BTreeMap<Refusal, Refused>,
}

impl Observations {
    /// Notes the head of a member.
    pub fn heard(&mut self, member: WriterId, roster: Option<u64>, at: Timestamp) {
        let observed = self.members.entry(member).or_default();
        (observed.heard, observed.roster) = (Some(at), roster);
    }

    /// Notes the key epoch of a bundle of a member that arrived as a message.
    pub fn wrote(&mut self, member: WriterId, group: &GroupName, epoch: [u8; 16]) {
        let epochs = &mut self.members.entry(member).or_default().epochs;
        if epochs.get(group) != Some(&epoch) {
            epochs.insert(group.clone(), epoch);
        }
    }

    /// Notes that something of a writer was refused.
    pub fn refuse(&mut self, why: Refusal, writer: WriterId, at: Timestamp) {
        let count = self.refused.get(&why).map_or(0, |it| it.count) + 1;
        self.refused.insert(why, Refused { count, writer, at });
    }

    /// Forgets those that are no members any more.
    pub fn retain(&mut self, is_member: impl Fn(&WriterId) -> bool) {
        self.members.retain(|member, _| is_member(member));
    }

    /// The members that were heard.
    pub fn members(&self) -> &BTreeMap<WriterId, Observed> {
        &self.members
    }

    /// What is known of a member.
    pub fn of(&self, member: &WriterId) -> Option<&Observed> {
        self.members.get(member)
    }

    /// What was refused, by the reason.
    pub fn refused(&self) -> &BTreeMap<Refusal, Refused> {
        &self.refused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_head_and_the_last_key_of_a_member_count_until_it_leaves() {
        let (one, other) = (WriterId([1; 32]), WriterId([2; 32]));
        let group: GroupName = "all".parse().unwrap();
        let mut it = Observations::default();
        it.heard(one, Some(3), Timestamp(5));
        it.heard(one, Some(4), Timestamp(6));
        it.wrote(one, &group, [1; 16]);
        it.wrote(one, &group, [2; 16]);
        it.heard(other, None, Timestamp(7));
        let epochs = [(group, [2; 16])].into();
        let expected = Observed { heard: Some(Timestamp(6)), roster: Some(4), epochs };
        assert_eq!(it.of(&one), Some(&expected));
        it.retain(|member| *member == one);
        assert_eq!((it.of(&one), it.of(&other)), (Some(&expected), None));
    }

    #[test]
    fn refusals_are_counted_by_their_reason() {
        let mut it = Observations::default();
        it.refuse(Refusal::Stranger, WriterId([1; 32]), Timestamp(5));
        it.refuse(Refusal::Removed, WriterId([2; 32]), Timestamp(6));
        it.refuse(Refusal::Stranger, WriterId([3; 32]), Timestamp(7));
        let stranger = Refused { count: 2, writer: WriterId([3; 32]), at: Timestamp(7) };
        assert_eq!(it.refused()[&Refusal::Stranger], stranger);
        assert_eq!(it.refused()[&Refusal::Removed].count, 1);
    }
}
