//! Owns `dim plugin keygen`, `sign` and `verify`: keys for signatures, and signed components. They need no host.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use dim_model::signer::Signer;
use dim_runtime::signing::{SigningKey, signer_of};
use serde_json::json;

use crate::output::{Output, notes};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Generate a key for signing components
    Keygen {
        /// Output file for the secret key; the public key is written to FILE.pub
        file: PathBuf,
    },
    /// Sign a component
    Sign {
        /// Component file
        file: PathBuf,
        /// Secret key, a PEM file
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        /// Output file [default: overwrite the component]
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Verify the signature of a component
    Verify {
        /// Component file
        file: PathBuf,
        /// Accepted signer: a public key, or its PEM file
        #[arg(long, value_name = "KEY")]
        key: Vec<String>,
    },
}

impl Command {
    pub fn execute(self, out: &Output) -> anyhow::Result<()> {
        match self {
            Self::Keygen { file } => keygen(&file, out),
            Self::Sign { file, key, out: to } => sign(&file, &key, to, out),
            Self::Verify { file, key } => verify(&file, &key, out),
        }
    }
}

/// The error for a component without a valid signature, or with one of an unaccepted signer.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotSigned(String);

/// Generates a key. Writes the secret key to `file` and the public key to `FILE.pub`. Fails if either file exists.
fn keygen(file: &Path, out: &Output) -> anyhow::Result<()> {
    let key = SigningKey::generate();
    let public = beside(file, ".pub");
    write(file, key.to_pem().as_bytes(), 0o600)?;
    write(&public, key.signer().to_pem().as_bytes(), 0o644)?;
    if !out.is_json() {
        notes(&format!(
            "a host trusts this key with these lines in its config:\n  signing: {{ signers: {{ NAME: {} }} }}",
            key.signer()
        ));
    }
    out.object(&json!({ "secret": file, "public": public, "signer": key.signer() }))
}

/// Signs a component. The output file is replaced atomically.
fn sign(file: &Path, key: &Path, to: Option<PathBuf>, out: &Output) -> anyhow::Result<()> {
    let secret = std::fs::read_to_string(key).with_context(|| format!("cannot read {}", key.display()))?;
    let key =
        SigningKey::from_pem(&secret).with_context(|| format!("{} holds no secret key", key.display()))?;
    let component = read(file)?;
    dim_runtime::inspect(&component).with_context(|| format!("{} is not a plugin", file.display()))?;
    let signed = key.sign(&component)?;
    let to = to.unwrap_or_else(|| file.to_owned());
    let half = beside(&to, ".half");
    let written =
        File::create(&half).and_then(|mut half| half.write_all(&signed).and_then(|()| half.sync_all()));
    written.with_context(|| format!("cannot write {}", half.display()))?;
    std::fs::rename(&half, &to).with_context(|| format!("cannot write {}", to.display()))?;
    let inspection = dim_runtime::inspect(&signed)?;
    out.object(&json!({
        "file": to,
        "plugin": inspection.manifest.name,
        "version": inspection.manifest.version,
        "digest": inspection.digest,
        "signer": key.signer(),
    }))
}

/// Shows the signer of a component. Fails if `keys` is not empty and does not contain the signer.
fn verify(file: &Path, keys: &[String], out: &Output) -> anyhow::Result<()> {
    let known = keys.iter().map(|key| read_key(key)).collect::<anyhow::Result<Vec<_>>>()?;
    let component = read(file)?;
    let shown = file.display();
    let inspection = dim_runtime::inspect(&component).with_context(|| format!("{shown} is not a plugin"))?;
    let signer = match signer_of(&component, &known) {
        Ok(Some(signer)) => signer,
        Ok(None) => bail!(NotSigned(format!("{shown} is not signed"))),
        Err(error) => bail!(NotSigned(format!("{shown}: {error}"))),
    };
    if !known.is_empty() && !known.contains(&signer) {
        bail!(NotSigned(format!("{shown} is signed by {signer}, which is not an accepted signer")));
    }
    out.object(&json!({
        "file": file,
        "plugin": inspection.manifest.name,
        "version": inspection.manifest.version,
        "digest": inspection.digest,
        "signer": signer,
    }))
}

/// Reads a public key: the key itself in one line, or a PEM file.
fn read_key(key: &str) -> anyhow::Result<Signer> {
    if let Ok(signer) = key.parse() {
        return Ok(signer);
    }
    let text =
        std::fs::read_to_string(key).with_context(|| format!("{key} is neither a public key nor a file"))?;
    text.parse().with_context(|| format!("{key} holds no public key"))
}

fn read(file: &Path) -> anyhow::Result<Vec<u8>> {
    dim_runtime::read(file).with_context(|| format!("cannot read {}", file.display()))
}

/// The path with a suffix.
fn beside(file: &Path, ending: &str) -> PathBuf {
    let mut path = file.as_os_str().to_owned();
    path.push(ending);
    path.into()
}

/// Writes a new file with these permissions. Fails if the file exists.
fn write(file: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    let made = OpenOptions::new().write(true).create_new(true).mode(mode).open(file);
    made.and_then(|mut made| made.write_all(bytes).and_then(|()| made.sync_all()))
        .with_context(|| format!("cannot write {}", file.display()))
}
