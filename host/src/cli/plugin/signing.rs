//! `dim plugin keygen`, `sign` and `verify`: they need no host.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use serde_json::json;

use crate::cli::output::{Output, notes};
use crate::plugin;
use crate::signing::{Signer, SigningKey, signer_of};

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

/// A component that nobody has signed, or not whom the user wants.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotSigned(String);

/// Makes a key: the secret one in `file`, the public one beside it.
fn keygen(file: &Path, out: &Output) -> anyhow::Result<()> {
    let key = SigningKey::generate();
    let public = beside(file, ".pub");
    write(file, key.to_pem().as_bytes(), 0o600)?;
    write(&public, key.signer().to_pem().as_bytes(), 0o644)?;
    if !out.is_json() {
        notes(&format!(
            "hosts trust it with this in their config:\n  signing: {{ signers: {{ NAME: {} }} }}",
            key.signer()
        ));
    }
    out.object(&json!({ "secret": file, "public": public, "signer": key.signer() }))
}

/// Signs a component; the file is exchanged as a whole.
fn sign(file: &Path, key: &Path, to: Option<PathBuf>, out: &Output) -> anyhow::Result<()> {
    let secret = std::fs::read_to_string(key).with_context(|| format!("cannot read {}", key.display()))?;
    let key =
        SigningKey::from_pem(&secret).with_context(|| format!("{} holds no secret key", key.display()))?;
    let component = read(file)?;
    plugin::inspect(&component).with_context(|| format!("{} is not a plugin", file.display()))?;
    let signed = key.sign(&component)?;
    let to = to.unwrap_or_else(|| file.to_owned());
    let half = beside(&to, ".half");
    let written =
        File::create(&half).and_then(|mut half| half.write_all(&signed).and_then(|()| half.sync_all()));
    written.with_context(|| format!("cannot write {}", half.display()))?;
    std::fs::rename(&half, &to).with_context(|| format!("cannot write {}", to.display()))?;
    let inspection = plugin::inspect(&signed)?;
    out.object(&json!({
        "file": to,
        "plugin": inspection.manifest.name,
        "version": inspection.manifest.version,
        "digest": inspection.digest,
        "signer": key.signer(),
    }))
}

/// Says who has signed a component; it must be one of these, if there are any.
fn verify(file: &Path, keys: &[String], out: &Output) -> anyhow::Result<()> {
    let known = keys.iter().map(|key| read_key(key)).collect::<anyhow::Result<Vec<_>>>()?;
    let component = read(file)?;
    let shown = file.display();
    let inspection = plugin::inspect(&component).with_context(|| format!("{shown} is not a plugin"))?;
    let signer = match signer_of(&component, &known) {
        Ok(Some(signer)) => signer,
        Ok(None) => bail!(NotSigned(format!("nobody has signed {shown}"))),
        Err(error) => bail!(NotSigned(format!("{shown}: {error}"))),
    };
    if !known.is_empty() && !known.contains(&signer) {
        bail!(NotSigned(format!("{signer} has signed {shown}")));
    }
    out.object(&json!({
        "file": file,
        "plugin": inspection.manifest.name,
        "version": inspection.manifest.version,
        "digest": inspection.digest,
        "signer": signer,
    }))
}

/// A public key: a PEM file, or its line.
fn read_key(key: &str) -> anyhow::Result<Signer> {
    if let Ok(signer) = key.parse() {
        return Ok(signer);
    }
    let text =
        std::fs::read_to_string(key).with_context(|| format!("{key} is neither a public key nor a file"))?;
    text.parse().with_context(|| format!("{key} holds no public key"))
}

fn read(file: &Path) -> anyhow::Result<Vec<u8>> {
    plugin::read(file).with_context(|| format!("cannot read {}", file.display()))
}

/// The path with an ending more.
fn beside(file: &Path, ending: &str) -> PathBuf {
    let mut path = file.as_os_str().to_owned();
    path.push(ending);
    path.into()
}

/// Writes a file that must not be there yet.
fn write(file: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    let made = OpenOptions::new().write(true).create_new(true).mode(mode).open(file);
    made.and_then(|mut made| made.write_all(bytes).and_then(|()| made.sync_all()))
        .with_context(|| format!("cannot write {}", file.display()))
}
