//! Owns the adoption of names on hold. It receives a key and the decision of the operator: the plugins import the
//! published document, or the host overwrites it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use dim_ipfs::Current;
use dim_model::health::{Code, HealthFinding};
use dim_model::ident::{ContentPath, GroupName, IpnsName, KeyName, PluginName};
use dim_model::time::Timestamp;
use dim_network::encrypted_documents::CipherError;
use dim_store::batch::ReplyError;
use dim_store::commit::{CommitError, NameChange};
use dim_store::effect::{NameUpdate, NameValue};
use dim_store::names::{self, Cause, Encryption, ForeignValue, Hold, KeyUse, Known};
use dim_store::{StoreError, documents};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use thiserror::Error;
use utoipa::ToSchema;

use super::{Host, Links, UNHURT};

/// The command with which a plugin imports a document. Its body is `{"key": KEY, "document": JSON}`.
const IMPORT: &str = "import";

/// The decision about a document that another writer published under a key of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Adoption {
    /// The plugins that import documents of the key take over its content, then the host publishes under the name.
    Import,
    /// The host publishes its own value under the name, which replaces the published one.
    Replace,
}

/// A name that is no longer on hold.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Adopted {
    /// The key.
    pub key: KeyName,
    /// The path that the name pointed to; the name itself if there was no record.
    pub path: ContentPath,
    /// The sequence number of the record; null if the backend did not show it.
    #[schema(required)]
    pub sequence: Option<u64>,
    /// The plugins that imported the content.
    #[schema(value_type = Vec<String>)]
    pub imported_by: Vec<PluginName>,
    /// The answer of each plugin, by name: numbers of imported and refused rows.
    #[schema(value_type = BTreeMap<String, Value>)]
    pub answers: BTreeMap<PluginName, Value>,
    /// The number of rows that plugins could not read. Documents that are published from now on do not contain them.
    /// The imported document still does, as long as a peer provides it.
    pub refused: u64,
}

/// The rows of imported documents that were left out since the host started, by key, with the path of the document.
#[derive(Debug, Default)]
pub struct LeftOut(Mutex<BTreeMap<KeyName, (u64, ContentPath)>>);

impl LeftOut {
    /// Records the number of rows that an import left out.
    fn note(&self, key: &KeyName, rows: u64, path: &ContentPath) {
        if rows > 0 {
            tracing::warn!(%key, %path, rows, "rows of the imported document cannot be read and are left out");
            self.0.lock().expect(UNHURT).insert(key.clone(), (rows, path.clone()));
        }
    }

    /// Returns the findings for `/healthz`.
    pub fn troubles(&self) -> Vec<HealthFinding> {
        let left_out = self.0.lock().expect(UNHURT);
        let troubles = left_out.iter().filter_map(|(key, (rows, path))| {
            let message = || {
                format!("rows of the document that was imported for {key} could not be read and are left out: {rows}; {path} still has them")
            };
            Some(HealthFinding::events(Code::RowsLeftOut, *rows, message)?.about(key))
        });
        troubles.collect()
    }
}

/// An error that leaves a name on hold.
#[derive(Debug, Error)]
pub enum AdoptError {
    /// The name is not on hold.
    #[error("{0} is not on hold: there is nothing to adopt")]
    NotHeld(KeyName),
    /// The daemon shows no record to import.
    #[error(
        "the daemon shows no record of {0}, so there is nothing to import yet: wait until it signs one anew, or publish with `dim ipns adopt {0} replace`"
    )]
    NoRecord(KeyName),
    /// No running plugin imports documents of the key.
    #[error(
        "no running plugin publishes under {0} and imports its documents (`ipns.import` in the manifest): `dim ipns adopt {0} replace` overwrites what is there, `dim ipns forget {0}` leaves it to others"
    )]
    NoImporter(KeyName),
    /// The document cannot be fetched.
    #[error("cannot read {path}")]
    Unread {
        /// The path of the document.
        path: ContentPath,
        /// The error of the backend, or of the decryption.
        source: CipherError,
    },
    /// The document is not JSON.
    #[error("{path} is not JSON: {why}")]
    NotJson {
        /// The path of the document.
        path: ContentPath,
        /// The syntax error.
        why: String,
    },
    /// The document is encrypted, and the host would publish its content for other readers.
    #[error(
        "{path} is encrypted for group {group} of fleet {fleet}; this host would publish its content for other readers. First set `names.{key}: {{ encrypt: true, group: {group} }}` in the config of a member"
    )]
    Encrypted {
        /// The key.
        key: KeyName,
        /// The path of the document.
        path: ContentPath,
        /// The fleet.
        fleet: String,
        /// The group that reads it.
        group: GroupName,
    },
    /// A plugin refused the document.
    #[error("plugin {plugin} does not import {path}; the name stays on hold")]
    Refused {
        /// The plugin.
        plugin: PluginName,
        /// The path of the document.
        path: ContentPath,
        /// The refusal of the plugin.
        source: ReplyError,
    },
    /// The host has lost the key.
    #[error("the host has no key {0}")]
    NoKey(KeyName),
    /// The decision cannot be committed.
    #[error(transparent)]
    Commit(#[from] CommitError),
}

impl From<StoreError> for AdoptError {
    fn from(error: StoreError) -> Self {
        Self::Commit(error.into())
    }
}

impl Host {
    /// Ends the hold on a name. After a failure the call can be repeated: plugins import the document again.
    pub async fn adopt(self: &Arc<Self>, key: &KeyName, how: Adoption) -> Result<Adopted, AdoptError> {
        let held = || -> Result<_, StoreError> {
            let known = names::known(&self.storage.store.snapshot()?, key)?;
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
        self.storage.commit.write(move |write| names::release(write, &released, Timestamp::wall())).await?;
        self.storage.commit.names.notify_one();
        let Hold { path, sequence, .. } = hold;
        tracing::info!(%key, %path, ?how, "adopted the name");
        self.notes.left_out.note(key, refused, &path);
        let imported_by = imported.iter().map(|(plugin, _)| plugin.clone()).collect();
        let answers = imported.into_iter().collect();
        Ok(Adopted { key: key.clone(), path, sequence, imported_by, answers, refused })
    }

    /// Waits until the host knows the record of one of its names, if the host has just started or has just made the
    /// key. Waits at most 5 s for the daemon.
    pub async fn looked_at(&self, key: &KeyName) {
        if self.exchange.links.backend.network && self.storage.keys.get(key).is_some() {
            self.exchange.links.checked_names.at(key).await;
        }
    }

    /// Applies the config's decision to names that are on hold because this host never published under them, or not
    /// since its restoration.
    pub(super) async fn adopt_at_start(self: &Arc<Self>) -> Result<(), StoreError> {
        let Some(how) = self.config.now().ipfs.adopt else { return Ok(()) };
        for (key, known) in names::all(&self.storage.store.snapshot()?)? {
            let is_decided = known.hold.is_some_and(|hold| match hold.cause {
                Cause::NeverPublished | Cause::Restored => true,
                // An import needs a record, which may appear later.
                Cause::NoRecord => how == Adoption::Replace,
                // The other writer may still be active: a person must decide.
                Cause::OtherWriter => false,
            });
            if is_decided && let Err(error) = self.adopt(&key, how).await {
                tracing::error!(%key, "cannot adopt the name yet: {}", dim_model::error_chain::chain(&error));
            }
        }
        Ok(())
    }

    /// Lets plugins import the document that the name points to. The plugin that publishes under the key comes last,
    /// because it may publish content that the others imported. Returns the answer of each plugin.
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
        let name = self.storage.keys.name(key).ok_or_else(|| AdoptError::NoKey(key.clone()))?;
        let (value, encryption) = self.published_document(&name, &current, known).await?;
        if let Some(Encryption { fleet, group, .. }) = encryption.clone() {
            let Links { cipher, reliable, .. } = &self.exchange.links;
            if cipher.group(key).as_ref() != Some(&group) || reliable.channels().fleet() != fleet {
                return Err(AdoptError::Encrypted { key: key.clone(), path, fleet, group });
            }
        }
        let body = body_of(key, &path, &value)?;
        let lifetime = std::time::Duration::from_nanos(known.lifetime);
        // A document that a plugin published before its import must not be published.
        let update = NameUpdate { name, value, lifetime };
        let value = ForeignValue { update, current, encryption };
        self.storage.commit.change_name(NameChange::TakenOver { key: key.clone(), value }).await?;
        let (last, first): (Vec<_>, Vec<_>) = importers.into_iter().partition(is_writer);
        let mut answers = Vec::new();
        for plugin in [first, last].concat() {
            let Some(loaded) = self.plugins.get(&plugin) else { continue };
            let reply = loaded.handle.command(IMPORT.to_owned(), body.clone()).await;
            let refused = |source| AdoptError::Refused { plugin: plugin.clone(), path: path.clone(), source };
            let answer = reply.map_err(refused)?;
            // The answer is any text.
            answers.push((plugin, serde_json::from_str(&answer).unwrap_or_default()));
        }
        Ok(answers)
    }

    async fn published_document(
        &self,
        name: &IpnsName,
        current: &Current,
        known: &Known,
    ) -> Result<(NameValue, Option<Encryption>), AdoptError> {
        // The host stored the document when it found the record, if the document was readable.
        let is_what_was_found =
            |accepted: &names::Accepted| accepted.path == current.path && accepted.of == known.sequence;
        if known.published.as_ref().is_some_and(is_what_was_found)
            && let Some((cid, _)) = known.path.ipfs()
            && let Some(data) = documents::get(&self.storage.store.snapshot()?, &known.path)?
        {
            return Ok((NameValue::Document { cid, data: data.into() }, known.encryption().cloned()));
        }
        let Links { backend, cipher, .. } = &self.exchange.links;
        let document = cipher.document_behind(backend, name, &current.path).await;
        let document =
            document.map_err(|source| AdoptError::Unread { path: current.path.clone(), source })?;
        Ok(document.into_value())
    }

    /// Returns how plugins use a key.
    pub fn key_use(&self, key: &KeyName) -> KeyUse {
        let writers = self.writers(key);
        match self.importers(key).iter().any(|importer| writers.contains(importer)) {
            true => KeyUse::Importer,
            false if writers.is_empty() => KeyUse::Nobody,
            false => KeyUse::Publisher,
        }
    }

    /// Returns the running plugins that import documents of a key.
    fn importers(&self, key: &KeyName) -> Vec<PluginName> {
        let plugins = self.plugins.all().into_iter();
        let importing = plugins.filter(|(_, loaded)| loaded.handle.code().imports(key));
        importing.map(|(name, _)| name).collect()
    }

    /// Returns the plugins that publish under a key, or are about to.
    pub fn writers(&self, key: &KeyName) -> Vec<PluginName> {
        let mut writers = self.deployment.claims.holders(key);
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
    // The document is passed on byte for byte: a parser would reorder members and reformat numbers.
    Ok(serde_json::to_string(&Import { key, document }).expect("a key and JSON are JSON"))
}
