//! Owns the adoption of names that are on hold: what somebody else has published under a key of this host is taken
//! over by the plugins, or overwritten, as the operator says.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use thiserror::Error;
use utoipa::ToSchema;

use super::{Host, UNHURT};
use crate::backend::{BackendError, Current};
use crate::commit::{CommitError, NameChange};
use crate::effect::{NameUpdate, NameValue};
use crate::ident::{ContentPath, KeyName, PluginName};
use crate::names::published_file;
use crate::plugin::ReplyError;
use crate::store::names::{self, Cause, Hold, KeyUse, Known};
use crate::store::{StoreError, documents};
use crate::time::Timestamp;
use crate::trouble::{Code, Trouble};

/// The command by which a plugin takes over a document. Its body is `{"key": KEY, "document": JSON}`.
const IMPORT: &str = "import";

/// What becomes of a document that somebody else has published under a key of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Adoption {
    /// The plugins that import the key's documents take its content over, then the host publishes under the name.
    Import,
    /// The host publishes under the name, and its own value takes the place of what is there.
    Replace,
}

/// A name that is on hold no more.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Adopted {
    /// The key.
    pub key: KeyName,
    /// What the name pointed to; the name itself if there was no record.
    pub path: ContentPath,
    /// The record's sequence; null if the backend did not show it.
    #[schema(required)]
    pub sequence: Option<u64>,
    /// The plugins that took its content over.
    #[schema(value_type = Vec<String>)]
    pub imported_by: Vec<PluginName>,
    /// What each of them answered, as numbers by their names: how many rows it has taken, and how many not.
    #[schema(value_type = BTreeMap<String, Value>)]
    pub answers: BTreeMap<PluginName, Value>,
    /// Rows that plugins could not read: the documents that are published from now on do not have them. The document
    /// that was imported still does, as long as someone holds it.
    pub refused: u64,
}

/// Rows of imported documents that were left out since the host started, by key, with the document that has them.
#[derive(Debug, Default)]
pub struct LeftOut(Mutex<BTreeMap<KeyName, (u64, ContentPath)>>);

impl LeftOut {
    /// Notes what an import has left out.
    fn note(&self, key: &KeyName, rows: u64, path: &ContentPath) {
        if rows > 0 {
            tracing::warn!(%key, %path, rows, "rows of the imported document cannot be read and are left out");
            self.0.lock().expect(UNHURT).insert(key.clone(), (rows, path.clone()));
        }
    }

    /// The past events that the operator should know of.
    pub fn troubles(&self) -> Vec<Trouble> {
        let left_out = self.0.lock().expect(UNHURT);
        let troubles = left_out.iter().filter_map(|(key, (rows, path))| {
            let message = || {
                format!("rows of the document that was imported for {key} could not be read and are left out: {rows}; {path} still has them")
            };
            Some(Trouble::events(Code::RowsLeftOut, *rows, message)?.about(key))
        });
        troubles.collect()
    }
}

/// Why a name stays on hold.
#[derive(Debug, Error)]
pub enum AdoptError {
    /// It is not.
    #[error("{0} is not on hold: there is nothing to adopt")]
    NotHeld(KeyName),
    /// There is no record to import.
    #[error(
        "the daemon shows no record of {0}, so there is nothing to import yet: wait until it signs one anew, or publish with `dim ipns adopt {0} replace`"
    )]
    NoRecord(KeyName),
    /// No plugin can take over what is there.
    #[error(
        "no running plugin publishes under {0} and imports its documents (`ipns.import` in the manifest): `dim ipns adopt {0} replace` overwrites what is there, `dim ipns forget {0}` leaves it to others"
    )]
    NoImporter(KeyName),
    /// The document cannot be read.
    #[error("cannot read {path}")]
    Unread {
        /// What the name points to.
        path: ContentPath,
        /// Why.
        source: BackendError,
    },
    /// It is not JSON.
    #[error("{path} is not JSON: {why}")]
    NotJson {
        /// What the name points to.
        path: ContentPath,
        /// What is wrong with it.
        why: String,
    },
    /// A plugin has refused it.
    #[error("plugin {plugin} does not import {path}; the name stays on hold")]
    Refused {
        /// The plugin.
        plugin: PluginName,
        /// What the name points to.
        path: ContentPath,
        /// Why.
        source: ReplyError,
    },
    /// The host has lost the key.
    #[error("the host has no key {0}")]
    NoKey(KeyName),
    /// It cannot be written down.
    #[error(transparent)]
    Commit(#[from] CommitError),
}

impl From<StoreError> for AdoptError {
    fn from(error: StoreError) -> Self {
        Self::Commit(error.into())
    }
}

impl Host {
    /// Ends the hold on a name. Imports again from where it stopped if it is repeated after a failure.
    pub async fn adopt(self: &Arc<Self>, key: &KeyName, how: Adoption) -> Result<Adopted, AdoptError> {
        let held = || -> Result<_, StoreError> {
            let known = names::known(&self.store.snapshot()?, key)?;
            Ok(known.and_then(|known| Some((known.hold.clone()?, known))))
        };
        let mut found = held()?;
        if found.is_none() {
            self.looked_at(key).await;
            found = held()?;
        }
        let (hold, known) = found.ok_or_else(|| AdoptError::NotHeld(key.clone()))?;
        let imported = match how {
            Adoption::Import if hold.cause == Cause::NoRecord => {
                return Err(AdoptError::NoRecord(key.clone()));
            }
            Adoption::Import => self.import(key, &hold, &known).await?,
            Adoption::Replace => Vec::new(),
        };
        let refused = imported.iter().filter_map(|(_, answer)| answer["refused"].as_u64()).sum();
        let released = key.clone();
        self.commit.write(move |write| names::release(write, &released, Timestamp::wall())).await?;
        self.commit.names.notify_one();
        let Hold { path, sequence, .. } = hold;
        tracing::info!(%key, %path, ?how, "adopted the name");
        self.left_out.note(key, refused, &path);
        let imported_by = imported.iter().map(|(plugin, _)| plugin.clone()).collect();
        let answers = imported.into_iter().collect();
        Ok(Adopted { key: key.clone(), path, sequence, imported_by, answers, refused })
    }

    /// Waits until the host knows what one of its names points to, if it has started just now or has just made the key;
    /// a daemon that does not say so is waited for 5 s at most.
    pub async fn looked_at(&self, key: &KeyName) {
        if self.backend.network && self.keys.get(key).is_some() {
            self.looks.at(key).await;
        }
    }

    /// Adopts what is on hold since the host began, for it was never published from here, as the config says.
    pub(super) async fn adopt_at_start(self: &Arc<Self>) -> Result<(), StoreError> {
        let Some(how) = self.config.now().ipfs.adopt else { return Ok(()) };
        for (key, known) in names::all(&self.store.snapshot()?)? {
            let is_decided = known.hold.is_some_and(|hold| match hold.cause {
                Cause::NeverPublished | Cause::Restored => true,
                // There is something to import once a record appears.
                Cause::NoRecord => how == Adoption::Replace,
                // It may still be at work: that is for a person to decide.
                Cause::OtherWriter => false,
            });
            if is_decided && let Err(error) = self.adopt(&key, how).await {
                tracing::error!(%key, "cannot adopt the name yet: {}", crate::cause::chain(&error));
            }
        }
        Ok(())
    }

    /// Has plugins take over the document that the name points to. The plugin that publishes under the key is the
    /// last: it may publish what the others have taken over. Returns what each has answered.
    async fn import(
        self: &Arc<Self>,
        key: &KeyName,
        hold: &Hold,
        known: &Known,
    ) -> Result<Vec<(PluginName, Value)>, AdoptError> {
        if self.key_use(key) != KeyUse::Importer {
            return Err(AdoptError::NoImporter(key.clone()));
        }
        let importers = self.importers(key);
        let is_writer = |name: &PluginName| self.writers(key).contains(name);
        let Hold { path, sequence, .. } = hold.clone();
        let current = Current { path: path.clone(), sequence };
        let value = self.published_document(&current, known).await?;
        let body = body_of(key, &path, &value)?;
        let name = self.keys.name(key).ok_or_else(|| AdoptError::NoKey(key.clone()))?;
        let lifetime = std::time::Duration::from_nanos(known.lifetime);
        // Nothing that a plugin published before it has imported may go out.
        let update = NameUpdate { name, value, lifetime };
        self.commit.change_name(NameChange::TakenOver { key: key.clone(), update, current }).await?;
        let (last, first): (Vec<_>, Vec<_>) = importers.into_iter().partition(is_writer);
        let mut answers = Vec::new();
        for plugin in [first, last].concat() {
            let Some(loaded) = self.plugins.get(&plugin) else { continue };
            let reply = loaded.handle.command(IMPORT.to_owned(), body.clone()).await;
            let refused = |source| AdoptError::Refused { plugin: plugin.clone(), path: path.clone(), source };
            let answer = reply.map_err(refused)?;
            // A plugin answers as it likes.
            answers.push((plugin, serde_json::from_str(&answer).unwrap_or_default()));
        }
        Ok(answers)
    }

    async fn published_document(&self, current: &Current, known: &Known) -> Result<NameValue, AdoptError> {
        // It is held since it was found, if it could be read then.
        let is_what_was_found =
            |accepted: &names::Accepted| accepted.path == current.path && accepted.of == known.sequence;
        if known.published.as_ref().is_some_and(is_what_was_found)
            && let Some((cid, _)) = known.path.ipfs()
            && let Some(data) = documents::get(&self.store.snapshot()?, &known.path)?
        {
            return Ok(NameValue::Document { cid, data: data.into() });
        }
        let read = published_file(&self.backend, current).await;
        read.map_err(|source| AdoptError::Unread { path: current.path.clone(), source })
    }

    /// Who uses a key.
    pub fn key_use(&self, key: &KeyName) -> KeyUse {
        let writers = self.writers(key);
        match self.importers(key).iter().any(|importer| writers.contains(importer)) {
            true => KeyUse::Importer,
            false if writers.is_empty() => KeyUse::Nobody,
            false => KeyUse::Publisher,
        }
    }

    /// The running plugins that take over documents of a key.
    fn importers(&self, key: &KeyName) -> Vec<PluginName> {
        let plugins = self.plugins.all().into_iter();
        let importing = plugins.filter(|(_, loaded)| loaded.handle.code().imports(key));
        importing.map(|(name, _)| name).collect()
    }

    /// The plugins that publish under a key, or are about to.
    pub fn writers(&self, key: &KeyName) -> Vec<PluginName> {
        let mut writers = self.claims.holders(key);
        for (name, loaded) in self.plugins.all() {
            if loaded.handle.claims().any(|claim| claim.keys.contains(key)) {
                writers.insert(name);
            }
        }
        writers.into_iter().collect()
    }
}

/// The body of the command `import`.
#[derive(Serialize)]
struct Import<'a> {
    key: &'a KeyName,
    document: &'a RawValue,
}

fn body_of(key: &KeyName, path: &ContentPath, value: &NameValue) -> Result<String, AdoptError> {
    let not_json = |why: String| AdoptError::NotJson { path: path.clone(), why };
    let NameValue::Document { data, .. } = value else { return Err(not_json("it is no file".to_owned())) };
    let document: &RawValue = serde_json::from_slice(data).map_err(|error| not_json(error.to_string()))?;
    // To the letter: a reader would order members and spell numbers its own way.
    Ok(serde_json::to_string(&Import { key, document }).expect("a key and JSON are JSON"))
}
