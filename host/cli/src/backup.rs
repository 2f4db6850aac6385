//! Owns `dim backup` and `dim restore`. Receives a passphrase and a file; writes an encrypted backup of the running
//! host, or a state directory from one.

use std::fs::File;
use std::io::{self, IsTerminal as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use dim_client::ClientError;
use dim_server::backup::{self, BackupError, Head, Passphrase};
use futures::Stream;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::client::{self, Client};
use crate::output::{self, Output};
use crate::signals::Signals;

/// The source of the passphrase.
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

/// The number of times that the prompt asks for a passphrase.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    Once,
    /// For a new backup: the input is invisible, and a typing error would make the backup unreadable.
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
        if asked == Asked::Twice && text != rpassword::prompt_password("Repeat the passphrase: ")? {
            anyhow::bail!("the two passphrases differ");
        }
        Ok(text)
    }
}

impl Backup {
    pub async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        output::check_replaceable(&self.file, self.force)?;
        // The host makes one backup at a time, so the command checks the directory before it starts one.
        let directory = std::path::absolute(&self.file)?.parent().map_or_else(PathBuf::new, Path::to_owned);
        if !directory.is_dir() {
            anyhow::bail!("there is no directory {}", directory.display());
        }
        let text = self.secret.text(Asked::Twice)?;
        let passphrase = Passphrase::new(text.clone())?;
        let chunks = client.chunks(&["backup"], &json!({ "passphrase": text })).await?;
        let kept = self.keep(chunks, passphrase).await;
        let (head, bytes) = kept.with_context(|| format!("no backup was made in {}", self.file.display()))?;
        tell(out, &self.file, bytes, &head, Some(left_out(client).await?))
    }

    /// Receives the backup, verifies it with the passphrase, and then moves it to its path. So the file is either
    /// complete or absent.
    async fn keep(
        &self,
        chunks: impl Stream<Item = Result<bytes::Bytes, ClientError>>,
        passphrase: Passphrase,
    ) -> anyhow::Result<(Head, u64)> {
        let path = std::path::absolute(&self.file)?;
        let directory = path.parent().unwrap_or(Path::new("/"));
        // Only the owner can read a temporary file, and dropping the value deletes it.
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

/// The error of an operation that the user has interrupted.
fn interrupted() -> io::Error {
    io::Error::other("interrupted")
}

/// Awaits `work`, or returns an error on SIGINT or SIGTERM.
async fn unless_interrupted<R>(work: impl Future<Output = R>) -> io::Result<R> {
    let mut signals = Signals::new()?;
    tokio::select! {
        biased;
        () = signals.next() => Err(interrupted()),
        done = work => Ok(done),
    }
}

/// Runs `work` on a file outside the async threads. After SIGINT or SIGTERM each read of the file fails, so that the
/// work ends with an error and cleans up. A second signal returns without waiting for that.
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
            let at_once =
                "stopped immediately on a second signal: delete the remaining .restoring-… directory";
            unless_interrupted(working).await.context(at_once)?
        }
    };
    Ok(done.expect("the work does not panic")?)
}

/// A file whose reads fail after the user has interrupted the command.
struct Interruptible {
    file: File,
    stop: CancellationToken,
}

impl io::Read for Interruptible {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.stop.is_cancelled() { Err(interrupted()) } else { self.file.read(bytes) }
    }
}

/// The keys whose private keys only the daemon has.
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
            "warning: only the daemon has the private key {key}, so it is not in this backup: run `ipfs key export -o FILE {key}` and `dim ipns import-key {key} FILE`, then make the backup again"
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
