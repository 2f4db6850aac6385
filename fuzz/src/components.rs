//! Components as files: what they are is judged before anything of them runs.

use dim::plugin::{inspect, judge};
use dim::signing::{SigningKey, signer_of};

/// Looks at a component as an installation does.
pub fn run(data: &[u8]) {
    let known = key().signer();
    let (inspected, signer) = (inspect(data), signer_of(data, [&known]));
    if let Ok(inspection) = &inspected {
        assert_eq!(inspection.size, data.len());
        serde_json::to_string(inspection).expect("it can be shown");
    }
    match judge(data, [&known]) {
        Ok(inspection) => {
            assert!(inspected.is_ok(), "judged, and not to be inspected");
            assert_eq!(inspection.signer, signer.expect("judged, and its signature does not fit"));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// A key of this program, and of nothing else.
fn key() -> SigningKey {
    SigningKey::from_pem(include_str!("components.pem")).expect("it is a key")
}

/// A component with a manifest, signed and not, and what is none.
pub fn seeds() -> Vec<Vec<u8>> {
    let manifest = r#"name = \"a\"\nversion = \"0.1.0\"\ndescription = \"d\"\nstate-version = 1\n"#;
    let texts = [
        "(component)".to_owned(),
        format!("(component (@custom \"dim-manifest\" \"{manifest}\"))"),
        format!(
            "(component (import \"dim:coordination/state@0.1.0\" (instance (export \"get\" (func)))) \
             (import \"wasi:clocks/wall-clock@0.2.6\" (instance)) \
             (core module (func (export \"f\")) (@custom \"name\" \"x\")) \
             (@custom \"authors\" \"me\") (@custom \"dim-manifest\" \"{manifest}\"))"
        ),
        "(module (memory 1))".to_owned(),
    ];
    let plain = texts.map(|text| wat::parse_str(text).expect("it is WebAssembly")).to_vec();
    let key = key();
    let signed: Vec<Vec<u8>> = plain.iter().filter_map(|component| key.sign(component).ok()).collect();
    [plain, signed].concat()
}
