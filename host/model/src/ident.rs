//! Owns the identifiers: topics, plugin names, key names, peer ids, IPNS names, paths and digests. It receives
//! untrusted text, parses it once and returns types whose values are valid.

use std::borrow::Borrow;
use std::cell::RefCell;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::Arc;

use cid::Cid;
use libp2p_identity::PeerId;
use multibase::Base;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

/// The multicodec of a libp2p public key, the codec of an IPNS name.
const LIBP2P_KEY: u64 = 0x72;

/// The maximum length of a topic in bytes. GossipSub has no maximum; longer topics only fill memory.
pub const MAX_TOPIC: usize = 512;

/// The error of text that is not a valid identifier of this module.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{what} {text:?} is invalid: {why}")]
pub struct InvalidWord {
    what: &'static str,
    text: String,
    why: &'static str,
}

fn invalid(what: &'static str, text: &str, why: &'static str) -> InvalidWord {
    // A user may have typed a URL here, and a URL may contain a secret.
    let text = dim_client::masked(text).chars().take(80).collect();
    InvalidWord { what, text, why }
}

macro_rules! word {
    ($(#[$doc:meta])* $name:ident, $what:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// Returns the text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidWord;

            fn from_str(text: &str) -> Result<Self, InvalidWord> {
                let check: fn(&str) -> Option<&'static str> = $check;
                match check(text) {
                    None => Ok(Self(text.into())),
                    Some(why) => Err(invalid($what, text, why)),
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidWord;

            fn try_from(text: String) -> Result<Self, InvalidWord> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(word: $name) -> String {
                word.0.as_ref().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

word!(
    /// A pubsub topic: 1 to 512 bytes of UTF-8 without control characters.
    Topic, "topic", |text| {
        if text.is_empty() { return Some("it is empty"); }
        if text.len() > MAX_TOPIC { return Some("it is longer than 512 bytes"); }
        text.chars().any(char::is_control).then_some("it holds a control character")
    }
);

word!(
    /// The name of a plugin: 1 to 64 lower-case letters, digits and hyphens, starting with a letter.
    PluginName, "plugin name", check_lower_case
);

word!(
    /// The operator's name of an IPNS key, as in `ipfs key gen`: 1 to 128 characters of `A-Za-z0-9._-`.
    KeyName, "key name", |text| {
        if text.is_empty() { return Some("it is empty"); }
        if text.len() > 128 { return Some("it is longer than 128 bytes"); }
        if text == "self" { return Some("it is the daemon's own identity"); }
        if text.starts_with('.') { return Some("it must not start with a dot"); }
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        (!text.chars().all(plain)).then_some("only A-Z, a-z, 0-9, '.', '_' and '-' are allowed")
    }
);

word!(
    /// The name of a group of members that share the keys of encrypted topics: 1 to 64 lower-case letters, digits and
    /// hyphens, starting with a letter.
    GroupName, "group name", check_lower_case
);

word!(
    /// The operator's name of a member of a fleet: 1 to 128 characters of `A-Za-z0-9._-`.
    MemberLabel, "name of a member", |text| {
        if text.is_empty() { return Some("it is empty"); }
        if text.len() > 128 { return Some("it is longer than 128 bytes"); }
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        (!text.chars().all(plain)).then_some("only A-Z, a-z, 0-9, '.', '_' and '-' are allowed")
    }
);

/// A libp2p peer id in its base58 form, `12D3…` or `Qm…`. It is parsed from that form and from a CIDv1 with codec
/// `libp2p-key`, `bafz…` or `k51…`.
///
/// See <https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md>.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PeerName(Arc<str>);

impl PeerName {
    /// Makes a peer id from text of the store without a check. The text was checked before it was written, and
    /// decoding base58 takes as long as the rest of an entry.
    pub(crate) fn stored(text: String) -> Self {
        Self(text.into())
    }

    /// Returns the text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PeerName {
    type Err = InvalidWord;

    fn from_str(text: &str) -> Result<Self, InvalidWord> {
        let refuse = |why| invalid("peer id", text, why);
        let multihash = key_multihash(text).map_err(refuse)?;
        // A multihash of another kind is not the hash of a public key.
        let peer = PeerId::from_bytes(&multihash.to_bytes())
            .map_err(|_| refuse("it is not the multihash of a public key"))?;
        // Each value has exactly one base58 text. Encoding it again for each entry that is read from the log is slow.
        let text = if is_base58(text) { Arc::from(text) } else { peer.to_base58().into() };
        Ok(Self(text))
    }
}

impl TryFrom<String> for PeerName {
    type Error = InvalidWord;

    fn try_from(text: String) -> Result<Self, InvalidWord> {
        text.parse()
    }
}

impl From<PeerName> for String {
    fn from(name: PeerName) -> String {
        name.0.as_ref().to_owned()
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Returns whether a text can only be a multihash in base58. No multibase text begins like this.
fn is_base58(text: &str) -> bool {
    text.starts_with('1') || text.starts_with("Qm")
}

/// Returns the multihash of the public key in a peer id or an IPNS name, given in base58 or as a CIDv1 with codec
/// `libp2p-key`.
fn key_multihash(text: &str) -> Result<cid::multihash::Multihash<64>, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.len() > 128 {
        return Err("it is too long");
    }
    if is_base58(text) {
        let bytes = Base::Base58Btc.decode(text).map_err(|_| "it is not base58")?;
        return cid::multihash::Multihash::from_bytes(&bytes).map_err(|_| "it is not a multihash");
    }
    let cid = Cid::try_from(text).map_err(|_| "it is neither a CID nor a peer id")?;
    if cid.codec() != LIBP2P_KEY {
        return Err("its codec is not libp2p-key");
    }
    Ok(*cid.hash())
}

word!(
    /// The id of a job: 1 to 128 bytes without control characters, and neither `.` nor `..`.
    JobId, "job id", |text| check_id(text, 128)
);

word!(
    /// The id of a node: 1 to 256 bytes without control characters, and neither `.` nor `..`.
    NodeId, "node id", |text| check_id(text, 256)
);

word!(
    /// A CID in the spelling of its sender.
    CidText, "CID", |text| {
        if text.len() > 128 { return Some("it is longer than 128 bytes"); }
        Cid::try_from(text).is_err().then_some("it cannot be read")
    }
);

/// Returns the reason if a text is not 1 to 64 lower-case letters, digits and hyphens that start with a letter.
fn check_lower_case(text: &str) -> Option<&'static str> {
    if !text.starts_with(|c: char| c.is_ascii_lowercase()) {
        return Some("it must start with a lower-case letter");
    }
    if text.len() > 64 {
        return Some("it is longer than 64 bytes");
    }
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (!text.chars().all(plain)).then_some("only a-z, 0-9 and - are allowed")
}

/// Returns the reason if a text cannot be an id. An id is part of store keys and URLs, and operators read it.
fn check_id(text: &str, max: usize) -> Option<&'static str> {
    if text.is_empty() {
        return Some("it is empty");
    }
    if text.len() > max {
        return Some("it is too long");
    }
    if [".", ".."].contains(&text) {
        return Some("`.` and `..` cannot be part of a URL");
    }
    text.chars().any(char::is_control).then_some("it holds a control character")
}

/// A plugin name compares, orders and hashes as its text.
impl Borrow<str> for PluginName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// An IPNS name in its canonical form: a CIDv1 with codec `libp2p-key` in base36, `k51…`.
///
/// See <https://specs.ipfs.tech/ipns/ipns-record/#ipns-name>.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IpnsName(Arc<str>);

impl IpnsName {
    /// Returns the name of a public key, given its multihash (the bytes of the peer id).
    pub fn from_multihash(multihash: cid::multihash::Multihash<64>) -> Self {
        let cid = Cid::new_v1(LIBP2P_KEY, multihash);
        Self(multibase::encode(Base::Base36Lower, cid.to_bytes()).into())
    }

    /// Returns the canonical text, `k51…`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the peer id of the key, in base58.
    pub fn peer(&self) -> PeerName {
        PeerName::stored(Base::Base58Btc.encode(self.multihash().to_bytes()))
    }

    /// Returns the multihash of the public key: the bytes of the peer id.
    pub fn multihash(&self) -> cid::multihash::Multihash<64> {
        *Cid::try_from(self.as_str()).expect("a name is a CID, checked when it was made").hash()
    }
}

/// The writer of an event of a reliable topic, by its public key. It has the texts of the key, which would cost more to
/// make than the rest of an event. Clones share them.
#[derive(Clone)]
pub struct MemberName(Arc<MemberTexts>);

struct MemberTexts {
    multihash: Vec<u8>,
    name: IpnsName,
    peer: PeerName,
}

thread_local! {
    /// The last member. Consecutive events have the same one, more often than not.
    static LAST_MEMBER: RefCell<Option<MemberName>> = const { RefCell::new(None) };
}

impl MemberName {
    /// Returns the member with a public key, given the bytes of its multihash (the bytes of the peer id).
    pub fn from_multihash(bytes: &[u8]) -> Result<Self, cid::multihash::Error> {
        LAST_MEMBER.with_borrow_mut(|last| {
            if let Some(last) = last.as_ref().filter(|last| last.multihash() == bytes) {
                return Ok(last.clone());
            }
            let name = IpnsName::from_multihash(cid::multihash::Multihash::from_bytes(bytes)?);
            Ok(last.insert(Self::from(name)).clone())
        })
    }

    /// The bytes of the multihash of the key.
    pub fn multihash(&self) -> &[u8] {
        &self.0.multihash
    }

    /// The IPNS name of the key.
    pub fn name(&self) -> &IpnsName {
        &self.0.name
    }

    /// The peer id of the key. Components of contract 0.1.0 see a member as this peer.
    pub fn peer(&self) -> &PeerName {
        &self.0.peer
    }
}

impl From<IpnsName> for MemberName {
    fn from(name: IpnsName) -> Self {
        let (multihash, peer) = (name.multihash().to_bytes(), name.peer());
        Self(Arc::new(MemberTexts { multihash, name, peer }))
    }
}

impl Serialize for MemberName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.name().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for MemberName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IpnsName::deserialize(deserializer).map(Self::from)
    }
}

impl FromStr for MemberName {
    type Err = InvalidWord;

    fn from_str(text: &str) -> Result<Self, InvalidWord> {
        text.parse::<IpnsName>().map(Self::from)
    }
}

impl PartialEq for MemberName {
    fn eq(&self, other: &Self) -> bool {
        self.multihash() == other.multihash()
    }
}

impl Eq for MemberName {}

impl Hash for MemberName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.multihash().hash(state);
    }
}

impl fmt::Display for MemberName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name().fmt(f)
    }
}

impl fmt::Debug for MemberName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name().fmt(f)
    }
}

impl FromStr for IpnsName {
    type Err = InvalidWord;

    fn from_str(text: &str) -> Result<Self, InvalidWord> {
        let bare = text.strip_prefix("/ipns/").unwrap_or(text);
        let multihash = key_multihash(bare).map_err(|why| invalid("IPNS name", text, why))?;
        Ok(Self::from_multihash(multihash))
    }
}

impl TryFrom<String> for IpnsName {
    type Error = InvalidWord;

    fn try_from(text: String) -> Result<Self, InvalidWord> {
        text.parse()
    }
}

impl From<IpnsName> for String {
    fn from(name: IpnsName) -> String {
        name.0.as_ref().to_owned()
    }
}

impl fmt::Display for IpnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for IpnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

word!(
    /// A domain name that can have a DNSLink TXT record: at least two labels, at most 253 bytes.
    ///
    /// See <https://dnslink.org>.
    Domain, "domain name", |text| {
        if text.len() > 253 { return Some("it is longer than 253 bytes"); }
        if !text.contains('.') { return Some("it has only one label"); }
        let inner = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_');
        let is_label = |label: &str| (1..=63).contains(&label.len()) && label.chars().all(inner);
        (!text.split('.').all(is_label)).then_some("a label is empty, too long or holds other characters")
    }
);

/// The target of an IPNS record: `/ipfs/CID[/…]`, `/ipns/NAME[/…]` or `/ipns/DOMAIN[/…]` (DNSLink).
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContentPath(Arc<str>);

/// The first segment of a path below `/ipfs/` or `/ipns/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Root {
    /// The CID of content that never changes.
    Content(Cid),
    /// An IPNS name.
    Name(IpnsName),
    /// A domain name with a DNSLink record.
    Domain(Domain),
}

impl Root {
    fn parse(text: &str) -> Result<Self, &'static str> {
        let mut segments = text.split('/').skip(1);
        match (segments.next(), segments.next().unwrap_or_default()) {
            (Some("ipfs"), root) => {
                Cid::try_from(root).map(Self::Content).map_err(|_| "there is no CID after /ipfs/")
            }
            (Some("ipns"), root) => match (root.parse(), root.parse()) {
                (Ok(name), _) => Ok(Self::Name(name)),
                (Err(_), Ok(domain)) => Ok(Self::Domain(domain)),
                (Err(_), Err(_)) => Err("there is neither an IPNS name nor a domain name after /ipns/"),
            },
            _ => Err("it starts with neither /ipfs/ nor /ipns/"),
        }
    }
}

impl ContentPath {
    /// Returns the path of a CID.
    pub fn of(cid: &Cid) -> Self {
        Self(format!("/ipfs/{cid}").into())
    }

    /// Returns the path of a name.
    pub fn of_name(name: &IpnsName) -> Self {
        Self(format!("/ipns/{name}").into())
    }

    /// Returns the text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the root of the path.
    pub fn root(&self) -> Root {
        Root::parse(&self.0).expect("checked when the path was made")
    }

    /// Returns the CID and the segments below it, or `None` for a path under `/ipns/`.
    pub fn ipfs(&self) -> Option<(Cid, Vec<&str>)> {
        let mut segments = self.0.strip_prefix("/ipfs/")?.split('/').filter(|s| !s.is_empty());
        let cid = Cid::try_from(segments.next()?).ok()?;
        Some((cid, segments.collect()))
    }

    /// Returns whether the path may lead to other content later: its root is a name or a domain.
    pub fn is_mutable(&self) -> bool {
        self.0.starts_with("/ipns/")
    }

    /// Returns the segments below the root, each with its leading slash; the text is empty if there are none.
    pub fn below(&self) -> &str {
        let root = self.0.match_indices('/').nth(2).map_or(self.0.len(), |(at, _)| at);
        self.0[root..].trim_end_matches('/')
    }

    /// Returns the path of `below` under this path. `below` has the form that [`ContentPath::below`] returns.
    ///
    /// # Errors
    /// The joined path is too long.
    pub fn join(&self, below: &str) -> Result<Self, InvalidWord> {
        if below.is_empty() {
            return Ok(self.clone());
        }
        format!("{}{below}", self.0.trim_end_matches('/')).parse()
    }
}

impl FromStr for ContentPath {
    type Err = InvalidWord;

    fn from_str(text: &str) -> Result<Self, InvalidWord> {
        let refuse = |why| Err(invalid("path", text, why));
        if text.len() > 1024 {
            return refuse("it is longer than 1,024 bytes");
        }
        if text.chars().any(char::is_control) {
            return refuse("it holds a control character");
        }
        if text.split('/').any(|segment| [".", ".."].contains(&segment)) {
            return refuse("it holds . or ..");
        }
        if !text.starts_with('/') {
            return refuse("it starts with neither /ipfs/ nor /ipns/");
        }
        match Root::parse(text) {
            Ok(_) => Ok(Self(text.into())),
            Err(why) => refuse(why),
        }
    }
}

impl TryFrom<String> for ContentPath {
    type Error = InvalidWord;

    fn try_from(text: String) -> Result<Self, InvalidWord> {
        text.parse()
    }
}

impl From<ContentPath> for String {
    fn from(path: ContentPath) -> String {
        path.0.as_ref().to_owned()
    }
}

impl fmt::Display for ContentPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ContentPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// The SHA-256 of a component file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Computes the digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Returns the 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{self}")
    }
}

impl FromStr for Digest {
    type Err = InvalidWord;

    fn from_str(text: &str) -> Result<Self, InvalidWord> {
        let wrong = || invalid("digest", text, "it is not 64 hexadecimal digits");
        let digits = text.strip_prefix("sha256:").unwrap_or(text);
        if digits.len() != 64 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&digits[at..at + 2], 16).map_err(|_| wrong())?;
        }
        Ok(Self(bytes))
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_read_as_it_is_written() {
        let digest = Digest::of(b"x");
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert_eq!(format!("sha256:{digest}").parse::<Digest>().unwrap(), digest);
        for wrong in ["", "abc", &"g".repeat(64), &"é".repeat(32), &"+1".repeat(32)] {
            assert!(wrong.parse::<Digest>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_three_spellings_of_a_name_are_one() {
        let k51 = "k51qzi5uqu5dlkw8pxuw9qmqayfdeh4kfebhmreauqdc6a7c3y7d5i9fi8mk9w";
        let name: IpnsName = k51.parse().unwrap();
        let peer = Base::Base58Btc.encode(name.multihash().to_bytes());
        assert!(peer.starts_with("12D3"), "{peer}");
        assert_eq!(peer.parse::<IpnsName>().unwrap(), name);
        assert_eq!(name.peer().as_str(), peer);
        assert_eq!(format!("/ipns/{k51}").parse::<IpnsName>().unwrap(), name);
        assert_eq!(name.as_str(), k51);
    }

    #[test]
    fn a_path_below_a_name_stays_below_what_the_name_points_to() {
        let path = |text: &str| text.parse::<ContentPath>().unwrap();
        let k51 = "k51qzi5uqu5dlkw8pxuw9qmqayfdeh4kfebhmreauqdc6a7c3y7d5i9fi8mk9w";
        let below = path(&format!("/ipns/{k51}/v1/p.wasm"));
        assert_eq!(below.root(), Root::Name(k51.parse().unwrap()));
        assert_eq!(below.below(), "/v1/p.wasm");
        assert_eq!(
            path("/ipfs/bafkqaaa/dir/").join(below.below()).unwrap(),
            path("/ipfs/bafkqaaa/dir/v1/p.wasm")
        );
        assert_eq!(path("/ipfs/bafkqaaa/").below(), "");
        assert_eq!(path("/ipfs/bafkqaaa").join("").unwrap(), path("/ipfs/bafkqaaa"));
        let domain = path("/ipns/fleet.example.org/jobs");
        assert_eq!(domain.root(), Root::Domain("fleet.example.org".parse().unwrap()));
        assert!(domain.is_mutable() && !path("/ipfs/bafkqaaa").is_mutable());
        assert!(path("/ipfs/bafkqaaa").join(&format!("/{}", "x".repeat(1024))).is_err());
        for text in ["/ipns/nodots", "/ipns/a..b", "/ipns/a b.c", "/ipns/.org", "/ipns//x.org"] {
            assert!(text.parse::<ContentPath>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn hostile_words_are_refused() {
        let long = "x".repeat(MAX_TOPIC + 1);
        for text in ["", "a\nb", "a\0", long.as_str()] {
            assert!(text.parse::<Topic>().is_err(), "{text:?}");
        }
        assert!("x".repeat(MAX_TOPIC).parse::<Topic>().is_ok());
        for text in ["", "..", "../x", "a/b", "self", ".hidden", "a b"] {
            assert!(text.parse::<KeyName>().is_err(), "{text:?}");
        }
        for text in ["", "Upper", "-x", "a_b", "9a"] {
            assert!(text.parse::<PluginName>().is_err(), "{text:?}");
        }
        for text in ["", "/ipfs/", "/ipfs/x", "/ipld/x", "ipfs/x", "/ipns/x", "/ipfs/bafkqaaa/../x"] {
            assert!(text.parse::<ContentPath>().is_err(), "{text:?}");
        }
        // A CID of a file is not a name.
        assert!("bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy".parse::<IpnsName>().is_err());
    }
}
