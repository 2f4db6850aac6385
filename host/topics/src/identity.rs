//! Owns the identities of the protocol: writers, incarnations, blocks and the place of an event. It receives bytes of
//! the network or of the store, and returns typed values.

use std::fmt;

use cid::Cid;
use cid::multihash::Multihash;
use dim_model::ident::IpnsName;
use ed25519_dalek::VerifyingKey;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

use crate::malformed::Malformed;

/// The multicodec of DAG-CBOR, the codec of a block.
const DAG_CBOR: u64 = 0x71;

/// The multicodec of SHA2-256.
const SHA2_256: u64 = 0x12;

/// The multihash code of data that is stored as its own hash.
const IDENTITY: u64 = 0;

/// The protobuf header of an Ed25519 public key of libp2p: type 1 in field 1, 32 bytes in field 2.
const LIBP2P_ED25519: [u8; 4] = [0x08, 0x01, 0x12, 0x20];

/// Defines a fixed number of bytes that is a byte string in DAG-CBOR.
macro_rules! fixed_bytes {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_bytes(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let bytes = <&serde_bytes::Bytes>::deserialize(deserializer)?;
                let bytes: [u8; $len] = bytes.as_ref().try_into().map_err(|_| {
                    serde::de::Error::invalid_length(bytes.len(), &concat!($len, " bytes"))
                })?;
                Ok(Self(bytes))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{self}")
            }
        }
    };
}

fixed_bytes!(
    /// A writer: a host or an agent, by its Ed25519 public key (RFC 8032). Its text is the IPNS name of the key.
    WriterId,
    32
);
fixed_bytes!(
    /// One process start of a writer, by 16 random bytes. Its text is in hex.
    Incarnation,
    16
);
fixed_bytes!(
    /// The SHA2-256 digest of a block. Its text is the block's CID.
    Digest,
    32
);

impl WriterId {
    /// Returns the identity of a public key.
    pub fn of(key: &VerifyingKey) -> Self {
        Self(key.to_bytes())
    }

    /// Returns the identity whose key has an IPNS name; `None` if the name does not hold an Ed25519 key.
    pub fn of_name(name: &IpnsName) -> Option<Self> {
        let multihash = name.multihash();
        let key =
            (multihash.code() == IDENTITY).then(|| multihash.digest().strip_prefix(&LIBP2P_ED25519))??;
        key.try_into().ok().map(Self)
    }

    /// Returns the IPNS name of the key.
    pub fn name(&self) -> IpnsName {
        let mut key = [0; 36];
        key[..4].copy_from_slice(&LIBP2P_ED25519);
        key[4..].copy_from_slice(&self.0);
        IpnsName::from_multihash(Multihash::wrap(IDENTITY, &key).expect("36 bytes fit into a multihash"))
    }
}

impl fmt::Display for WriterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name().fmt(f)
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Digest {
    /// Returns the digest of a block.
    pub fn of(block: &[u8]) -> Self {
        Self(Sha256::digest(block).into())
    }

    /// Returns the digest of the block with a CID.
    pub fn of_text(cid: &str) -> Result<Self, Malformed> {
        Self::of_link(&cid.parse().map_err(|_| Malformed::Payload("it is no CID"))?)
    }

    /// Returns the digest of the block that a link of untrusted bytes names.
    pub(crate) fn of_link(link: &Cid) -> Result<Self, Malformed> {
        let hash = link.hash();
        let digest = (link.codec() == DAG_CBOR && hash.code() == SHA2_256).then(|| hash.digest());
        let digest = digest.and_then(|digest| digest.try_into().ok());
        digest.map(Self).ok_or(Malformed::Payload("a link is to no block of this protocol"))
    }

    /// Returns the CID of the block.
    pub fn cid(&self) -> Cid {
        Cid::new_v1(DAG_CBOR, Multihash::wrap(SHA2_256, &self.0).expect("32 bytes fit into a multihash"))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cid().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;

    use super::*;

    #[test]
    fn the_text_of_a_writer_is_the_name_of_its_key() {
        let writer = WriterId::of(&SigningKey::from_bytes(&[7; 32]).verifying_key());
        let text = writer.to_string();
        assert!(text.starts_with("k51qzi5uqu5d"), "{text}");
        assert_eq!(text.parse::<IpnsName>().unwrap(), writer.name());
    }

    #[test]
    fn the_text_of_a_digest_is_a_cid_of_dag_cbor() {
        // The empty map, as in the test vectors of DAG-CBOR.
        assert_eq!(
            Digest::of(&[0xa0]).to_string(),
            "bafyreigbtj4x7ip5legnfznufuopl4sg4knzc2cof6duas4b3q2fy6swua"
        );
    }
}
