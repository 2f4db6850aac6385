//! IPNS records against those of the gateway conformance suite, as Kubo 0.43.0 judges them.

use dim_ipfs::ipns_record::{Record, RecordError};
use dim_ipfs::keys::name_of;
use dim_model::ident::IpnsName;
use dim_model::time::Timestamp;
use dim_tests::Kubo;
use libp2p_identity::Keypair;

fn judge(ending: &str) -> Result<Record, RecordError> {
    let files = std::fs::read_dir(dim_tests::data("ipns-records")).expect("the records are there");
    let file = files
        .map(|file| file.expect("a readable directory").path())
        .find(|path| path.to_string_lossy().ends_with(&format!("_{ending}.ipns-record")))
        .expect("a record of that ending");
    let name = file.file_name().unwrap().to_string_lossy().split('_').next().unwrap().to_owned();
    let name: IpnsName = name.parse().expect("the file is named after its name");
    Record::verify(&std::fs::read(file).expect("readable"), &name, Timestamp::wall())
}

#[test]
fn valid_records_are_valid() {
    for ending in ["v1-v2", "v2", "v1-v2-broken-signature-v1"] {
        let record = judge(ending).unwrap_or_else(|error| panic!("{ending}: {error}"));
        assert!(record.path.ipfs().is_some(), "{ending}");
    }
}

#[test]
fn broken_records_are_refused_for_the_right_reason() {
    assert_eq!(judge("v1-v2-broken-signature-v2").unwrap_err(), RecordError::Signature);
    assert_eq!(judge("v1-v2-broken-v1-value").unwrap_err(), RecordError::FieldsDiffer);
    assert!(matches!(judge("v1").unwrap_err(), RecordError::Malformed(_)));
}

/// A record of version 2 alone, as other implementations may write it: CBOR and protocol buffer by hand.
fn written_by_hand(key: &Keypair, value: &str, validity: &str, ttl: Option<u8>) -> Vec<u8> {
    let text = |major: u8, bytes: &[u8]| match bytes.len() {
        length @ 0..24 => [&[major | length as u8], bytes].concat(),
        length => [&[major | 24, u8::try_from(length).unwrap()], bytes].concat(),
    };
    let (key_of, bytes_of) =
        (|name: &str| text(0x60, name.as_bytes()), |bytes: &str| text(0x40, bytes.as_bytes()));
    let mut data = vec![0xa0 | (4 + u8::from(ttl.is_some()))];
    if let Some(ttl) = ttl {
        data.extend([key_of("TTL"), vec![ttl]].concat());
    }
    data.extend([key_of("Value"), bytes_of(value)].concat());
    data.extend([key_of("Sequence"), vec![1]].concat());
    data.extend([key_of("Validity"), bytes_of(validity)].concat());
    data.extend([key_of("ValidityType"), vec![0]].concat());
    let signature = key.sign(&[b"ipns-signature:".as_slice(), &data].concat()).unwrap();
    let field = |tag: u8, bytes: &[u8]| {
        let mut length = bytes.len();
        let mut field = vec![tag];
        while length >= 0x80 {
            field.push(length as u8 & 0x7f | 0x80);
            length >>= 7;
        }
        field.push(length as u8);
        [field, bytes.to_vec()].concat()
    };
    [field(0x42, &signature), field(0x4a, &data)].concat()
}

/// Records that Kubo 0.43.0 takes: far validities, none of a TTL, a value that is a domain.
const TAKEN: [(&str, &str, Option<u8>); 5] = [
    ("/ipfs/bafkqaaa", "9999-12-31T23:59:59.999999999Z", Some(1)),
    ("/ipfs/bafkqaaa", "9999-12-31T23:59:59Z", None),
    ("/ipfs/bafkqaaa", "2555-01-01T00:00:00Z", Some(1)),
    ("/ipfs/bafkqaaa/sub/x.json", "2100-01-01T00:00:00Z", None),
    ("/ipns/fleet.example.org", "2100-01-01T00:00:00Z", Some(1)),
];

#[test]
fn records_are_taken_as_kubo_takes_them() {
    let kubo = Kubo::start();
    for (value, validity, ttl) in TAKEN {
        let key = Keypair::generate_ed25519();
        let (name, record) = (name_of(&key), written_by_hand(&key, value, validity, ttl));
        let read = Record::verify(&record, &name, Timestamp::wall())
            .unwrap_or_else(|error| panic!("{value} until {validity}: {error}"));
        assert_eq!(read.path.as_str(), value);
        assert!(read.validity > Timestamp::wall(), "{validity}");
        let Some(kubo) = &kubo else { continue };
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &record).unwrap();
        kubo.ipfs(&["name", "put", "--allow-offline", name.as_str(), file.path().to_str().unwrap()]);
        let resolved = kubo.ipfs(&["name", "resolve", "--nocache", "--recursive=false", name.as_str()]);
        assert_eq!(resolved, value);
    }
}

#[test]
fn a_record_that_ended_before_1970_or_never_began_is_refused() {
    let key = Keypair::generate_ed25519();
    let judge = |validity: &str| {
        let record = written_by_hand(&key, "/ipfs/bafkqaaa", validity, Some(1));
        Record::verify(&record, &name_of(&key), Timestamp::wall())
    };
    for past in ["1969-12-31T23:59:59Z", "0001-01-01T00:00:00Z", "2020-01-01T00:00:00Z"] {
        assert!(matches!(judge(past), Err(RecordError::Expired(_))), "{past}");
    }
    for wrong in ["", "soon", "2100-01-01", "2100-01-01T00:00:00", "10000-01-01T00:00:00Z"] {
        assert!(matches!(judge(wrong), Err(RecordError::Malformed(_))), "{wrong}");
    }
}

#[test]
fn only_one_file_holds_bindings_and_each_crate_of_the_host_depends_on_lower_ones() {
    let host = dim_tests::data("../host");
    let mut files = vec![host.clone()];
    let mut with_bindings = Vec::new();
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs")
            && std::fs::read_to_string(&path).unwrap().contains("bindgen!")
        {
            with_bindings.push(path.strip_prefix(&host).unwrap().to_owned());
        }
    }
    assert_eq!(with_bindings, [std::path::Path::new("runtime/src/bindings.rs")]);
    let layers: [(&str, &[&str]); 13] = [
        ("age", &[]),
        ("bundled", &[]),
        ("model", &[]),
        ("ipfs", &["model"]),
        ("topics", &["age", "model"]),
        ("store", &["model", "ipfs", "topics"]),
        ("runtime", &["model", "ipfs", "store"]),
        ("network", &["age", "model", "ipfs", "topics", "store"]),
        ("server", &["age", "bundled", "model", "ipfs", "topics", "store", "runtime", "network"]),
        ("api", &["model", "ipfs", "topics", "store", "runtime", "network", "server"]),
        ("scenarios", &["bundled", "model", "ipfs", "store", "runtime", "server"]),
        ("agent", &["model", "ipfs", "store", "network", "server", "api"]),
        (
            "cli",
            &["age", "model", "ipfs", "topics", "store", "runtime", "server", "api", "scenarios", "agent"],
        ),
    ];
    let listed: Vec<String> = std::fs::read_dir(&host)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(listed.len(), layers.len(), "{listed:?}");
    for (name, below) in layers {
        let manifest = std::fs::read_to_string(host.join(name).join("Cargo.toml")).unwrap();
        let uses = manifest.lines().filter_map(|line| line.strip_prefix("dim-")?.split(['.', ' ']).next());
        for used in uses.filter(|used| *used != "client") {
            assert!(below.contains(&used), "{name} depends on {used}");
        }
        let may_use_wasmtime = ["bundled", "runtime", "scenarios", "server", "cli"].contains(&name);
        assert!(may_use_wasmtime || !manifest.contains("wasmtime"), "{name} depends on wasmtime");
    }
}
