//! `dim backup` and `dim restore`.

use std::fs::File;
use std::io::{self, IsTerminal as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use dim_client::ClientError;
use futures::Stream;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::client::{self, Client};
use super::output::{self, Output};
use super::signals::Signals;
use crate::backup::{self, BackupError, Head, Passphrase};

/// Where a passphrase comes from.
#[derive(Debug, Args)]
struct Secret {
    /// File with the passphrase in its first line [default: the value of DIM_PASSPHRASE, else a prompt]
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Backup {
    /// Output file
    file: PathBuf,
    #[command(flatten)]
    secret: Secret,
    /// Overwrite the file if it exists
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
pub struct Restore {
    /// Backup file
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
        output::check_replaceable(&self.file, self.force)?;
        // The host makes one backup at a time: what cannot be written is not begun.
        let directory = std::path::absolute(&self.file)?.parent().map_or_else(PathBuf::new, Path::to_owned);
        if !directory.is_dir() {
            anyhow::bail!("there is no folder {}", directory.display());
        }
        let text = self.secret.text(Asked::Twice)?;
        let passphrase = Passphrase::new(text.clone())?;
        let chunks = client.chunks(&["backup"], &json!({ "passphrase": text })).await?;
        let kept = self.keep(chunks, passphrase).await;
        let (head, bytes) = kept.with_context(|| format!("no backup was made in {}", self.file.display()))?;
        tell(out, &self.file, bytes, &head, Some(left_out(client).await?))
    }

    /// Keeps what comes, once it is seen that it opens: a backup appears whole or not at all.
    async fn keep(
        &self,
        chunks: impl Stream<Item = Result<bytes::Bytes, ClientError>>,
        passphrase: Passphrase,
    ) -> anyhow::Result<(Head, u64)> {
        let path = std::path::absolute(&self.file)?;
        let directory = path.parent().unwrap_or(Path::new("/"));
        // Only the owner can read it, and it goes with the value.
        let mut half = tempfile::Builder::new().prefix(".dim-backup-").tempfile_in(directory)?;
        let bytes = unless_interrupted(client::receive(chunks, half.as_file_mut())).await??;
        let written = half.reopen()?;
        let head = interruptible(written, |written| backup::verify(written, passphrase)).await?;
        let put = if self.force { half.persist(&path) } else { half.persist_noclobber(&path) };
        put.map_err(|error| error.error)?;
        File::open(directory)?.sync_all()?;
        Ok((head, bytes))
    }
}

/// The error of what the user has asked to end.
fn interrupted() -> io::Error {
    io::Error::other("interrupted")
}

async fn unless_interrupted<R>(work: impl Future<Output = R>) -> io::Result<R> {
    let mut signals = Signals::new()?;
    tokio::select! {
        biased;
        () = signals.next() => Err(interrupted()),
        done = work => Ok(done),
    }
}

/// Works on a file off the async threads, until the user asks to end: then the file cannot be read any
/// further, and the work clears away what it has made.
async fn interruptible<R: Send + 'static>(
    file: File,
    work: impl FnOnce(Interruptible) -> Result<R, BackupError> + Send + 'static,
) -> anyhow::Result<R> {
    let stop = CancellationToken::new();
    let file = Interruptible { file, stop: stop.clone() };
    let mut working = tokio::task::spawn_blocking(move || work(file));
    let done = match unless_interrupted(&mut working).await {
        Ok(done) => done,
        Err(_) => {
            stop.cancel();
            let at_once = "stopped at once, on a second signal: delete the .restoring-… that is left";
            unless_interrupted(working).await.context(at_once)?
        }
    };
    Ok(done.expect("the work does not panic")?)
}

/// A file that can be read until the user asks to end.
struct Interruptible {
    file: File,
    stop: CancellationToken,
}

impl io::Read for Interruptible {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.stop.is_cancelled() { Err(interrupted()) } else { self.file.read(bytes) }
    }
}

/// The keys whose private half the daemon alone has.
async fn left_out(client: &Client) -> anyhow::Result<Vec<String>> {
    let keys = client.get(&["keys"], &[]).await?;
    let of_daemon = keys.as_array().into_iter().flatten().filter(|row| row["held_by"] == "daemon");
    Ok(of_daemon.filter_map(|row| Some(row["key"].as_str()?.to_owned())).collect())
}

fn tell(
    out: &Output,
    file: &Path,
    bytes: u64,
    head: &Head,
    left_out: Option<Vec<String>>,
) -> anyhow::Result<()> {
    let mut told = json!(head);
    told["file"] = json!(file);
    told["bytes"] = json!(bytes);
    for key in left_out.iter().flatten() {
        output::note(&format!(
            "warning: the private half of the key {key} is in the daemon alone and not in this backup: `ipfs key export -o FILE {key}`, then `dim ipns import-key {key} FILE`, and make the backup again"
        ));
    }
    if let Some(left_out) = left_out {
        told["keys_not_in_backup"] = json!(left_out);
    }
    out.object(&told)
}

impl Restore {
    pub async fn execute(self, state_dir: PathBuf, out: &Output) -> anyhow::Result<()> {
        let file = File::open(&self.file).with_context(|| format!("cannot read {}", self.file.display()))?;
        let bytes = file.metadata()?.len();
        let passphrase = Passphrase::new(self.secret.text(Asked::Once)?)?;
        let place = state_dir.clone();
        let restored = interruptible(file, move |file| backup::restore(file, passphrase, &place)).await;
        let head = restored.with_context(|| format!("{} is not restored", state_dir.display()))?;
        tell(out, &state_dir, bytes, &head, None)
    }
}
