//! Fuzzes the verification of IPNS records from the network.
//!
//! The first byte selects the mode: the input is a whole record, the data of a record, or the fields of a record. In
//! the last two modes a key of this target signs the record first, so that the code after the check of the signature
//! runs.

use dim_ipfs::ipns_record::Record;
use dim_model::ident::{ContentPath, IpnsName};
use dim_model::time::Timestamp;
use libp2p_identity::Keypair;
use prost::Message;

/// The time at which records are verified.
const NOW: Timestamp = Timestamp(1_767_225_600_000_000_000);

/// The fields of a record that this target signs.
#[derive(Clone, PartialEq, Message)]
struct Wire {
    #[prost(bytes = "vec", optional, tag = "1")]
    value: Option<Vec<u8>>,
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

/// Returns the key that signs records.
pub(crate) fn key() -> Keypair {
    Keypair::ed25519_from_bytes([7; 32]).expect("any 32 bytes are a key")
}

fn name_of(key: &Keypair) -> IpnsName {
    key.public().to_peer_id().to_string().parse().expect("a peer id is a name")
}

/// Verifies a record.
pub fn run(data: &[u8]) {
    let Some((how, bytes)) = data.split_first() else { return };
    let key = key();
    let name = name_of(&key);
    let bytes = match how % 3 {
        0 => bytes.to_vec(),
        // Only the data counts; the other fields are built from it.
        1 => of_data(bytes),
        _ => match Wire::decode(bytes) {
            Ok(wire) => signed(&key, wire),
            Err(_) => return,
        },
    };
    match Record::verify(&bytes, &name, NOW) {
        Ok(record) => {
            assert!(record.validity > NOW, "an old record is believed");
            assert_eq!(record.bytes, bytes);
            assert_eq!(record.compare(&record), std::cmp::Ordering::Equal);
            let again: ContentPath = record.path.as_str().parse().expect("a path can be read again");
            assert_eq!(again, record.path);
            let other = name_of(&Keypair::ed25519_from_bytes([8; 32]).expect("a key"));
            assert!(Record::verify(&bytes, &other, NOW).is_err(), "it is believed under any name");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Returns a record with signed data.
pub(crate) fn of_data(data: &[u8]) -> Vec<u8> {
    signed(&key(), Wire { data: Some(data.to_vec()), ..Wire::default() })
}

/// Returns the data of a valid record.
pub(crate) fn data() -> Vec<u8> {
    Wire::decode(own().as_slice()).ok().and_then(|wire| wire.data).expect("our own")
}

fn own() -> Vec<u8> {
    let path = "/ipfs/bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy".parse().expect("a path");
    let until = Timestamp(NOW.0 + 40 * 365 * 86_400_000_000_000);
    Record::sign(&key(), &path, 7, until, std::time::Duration::from_secs(60)).bytes
}

fn signed(key: &Keypair, mut wire: Wire) -> Vec<u8> {
    let message = [b"ipns-signature:".as_slice(), wire.data.as_deref().unwrap_or_default()].concat();
    wire.signature_v2 = Some(key.sign(&message).expect("it signs"));
    wire.encode_to_vec()
}

/// Returns records of the conformance suite and an own one, as whole records and as data.
pub fn seeds() -> Vec<Vec<u8>> {
    let with = |how: u8, bytes: &[u8]| [&[how], bytes].concat();
    let own = own();
    let mut seeds = vec![with(0, &own), with(1, &data()), with(2, &own)];
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/ipns-records");
    let files = std::fs::read_dir(dir).expect("the records are there").flatten().map(|file| file.path());
    let files: std::collections::BTreeSet<_> = files.collect();
    for file in files {
        let bytes = std::fs::read(file).expect("it can be read");
        seeds.extend([with(0, &bytes), with(2, &bytes)]);
    }
    seeds
}
