//! Owns the settings of the exchange with the network. The host makes them from its config file and replaces them on
//! a reload.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use dim_model::ident::{GroupName, KeyName, PeerName, Topic};
use dim_store::grants::TopicPattern;

/// The settings that subscriptions and names read at each use.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The peers from which messages are accepted, for each topic or prefix with such a restriction.
    pub accepted_peers: BTreeMap<TopicPattern, BTreeSet<PeerName>>,
    /// The pause between two requests for the same followed name.
    pub follow_every: Duration,
    /// The keys whose documents are encrypted, with the groups that read them.
    pub encrypted_names: BTreeMap<KeyName, GroupName>,
}

impl Settings {
    /// Returns the peers that may publish on `topic`, or `None` if every peer may. The closest pattern decides.
    pub fn speakers(&self, topic: &Topic) -> Option<&BTreeSet<PeerName>> {
        TopicPattern::closest(&self.accepted_peers, topic)
    }
}
