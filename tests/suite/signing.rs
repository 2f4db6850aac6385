//! Whose components run: keys, signatures, what nobody has signed, and grants that go with whoever has.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use dim_model::ident::{Digest, PluginName};
use dim_model::signer::Signer;
use dim_runtime::signing::SigningKey;
use dim_server::host::{Grant, GrantChange, Proposal, ReplaceError};
use dim_store::change::{Change, State};
use dim_tests::alone::proposal;
use dim_tests::component::{probe, with_manifest};
use dim_tests::{Program, Setup, TestHost};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

fn name() -> PluginName {
    "probe".parse().unwrap()
}

/// Where a component comes from that nobody near has made.
const FAR: &str = "https://example.com/probe.wasm";

fn from(source: &str, component: Vec<u8>) -> Proposal {
    Proposal { source: source.to_owned(), ..proposal("probe", component) }
}

async fn install(host: &TestHost, proposal: Proposal, grant: Grant) -> Result<Change, ReplaceError> {
    host.host.install(proposal, grant).await
}

fn trusting(signers: &[(&str, &Signer)], unsigned: Value) -> Setup {
    let signers: serde_json::Map<_, _> =
        signers.iter().map(|(name, key)| ((*name).to_owned(), json!(key.to_string()))).collect();
    Setup::default().yaml(&format!("signing: {}\n", json!({ "signers": signers, "unsigned": unsigned })))
}

fn version(host: &TestHost) -> String {
    host.plugin("probe").version().version
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_over_the_network_is_signed_by_who_is_trusted_or_vouched_for() {
    let (acme, other) = (SigningKey::generate(), SigningKey::generate());
    let host = trusting(&[("acme", &acme.signer())], json!("ask")).start().await;
    let unsigned = probe("1.0.0", &json!([]));
    let all = Grant::AllThatIsAsked;
    let why = install(&host, from(FAR, unsigned.clone()), all).await.unwrap_err();
    assert!(matches!(why, ReplaceError::Untrusted { .. }), "{why}");
    assert!(why.to_string().contains("nobody has signed it"), "{why}");
    let of_other = other.sign(&unsigned).unwrap();
    let why = install(&host, from("/ipfs/bafy", of_other.clone()), all).await.unwrap_err();
    assert!(why.to_string().contains(&format!("the key {}, which the config does not name", other.signer())));
    // Whoever vouches for the digest vouches for no other.
    let vouched =
        |component: &[u8], digest: Digest| Proposal { trust: Some(digest), ..from(FAR, component.to_vec()) };
    let why = install(&host, vouched(&unsigned, Digest::of(&of_other)), all).await.unwrap_err();
    assert!(why.to_string().contains("not "), "{why}");
    install(&host, vouched(&unsigned, Digest::of(&unsigned)), all).await.unwrap();
    let signed = acme.sign(&probe("2.0.0", &json!([]))).unwrap();
    install(&host, from(FAR, signed.clone()), all).await.unwrap();
    assert_eq!(version(&host), "2.0.0");
    // A byte that was changed is seen, whoever it comes from.
    let mut changed = acme.sign(&probe("3.0.0", &json!([]))).unwrap();
    let words = b"Does what it is told";
    let at = changed.windows(words.len()).rposition(|window| window == words).unwrap();
    changed[at] = b'd';
    let why = install(&host, from("a file", changed), all).await.unwrap_err();
    assert!(why.to_string().contains("its signature fits none"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_who_is_trusted_has_signed_can_be_refused_at_a_start_too() {
    let acme = SigningKey::generate();
    let component = acme.sign(&probe("1.0.0", &json!([]))).unwrap();
    let host = trusting(&[], json!("allow")).start().await;
    install(&host, from(FAR, component.clone()), Grant::AllThatIsAsked).await.unwrap();
    let strict = trusting(&[], json!("refuse"));
    let host = strict.start_in(host.stop().await).await;
    let refused = host.host.not_loaded();
    assert!(refused[0].reason.contains("signing.unsigned"), "{refused:?}");
    let named = trusting(&[("acme", &acme.signer())], json!("refuse"));
    let host = named.start_in(host.stop().await).await;
    assert_eq!(version(&host), "1.0.0");
    let bare = Proposal {
        trust: Some(Digest::of(&probe("2.0.0", &json!([])))),
        ..from("a file", probe("2.0.0", &json!([])))
    };
    let why = install(&host, bare, Grant::AllThatIsAsked).await.unwrap_err();
    assert!(
        why.to_string().contains("without a trusted signature do not run here"),
        "nobody can vouch for it: {why}"
    );
    // What comes with the host needs no signature.
    let bundled = Setup::bundled().yaml("signing: { unsigned: refuse }\n").start().await;
    assert_eq!(bundled.host.not_loaded(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn grants_are_for_whoever_has_signed() {
    let (acme, other) = (SigningKey::generate(), SigningKey::generate());
    let host = trusting(&[("acme", &acme.signer())], json!("allow")).start().await;
    let of = |key: &SigningKey, version: &str| key.sign(&probe(version, &json!([]))).unwrap();
    install(&host, from("a file", of(&acme, "1.0.0")), Grant::AllThatIsAsked).await.unwrap();
    let publish = json!([{ "do": "publish", "topic": "probe.out", "data": "x" }]);
    assert_eq!(host.run(publish.clone()).await[0]["ok"], Value::Null);
    // The same one's next version has them, too.
    assert_eq!(
        install(&host, from("a file", of(&acme, "1.1.0")), Grant::AsBefore).await.unwrap().state,
        State::OnProbation
    );
    // Another's, and one that nobody has signed, wait until that is agreed to.
    for component in [of(&other, "2.0.0"), probe("2.0.0", &json!([]))] {
        let change = install(&host, from("a file", component), Grant::AsBefore).await.unwrap();
        assert_eq!(change.state, State::Pending);
        assert!(change.missing[0].contains("in place of code signed by acme"), "{:?}", change.missing);
        assert!(change.missing.iter().any(|words| words == "publish on probe.out"), "{:?}", change.missing);
        assert_eq!(version(&host), "1.1.0");
    }
    install(&host, from("a file", of(&other, "2.1.0")), Grant::AsBefore).await.unwrap();
    // Not by a grant of something else.
    let allow = |change: Value| serde_json::from_value::<GrantChange>(change).unwrap();
    let some = allow(
        json!({ "allow": { "publish": ["probe.out"], "subscribe": ["probe.in"], "write": ["probe-key"] } }),
    );
    host.host.grant(&name(), some, "the test").await.unwrap();
    assert_eq!(version(&host), "1.1.0");
    let seen = host.host.grants(&name()).unwrap().pending.unwrap().digest;
    let all = allow(json!({ "all": true, "pending": seen }));
    let granted = host.host.grant(&name(), all, "the test").await.unwrap();
    assert_eq!(granted.change.unwrap().state, State::OnProbation);
    assert_eq!(version(&host), "2.1.0");
    assert_eq!(host.run(publish.clone()).await[0]["ok"], Value::Null);
    // What goes back has what was given, also after a restart.
    host.host.roll_back(&name(), None, "the test").await.unwrap();
    assert_eq!(version(&host), "1.0.0");
    let setup = trusting(&[("acme", &acme.signer())], json!("allow"));
    let host = setup.start_in(host.stop().await).await;
    assert_eq!(host.run(publish.clone()).await[0]["ok"], Value::Null);
    assert!(host.host.grants(&name()).unwrap().missing.is_empty());
    let change = install(&host, from("a file", of(&other, "2.2.0")), Grant::AllThatIsAsked).await.unwrap();
    assert_eq!(change.state, State::OnProbation);
    // And now acme's would wait.
    let change = install(&host, from("a file", of(&acme, "3.0.0")), Grant::AsBefore).await.unwrap();
    assert_eq!(change.state, State::Pending);
    let dir = host.stop().await;
    let host = trusting(&[("acme", &acme.signer())], json!("allow")).start_in(dir).await;
    let pending = host.host.grants(&name()).unwrap().pending.unwrap();
    assert_eq!(pending.signer, Some(acme.signer()));
}

#[test]
fn keys_are_made_components_are_signed_and_verified_at_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let run = |args: &[&str]| {
        let output = std::process::Command::new(PROGRAM).args(args).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    };
    let (key, file, public) = (path("key.pem"), path("plugin.wasm"), path("key.pem.pub"));
    let late = with_manifest(&std::fs::read(dim_tests::PROBE).unwrap(), &manifest_of("late"));
    std::fs::write(&file, late).unwrap();
    assert_eq!(run(&["plugin", "verify", &file]).0, 5, "nobody has signed it");
    let (code, _, told) = run(&["plugin", "keygen", &key]);
    assert_eq!(code, 0, "{told}");
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(run(&["plugin", "keygen", &key]).0, 1, "a key is not overwritten");
    let signer: Signer = std::fs::read_to_string(&public).unwrap().parse().unwrap();
    assert!(told.contains(&format!("signing: {{ signers: {{ NAME: {signer} }} }}")), "{told}");
    let (code, _, why) = run(&["plugin", "sign", &file, "--key", &public]);
    assert!(code == 1 && why.contains("holds no secret key"), "{why}");
    assert_eq!(run(&["plugin", "sign", &file, "--key", &key]).0, 0);
    let (code, shown, _) = run(&["plugin", "verify", &file, "--output", "json"]);
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!((code, &shown["signer"]), (0, &json!(signer.to_string())));
    assert_eq!(run(&["plugin", "verify", &file, "--key", &public]).0, 0);
    let other = SigningKey::generate().signer().to_string();
    assert_eq!(run(&["plugin", "verify", &file, "--key", &other]).0, 5);
    let (_, shown, _) = run(&["plugin", "inspect", &file]);
    assert!(shown.contains(&signer.to_string()), "{shown}");

    // A host that trusts the key takes it from anywhere; any other component is to be vouched for.
    std::fs::write(dir.path().join("config.yaml"), format!("signing: {{ signers: {{ me: {signer} }} }}\n"))
        .unwrap();
    let config = path("config.yaml");
    let host = Program::start(Path::new(PROGRAM), &dir.path().join("state"), &["--config", &config]);
    let url = super::plugins::serve_once_each(std::fs::read(&file).unwrap());
    let installed = host.dim(&["plugin", "install", &url, "--grant"]);
    assert!(installed.status.success(), "{}", String::from_utf8_lossy(&installed.stderr));
    let bare = probe("2.0.0", &json!([]));
    let digest = Digest::of(&bare);
    let url = super::plugins::serve_once_each(bare);
    let refused = host.dim(&["plugin", "install", &url, "--grant"]);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(5) && why.contains(&format!("--trust {digest}")), "{why}");
    assert!(
        host.dim(&["plugin", "install", &url, "--grant", "--trust", &digest.to_string()]).status.success()
    );
}

fn manifest_of(name: &str) -> String {
    format!(
        "name = {name:?}\nversion = \"1.0.0\"\nstate-version = 1\n[config.on_start]\ntype = \"string\"\ndefault = \"[]\"\n[config.on_call]\ntype = \"string\"\ndefault = \"null\"\n"
    )
}
