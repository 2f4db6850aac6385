//! Owns IPNS records as <https://specs.ipfs.tech/ipns/ipns-record/> defines them. It signs, verifies and compares
//! them; it receives keys, paths and untrusted bytes, and returns checked records.

use std::cmp::Ordering;
use std::time::Duration;

use dim_model::ident::{ContentPath, IpnsName};
use dim_model::time::{Timestamp, nanoseconds};
use jiff::fmt::temporal::Pieces;
use libp2p_identity::{Keypair, PublicKey};
use prost::Message as _;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The maximum size of a record, in bytes.
pub const MAX_RECORD: usize = 10 << 10;

/// The prefix of the data that a signature of version 2 covers.
const PREFIX: &[u8] = b"ipns-signature:";

/// The only validity type: an end of validity.
const EOL: i32 = 0;

/// The multihash code of a key that is stored as its own hash.
const IDENTITY: u64 = 0;

/// The maximum length of a public key, in bytes, that a name contains entirely.
const MAX_INLINED: usize = 42;

/// The error of a record that is not valid.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RecordError {
    /// The record is too large.
    #[error("the record has {0} bytes, more than {MAX_RECORD}")]
    TooLarge(usize),
    /// The bytes are no record, or a record of version 1 only.
    #[error("the record is malformed: {0}")]
    Malformed(&'static str),
    /// Another key signed the record, or none did.
    #[error("the record is not signed with the key of the name")]
    Signature,
    /// The unsigned fields differ from the signed ones.
    #[error("the record's legacy fields differ from the signed data")]
    FieldsDiffer,
    /// The validity ended.
    #[error("the record's validity ended at {0}")]
    Expired(Timestamp),
}

/// A record with a verified signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The path to which the name points.
    pub path: ContentPath,
    /// The sequence number. A newer record has a higher one.
    pub sequence: u64,
    /// The end of the validity.
    pub validity: Timestamp,
    /// The duration for which a reader may cache the record.
    pub ttl: Duration,
    /// The stored form.
    pub bytes: Vec<u8>,
}

impl Record {
    /// Makes and signs a record. It includes the fields of version 1 for old readers.
    pub fn sign(
        key: &Keypair,
        path: &ContentPath,
        sequence: u64,
        validity: Timestamp,
        ttl: Duration,
    ) -> Self {
        let value = path.as_str().as_bytes().to_vec();
        let until = rfc3339(validity).into_bytes();
        let data = Data {
            ttl: nanoseconds(ttl),
            value: value.clone(),
            sequence,
            validity: until.clone(),
            validity_type: EOL,
        };
        let data = serde_ipld_dagcbor::to_vec(&data).expect("five plain fields");
        let sign = |message: &[u8]| key.sign(message).expect("a key of ours signs");
        let public = key.public().encode_protobuf();
        let wire = Wire {
            signature_v1: Some(sign(&[&value, &until, b"0".as_slice()].concat())),
            signature_v2: Some(sign(&[PREFIX, &data].concat())),
            value: Some(value),
            validity_type: Some(EOL),
            validity: Some(until),
            sequence: Some(sequence),
            ttl: Some(nanoseconds(ttl)),
            public_key: (public.len() > MAX_INLINED).then_some(public),
            data: Some(data),
        };
        Self { path: path.clone(), sequence, validity, ttl, bytes: wire.encode_to_vec() }
    }

    /// Verifies a record of `name` at the time `now`.
    pub fn verify(bytes: &[u8], name: &IpnsName, now: Timestamp) -> Result<Self, RecordError> {
        if bytes.len() > MAX_RECORD {
            return Err(RecordError::TooLarge(bytes.len()));
        }
        let wire = Wire::decode(bytes).map_err(|_| RecordError::Malformed("not a protocol buffer"))?;
        let signature =
            wire.signature_v2.as_deref().ok_or(RecordError::Malformed("no signature of version 2"))?;
        let signed = wire.data.as_deref().ok_or(RecordError::Malformed("no signed data"))?;
        if !public_key(&wire, name)?.verify(&[PREFIX, signed].concat(), signature) {
            return Err(RecordError::Signature);
        }
        let data: Data = serde_ipld_dagcbor::from_slice(signed)
            .map_err(|_| RecordError::Malformed("the signed data is not the DAG-CBOR map of a record"))?;
        if data.validity_type != EOL {
            return Err(RecordError::Malformed("unknown validity type"));
        }
        wire.agrees_with(&data)?;
        let record = Self::of(&data, bytes)?;
        if record.validity <= now {
            return Err(RecordError::Expired(record.validity));
        }
        Ok(record)
    }

    fn of(data: &Data, bytes: &[u8]) -> Result<Self, RecordError> {
        let validity = end_of_validity(text(&data.validity, "the validity is not text")?)
            .ok_or(RecordError::Malformed("the validity is not a time"))?;
        Ok(Self {
            path: text(&data.value, "the value is not text")?
                .parse()
                .map_err(|_| RecordError::Malformed("the value is not a content path"))?,
            sequence: data.sequence,
            validity,
            ttl: Duration::from_nanos(data.ttl),
            bytes: bytes.to_vec(),
        })
    }

    /// Compares two records of one name by sequence, then validity, then bytes. The greatest is the newest.
    pub fn compare(&self, other: &Self) -> Ordering {
        (self.sequence, self.validity, &self.bytes).cmp(&(other.sequence, other.validity, &other.bytes))
    }
}

fn text<'a>(bytes: &'a [u8], otherwise: &'static str) -> Result<&'a str, RecordError> {
    std::str::from_utf8(bytes).map_err(|_| RecordError::Malformed(otherwise))
}

/// Parses an RFC 3339 time. A time after the year 2554, such as 9999-12-31T23:59:59Z for "always", becomes the
/// maximum of a [`Timestamp`]. A time before 1970 becomes the minimum.
fn end_of_validity(text: &str) -> Option<Timestamp> {
    let pieces = Pieces::parse(text).ok()?;
    let (time, offset) = (pieces.date().to_datetime(pieces.time()?), pieces.to_numeric_offset()?);
    // The latest instant of jiff is 9999-12-30T22:00Z, but its calendar has later days.
    let Ok(time) = offset.to_timestamp(time) else {
        return Some(Timestamp(if time.year() > 1970 { u64::MAX } else { 0 }));
    };
    let nanoseconds = time.as_nanosecond();
    Some(Timestamp(u64::try_from(nanoseconds).unwrap_or(if nanoseconds < 0 { 0 } else { u64::MAX })))
}

fn rfc3339(time: Timestamp) -> String {
    let time =
        jiff::Timestamp::from_nanosecond(i128::from(time.0)).expect("64 bits of nanoseconds end in 2554");
    format!("{time:.9}")
}

/// Returns the public key. It is in the name or, if it is too long for a name, in the record; then its hash is the
/// name.
fn public_key(wire: &Wire, name: &IpnsName) -> Result<PublicKey, RecordError> {
    let multihash = name.multihash();
    let unreadable = |_| RecordError::Malformed("the public key cannot be read");
    if multihash.code() == IDENTITY {
        return PublicKey::try_decode_protobuf(multihash.digest()).map_err(unreadable);
    }
    let bytes = wire.public_key.as_deref().ok_or(RecordError::Malformed("the public key is missing"))?;
    let key = PublicKey::try_decode_protobuf(bytes).map_err(unreadable)?;
    if key.to_peer_id().to_bytes() != multihash.to_bytes() {
        return Err(RecordError::Signature);
    }
    Ok(key)
}

/// The signed part of a record, a DAG-CBOR map.
#[derive(Debug, Serialize, Deserialize)]
struct Data {
    /// In nanoseconds. For a record without this field, readers choose how long they cache it.
    #[serde(rename = "TTL", default)]
    ttl: u64,
    #[serde(rename = "Value", with = "byte_string")]
    value: Vec<u8>,
    #[serde(rename = "Sequence")]
    sequence: u64,
    #[serde(rename = "Validity", with = "byte_string")]
    validity: Vec<u8>,
    #[serde(rename = "ValidityType")]
    validity_type: i32,
}

/// Serializes bytes as a CBOR byte string, not as a list of numbers.
mod byte_string {
    use std::fmt;

    use serde::de::{Error, Visitor};
    use serde::{Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        deserializer.deserialize_bytes(ByteString)
    }

    struct ByteString;

    impl Visitor<'_> for ByteString {
        type Value = Vec<u8>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a byte string")
        }

        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
            Ok(bytes.to_vec())
        }
    }
}

/// The protocol buffer of a record.
#[derive(Clone, PartialEq, prost::Message)]
struct Wire {
    #[prost(bytes = "vec", optional, tag = "1")]
    value: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "2")]
    signature_v1: Option<Vec<u8>>,
    #[prost(int32, optional, tag = "3")]
    validity_type: Option<i32>,
    #[prost(bytes = "vec", optional, tag = "4")]
    validity: Option<Vec<u8>>,
    #[prost(uint64, optional, tag = "5")]
    sequence: Option<u64>,
    #[prost(uint64, optional, tag = "6")]
    ttl: Option<u64>,
    #[prost(bytes = "vec", optional, tag = "7")]
    public_key: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "8")]
    signature_v2: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "9")]
    data: Option<Vec<u8>>,
}

impl Wire {
    /// Checks that the legacy fields equal the signed ones, if there is a value or a signature of version 1.
    fn agrees_with(&self, data: &Data) -> Result<(), RecordError> {
        if self.value.is_none() && self.signature_v1.is_none() {
            return Ok(());
        }
        let agrees = self.value.as_deref() == Some(&data.value)
            && self.validity.as_deref() == Some(&data.validity)
            && self.validity_type.unwrap_or(EOL) == data.validity_type
            && self.sequence.unwrap_or(0) == data.sequence
            && self.ttl.unwrap_or(0) == data.ttl;
        if agrees { Ok(()) } else { Err(RecordError::FieldsDiffer) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::name_of;

    const DAY: Duration = Duration::from_secs(86_400);

    fn signed(sequence: u64) -> (IpnsName, Record) {
        let key = Keypair::generate_ed25519();
        let path = ContentPath::of(&super::super::unixfs::raw_cid(b"x"));
        let record =
            Record::sign(&key, &path, sequence, Timestamp::wall().after(DAY), Duration::from_secs(60));
        (name_of(&key), record)
    }

    #[test]
    fn a_record_of_ours_is_valid_until_it_expires() {
        let (name, record) = signed(7);
        let read = Record::verify(&record.bytes, &name, Timestamp::wall()).unwrap();
        assert_eq!(read, record);
        let late = Timestamp::wall().after(2 * DAY);
        assert_eq!(Record::verify(&record.bytes, &name, late), Err(RecordError::Expired(record.validity)));
    }

    #[test]
    fn a_record_of_another_name_is_refused() {
        let ((name, _), (_, other)) = (signed(1), signed(1));
        assert_eq!(Record::verify(&other.bytes, &name, Timestamp::wall()), Err(RecordError::Signature));
    }

    #[test]
    fn no_flipped_byte_and_no_truncation_passes_or_panics() {
        let (name, record) = signed(1);
        let now = Timestamp::wall();
        for index in 0..record.bytes.len() {
            let mut bytes = record.bytes.clone();
            bytes[index] ^= 0x10;
            // The unsigned signature of version 1 is the one thing that may differ.
            if let Ok(read) = Record::verify(&bytes, &name, now) {
                assert_eq!((read.path, read.sequence), (record.path.clone(), 1), "byte {index}");
            }
            assert!(Record::verify(&record.bytes[..index], &name, now).is_err(), "cut at {index}");
        }
    }

    #[test]
    fn the_higher_sequence_wins_then_the_later_validity() {
        let (_, old) = signed(1);
        let (_, new) = signed(2);
        assert_eq!(new.compare(&old), Ordering::Greater);
        let mut longer = old.clone();
        longer.validity = longer.validity.after(DAY);
        assert_eq!(longer.compare(&old), Ordering::Greater);
    }
}
