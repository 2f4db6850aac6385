//! IPNS records against those of the gateway conformance suite, as Kubo 0.43.0 judges them.

use dim::backend::record::{Record, RecordError};
use dim::ident::IpnsName;
use dim::time::Timestamp;

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

#[test]
fn only_one_file_holds_bindings_and_no_backend_knows_wasmtime() {
    let source = dim_tests::data("../host/src");
    let mut files = vec![source.clone()];
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let place = path.strip_prefix(&source).unwrap();
        assert_eq!(text.contains("bindgen!"), place.ends_with("plugin/bindings.rs"), "{}", place.display());
        if place.starts_with("backend") || place.starts_with("backend.rs") {
            assert!(!text.contains("wasmtime") && !text.contains("crate::plugin"), "{}", place.display());
        }
    }
}
