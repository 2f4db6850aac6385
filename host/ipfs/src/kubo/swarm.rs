//! Owns the connections of a Kubo daemon to other daemons. It receives daemons with their addresses. It returns the own
//! daemon, and whether it is connected.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dim_model::ident::PeerName;
use multiaddr::{Multiaddr, Protocol};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::rpc::{Call, Rpc};
use crate::{BackendError, Daemon, Swarm};

/// The time limit of connecting to a daemon. It includes the search for its addresses.
const CONNECT: Duration = Duration::from_secs(10);

/// The connections of a daemon.
#[derive(Debug)]
pub struct Connections {
    rpc: Arc<Rpc>,
}

impl Connections {
    pub fn new(rpc: Arc<Rpc>) -> Self {
        Self { rpc }
    }

    /// Whether the operator of the daemon has named a peer in its config (`Peering.Peers`). The host leaves it alone.
    async fn is_configured(&self, peer: &PeerName) -> bool {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Setting {
            value: Option<Vec<Peer>>,
        }
        #[derive(Deserialize)]
        struct Peer {
            #[serde(rename = "ID")]
            id: String,
        }
        // A daemon without the setting refuses the call.
        let setting: Result<Setting, _> = self.rpc.json(Call::new("config").arg("Peering.Peers")).await;
        let peers = setting.ok().and_then(|setting| setting.value).unwrap_or_default();
        peers.iter().any(|it| it.id.parse().is_ok_and(|id: PeerName| id == *peer))
    }

    async fn id(&self) -> Result<Id, BackendError> {
        self.rpc.json(Call::new("id")).await
    }
}

/// The answer of `id`. A daemon without a network has no addresses.
#[derive(Deserialize)]
struct Id {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "Addresses")]
    addresses: Option<Vec<String>>,
}

impl Id {
    fn peer(&self) -> Result<PeerName, BackendError> {
        self.id.parse().map_err(|error| BackendError::Unbelievable { call: "id", why: format!("{error}") })
    }
}

#[async_trait]
impl Swarm for Connections {
    async fn identity(&self) -> Result<PeerName, BackendError> {
        self.id().await?.peer()
    }

    async fn daemon(&self) -> Result<Daemon, BackendError> {
        let id = self.id().await?;
        let daemon = Daemon::stated(id.peer()?, &id.addresses.unwrap_or_default());
        Ok(daemon.without_loopback())
    }

    async fn is_connected(&self) -> Result<bool, BackendError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Connected {
            peers: Option<Vec<IgnoredAny>>,
        }
        let connected: Connected = self.rpc.json(Call::new("swarm/peers")).await?;
        Ok(connected.peers.is_some_and(|peers| !peers.is_empty()))
    }

    async fn connect(&self, other: &Daemon) -> Result<(), BackendError> {
        let call = with_addresses(Call::new("swarm/connect").timeout(CONNECT), other);
        self.rpc.bytes(call).await.map(drop)
    }

    async fn keep_connected(&self, other: &Daemon) -> Result<(), BackendError> {
        if self.is_configured(&other.peer).await {
            return Ok(());
        }
        self.rpc.bytes(with_addresses(Call::new("swarm/peering/add"), other)).await.map(drop)
    }

    async fn release(&self, other: &PeerName) -> Result<(), BackendError> {
        if self.is_configured(other).await {
            return Ok(());
        }
        self.rpc.bytes(Call::new("swarm/peering/rm").arg(other.as_str())).await.map(drop)
    }
}

/// Adds the addresses of a daemon, or only its peer id, for which the daemon then searches.
fn with_addresses<'a>(call: Call<'a>, other: &Daemon) -> Call<'a> {
    let peer = &other.peer;
    if other.addresses.is_empty() {
        return call.arg(format!("/p2p/{peer}"));
    }
    other.addresses.iter().fold(call, |call, address| call.arg(format!("{address}/p2p/{peer}")))
}

impl Daemon {
    /// Returns a daemon with the multiaddresses that somebody states, without those that a daemon cannot dial.
    pub fn stated(peer: PeerName, addresses: &[String]) -> Self {
        let addresses = addresses.iter().filter_map(|text| dialable(text, &peer)).collect();
        Self { peer, addresses }
    }

    /// Leaves out the addresses of the loopback interface, unless there are no others.
    fn without_loopback(mut self) -> Self {
        let is_local = |address: &Multiaddr| match address.iter().next() {
            Some(Protocol::Ip4(ip)) => ip.is_loopback(),
            Some(Protocol::Ip6(ip)) => ip.is_loopback(),
            _ => false,
        };
        if !self.addresses.iter().all(is_local) {
            self.addresses.retain(|address| !is_local(address));
        }
        self
    }
}

/// Reads a multiaddress that begins with a host. The peer at its end is removed.
fn dialable(text: &str, peer: &PeerName) -> Option<Multiaddr> {
    let mut address: Multiaddr = text.parse().ok()?;
    let end = format!("/p2p/{peer}");
    if address.iter().last().is_some_and(|last| last.to_string() == end) {
        address.pop();
    }
    let mut parts = address.iter();
    let is_host = match parts.next()? {
        Protocol::Ip4(ip) => !ip.is_unspecified(),
        Protocol::Ip6(ip) => !ip.is_unspecified(),
        Protocol::Dns(_) | Protocol::Dns4(_) | Protocol::Dns6(_) => true,
        _ => false,
    };
    let is_transport = matches!(parts.next(), Some(Protocol::Tcp(_) | Protocol::Udp(_)));
    (is_host && is_transport).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: &str = "12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo";

    fn addresses(texts: &[&str]) -> Vec<String> {
        let texts: Vec<String> = texts.iter().map(|&text| text.to_owned()).collect();
        let daemon = Daemon::stated(PEER.parse().unwrap(), &texts).without_loopback();
        daemon.addresses.iter().map(Multiaddr::to_string).collect()
    }

    #[test]
    fn addresses_that_no_daemon_dials_are_left_out() {
        let own = format!("/ip4/192.0.2.1/tcp/4001/p2p/{PEER}");
        let kept = ["/ip4/192.0.2.1/tcp/4001", "/dns4/node.example/udp/4001/quic-v1"];
        assert_eq!(addresses(&[&own, kept[1]]), kept);
        let relayed = format!("/ip4/192.0.2.1/tcp/4001/p2p/{PEER}/p2p-circuit");
        assert_eq!(addresses(&[&relayed]), [relayed.as_str()]);
        let useless = ["", "/", "/ip4/0.0.0.0/tcp/1", "/unix/a", "/ip4/192.0.2.1", "/ip4/300.0.2.1/tcp/1"];
        assert_eq!(addresses(&useless), [""; 0]);
        assert_eq!(addresses(&["http://192.0.2.1/", "/memory/1", "/dnsaddr/example"]), [""; 0]);
    }

    #[test]
    fn loopback_is_stated_only_if_there_is_nothing_else() {
        let local = ["/ip4/127.0.0.1/tcp/4001", "/ip6/::1/tcp/4001"];
        assert_eq!(addresses(&local), local);
        assert_eq!(addresses(&[local[0], "/ip4/192.0.2.1/tcp/4001"]), ["/ip4/192.0.2.1/tcp/4001"]);
    }
}
