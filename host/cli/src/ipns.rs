//! Owns `dim ipns`: the subcommands for IPNS names and keys, and their requests to the API.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use dim_model::time::duration_of;
use dim_server::host::Adoption;
use reqwest::Method;
use serde_json::{Value, json};

use crate::client::Client;
use crate::input;
use crate::output::{Column, Output, bytes, cell, note};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Publish a path under the name of a key
    Publish {
        /// Key; the host creates it if it does not exist
        key: String,
        /// Path to publish: /ipfs/CID or /ipns/NAME, optionally followed by a path below it
        path: String,
        #[command(flatten)]
        how: How,
    },
    /// Resolve a name
    Resolve {
        /// IPNS name, or a key of this host
        name: String,
    },
    /// Store a file and publish it under the name of a key
    UpdateState {
        /// Key; the host creates it if it does not exist
        key: String,
        /// File to store
        file: PathBuf,
        #[command(flatten)]
        how: How,
    },
    /// Write the document behind a name to standard output
    ///
    /// A document that is encrypted for a group of the fleet is decrypted, if this host has the key.
    GetState {
        /// IPNS name, or a key of this host
        name: String,
    },
    /// Decide about a document that this host has not published under its name
    ///
    /// The host publishes nothing under a name on hold: the name points to a document that the host does not know,
    /// such as the earlier state of a fleet or the document of another writer. `dim status` shows such names.
    Adopt {
        /// Key of a name on hold
        key: String,
        /// `import`: plugins import the document, then the host publishes; `replace`: the host overwrites the document
        #[arg(value_enum)]
        how: Adoption,
    },
    /// Forget a name: its value, its hold and its key
    ///
    /// Nothing is deleted in the daemon and nothing is published. Use it for another host's key that this host has
    /// adopted by mistake, and for the old key after `ipfs.ipns_key_name` was changed: the host keeps its record alive
    /// otherwise. A key that a plugin uses is refused.
    Forget {
        /// The key, as `dim ipns ls` shows it
        key: String,
        /// Delete the private key if this host has made it: the name is lost for good
        #[arg(long)]
        delete_key: bool,
    },
    /// Import the private key of an adopted key
    ///
    /// From then on the key is in backups, and the host puts it again into a daemon that has lost it. Example:
    /// ipfs key export -o fleet.key dim-state-key && dim ipns import-key dim-state-key fleet.key
    ImportKey {
        /// The key, as `dim ipns ls` shows it
        key: String,
        /// The file that `ipfs key export` has written; delete it afterwards
        file: PathBuf,
    },
    /// List the keys, their names, and where their private keys are
    ///
    /// HELD BY is `host` for a key in the state directory, which is in backups, and `daemon` for an adopted key, which
    /// only the daemon has. ENCRYPTED is the group that reads the document.
    Ls,
    /// Show the name of a key
    KeyId {
        /// Key; the host creates it if it does not exist
        key: String,
    },
}

#[derive(Debug, Args)]
pub struct How {
    /// Lifetime of the record, as in 90s, 30m or 24h; the host renews the record at half of its lifetime
    #[arg(long, value_parser = duration_of, default_value = "24h")]
    lifetime: Duration,
    /// Publish even if a plugin publishes under the key or the name is on hold: the fleet reads the value as the value
    /// of the plugin until the plugin publishes its next one
    #[arg(long)]
    force: bool,
}

impl How {
    fn query(&self) -> [(&'static str, String); 2] {
        [("lifetime_seconds", self.lifetime.as_secs().to_string()), ("force", self.force.to_string())]
    }
}

impl Command {
    pub async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        match self {
            Self::Publish { key, path, how } => {
                let body = json!({ "path": path });
                let set = client.send_json(Method::PUT, &["keys", &key, "path"], &how.query(), &body).await?;
                tell(out, &set)
            }
            Self::UpdateState { key, file, how } => {
                let data = input::file(&file)?;
                let set =
                    client.send_bytes(Method::PUT, &["keys", &key, "state"], &how.query(), data).await?;
                tell(out, &set)
            }
            Self::Adopt { key, how } => {
                let body = json!({ "how": how });
                let path = &["keys", &key, "adopt"];
                let adopted = client.send_json(Method::POST, path, &[], &body).await?;
                out.object(&adopted)?;
                if adopted["refused"].as_u64().is_some_and(|rows| rows > 0) {
                    note(&format!(
                        "warning: {} rows cannot be read and are left out; {} still has them",
                        adopted["refused"],
                        cell(adopted.get("path"))
                    ));
                }
                Ok(())
            }
            Self::Forget { key, delete_key } => {
                let query = [("delete_key", delete_key.to_string())];
                let path = &["keys", key.as_str()];
                out.object(&client.send_bytes(Method::DELETE, path, &query, Vec::new()).await?)
            }
            Self::ImportKey { key, file } => {
                let path = &["keys", key.as_str(), "private"];
                out.object(&client.send_bytes(Method::PUT, path, &[], input::file(&file)?).await?)
            }
            Self::Ls => {
                const COLUMNS: [Column; 7] = [
                    Column::word("KEY", "/key"),
                    Column::word("HELD BY", "/held_by"),
                    Column::word("PUBLISHED", "/published"),
                    Column::word("ENCRYPTED", "/encrypted"),
                    Column::word("HOLD", "/hold/cause"),
                    Column::word("USED BY", "/used_by"),
                    Column::word("NAME", "/name"),
                ];
                out.rows(&client.get(&["keys"], &[]).await?, &COLUMNS)
            }
            Self::Resolve { name } => out.object(&client.get(&["names", &name], &[]).await?),
            Self::GetState { name } => bytes(&client.get_bytes(&["names", &name, "state"]).await?),
            Self::KeyId { key } => {
                out.object(&client.send_bytes(Method::PUT, &["keys", &key], &[], Vec::new()).await?)
            }
        }
    }
}

fn tell(out: &Output, set: &Value) -> anyhow::Result<()> {
    out.object(set)?;
    if let Some(why) = set["hold"].as_str() {
        note(&format!("warning: the name is on hold, and the value is not published: {why}"));
    } else if set["published"] == false {
        note("warning: the backend has not accepted the record yet; the host keeps trying");
    }
    Ok(())
}
