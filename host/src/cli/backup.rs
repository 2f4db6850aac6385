//! `dim backup` and `dim restore`.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use dim_client::ClientError;
use futures::{Stream, StreamExt as _};
use serde_json::json;

use super::client::Client;
use super::output::Output;
use crate::backup::{self, Head, Passphrase};

/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Where a passphrase comes from.
#[derive(Debug, Args)]
struct Secret {
    /// The file with the passphrase, in its first line [default: DIM_PASSPHRASE, or asked for]
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Backup {
    /// Where the backup goes
    file: PathBuf,
    #[command(flatten)]
    secret: Secret,
    /// Replace a file that is there
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
pub struct Restore {
    /// The backup
    file: PathBuf,
    #[command(flatten)]
    secret: Secret,
}

/// How often a passphrase is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    Once,
    /// It cannot be seen, and what is closed with a slip of the finger stays closed.
    Twice,
}

impl Secret {
    fn text(&self, asked: Asked) -> anyhow::Result<String> {
        if let Some(file) = &self.passphrase_file {
            let text = std::fs::read_to_string(file)
                .with_context(|| format!("cannot read the passphrase from {}", file.display()))?;
            return Ok(text.lines().next().unwrap_or_default().to_owned());
        }
        if let Ok(text) = std::env::var("DIM_PASSPHRASE") {
            return Ok(text);
        }
        if !std::io::stdin().is_terminal() {
            anyhow::bail!(
                "a backup holds the host's private keys and is encrypted: give --passphrase-file or DIM_PASSPHRASE"
            );
        }
        let text = rpassword::prompt_password("Passphrase: ")?;
        if asked == Asked::Twice && text != rpassword::prompt_password("The same again: ")? {
            anyhow::bail!("these were two passphrases");
        }
        Ok(text)
    }
}

impl Backup {
    pub async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        if self.file.exists() && !self.force {
            anyhow::bail!("{} is there already; --force replaces it", self.file.display());
        }
        let text = self.secret.text(Asked::Twice)?;
        let passphrase = Passphrase::new(text.clone())?;
        let chunks = client.chunks(&["backup"], &json!({ "passphrase": text })).await?;
        let half = half_of(&self.file);
        let bytes = receive(chunks, &half).await;
        let kept = bytes.and_then(|bytes| {
            // What cannot be opened again is no backup.
            let head = backup::verify(File::open(&half)?, passphrase)?;
            std::fs::rename(&half, &self.file)?;
            Ok((head, bytes))
        });
        if kept.is_err() {
            let _ = std::fs::remove_file(&half);
        }
        let (head, bytes) = kept.with_context(|| format!("no backup was made in {}", self.file.display()))?;
        tell(out, &self.file, bytes, &head)
    }
}

/// Beside the file, so that a backup appears whole or not at all.
fn half_of(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(".half");
    file.with_file_name(name)
}

/// Writes what comes into a file that only the owner can read; returns how many bytes came.
async fn receive(
    chunks: impl Stream<Item = Result<bytes::Bytes, ClientError>>,
    half: &Path,
) -> anyhow::Result<u64> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(half).with_context(|| format!("cannot write {}", half.display()))?;
    let (mut received, mut told) = (0_u64, Instant::now());
    let mut chunks = pin!(chunks);
    while let Some(chunk) = chunks.next().await.transpose()? {
        file.write_all(&chunk)?;
        received += chunk.len() as u64;
        if told.elapsed() > TELL_EVERY && std::io::stderr().is_terminal() {
            eprint!("\r{received} bytes …");
            told = Instant::now();
        }
    }
    file.sync_all()?;
    Ok(received)
}

fn tell(out: &Output, file: &Path, bytes: u64, head: &Head) -> anyhow::Result<()> {
    let mut told = json!(head);
    told["file"] = json!(file);
    told["bytes"] = json!(bytes);
    out.object(&told)
}

impl Restore {
    pub fn execute(self, state_dir: &Path, out: &Output) -> anyhow::Result<()> {
        let file = File::open(&self.file).with_context(|| format!("cannot read {}", self.file.display()))?;
        let bytes = file.metadata()?.len();
        let passphrase = Passphrase::new(self.secret.text(Asked::Once)?)?;
        let restored = backup::restore(file, passphrase, state_dir);
        let head = restored.with_context(|| format!("{} is not restored", state_dir.display()))?;
        tell(out, state_dir, bytes, &head)
    }
}
