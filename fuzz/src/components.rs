//! Fuzzes the inspection of component files, which the host does before it runs them.

use dim_runtime::signing::{SigningKey, signer_of};
use dim_runtime::{inspect, judge};

/// Inspects and judges a component like an installation.
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

/// Returns the signing key of this target. The key is used nowhere else.
fn key() -> SigningKey {
    SigningKey::from_pem(include_str!("components.pem")).expect("it is a key")
}

/// Returns components with and without a manifest, signed and unsigned, and a core module.
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
