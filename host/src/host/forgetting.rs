//! Owns how the host forgets an own name: its value, its hold and its key. Nothing is deleted in the daemon, and nothing
//! is published.

use std::sync::Arc;

use serde::Serialize;
use thiserror::Error;
use utoipa::ToSchema;

use super::Host;
use crate::commit::CommitError;
use crate::ident::{IpnsName, KeyName, PluginName};
use crate::keys::{Key, KeyError};
use crate::store::{StoreError, names};

/// What becomes of a private key that the host has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrivateKey {
    /// It stays, and so does its name.
    Keep,
    /// It is deleted for good.
    Delete,
}

/// A name that the host has forgotten.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Forgotten {
    /// The key.
    pub key: KeyName,
    /// The name that belongs to it; null if the key was gone.
    #[schema(required)]
    pub name: Option<IpnsName>,
    /// Whether the host has deleted the private key. Where it is false, the daemon has it.
    pub deleted_key: bool,
}

/// Why a name is not forgotten.
#[derive(Debug, Error)]
pub enum ForgetError {
    /// There is none.
    #[error("the host has no key {0}")]
    NoKey(KeyName),
    /// A plugin uses it.
    #[error(
        "plugin {plugin} uses the key {key}: give the plugin another key in the config (`ipfs.ipns_key_name`), or disable or remove it first"
    )]
    InUse {
        /// The key.
        key: KeyName,
        /// The plugin.
        plugin: PluginName,
    },
    /// The private key would be lost.
    #[error(
        "the host has made the key {0} itself, and its name is lost with the private key: make a backup, then repeat it with `--delete-key` (`?delete_key=true`)"
    )]
    OwnKey(KeyName),
    /// The key cannot be removed.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// It cannot be written down.
    #[error(transparent)]
    Commit(#[from] CommitError),
}

impl From<StoreError> for ForgetError {
    fn from(error: StoreError) -> Self {
        Self::Commit(error.into())
    }
}

impl Host {
    /// Forgets a name that no plugin uses. Whatever fails halfway can be repeated.
    pub async fn forget(
        self: &Arc<Self>,
        key: &KeyName,
        private: PrivateKey,
    ) -> Result<Forgotten, ForgetError> {
        self.all_loaded().await;
        let held = self.keys.get(key);
        if held.is_none() && names::known(&self.store.snapshot()?, key)?.is_none() {
            return Err(ForgetError::NoKey(key.clone()));
        }
        if let Some(plugin) = self.users(key).into_iter().next() {
            return Err(ForgetError::InUse { key: key.clone(), plugin });
        }
        let is_own = matches!(held, Some(Key::Own(_)));
        if is_own && private == PrivateKey::Keep {
            return Err(ForgetError::OwnKey(key.clone()));
        }
        // First the key: without it nothing is published, and nothing is noted of the name again.
        self.keys.forget(key)?;
        let forgotten = key.clone();
        self.commit.write(move |write| names::forget(write, &forgotten)).await?;
        self.failures.clear(key);
        let name = held.map(|held| held.name());
        tracing::info!(%key, name = name.as_ref().map(tracing::field::display), is_own, "forgot the name");
        Ok(Forgotten { key: key.clone(), name, deleted_key: is_own })
    }

    /// The plugins that publish under a key or read it, or are about to.
    pub fn users(&self, key: &KeyName) -> Vec<PluginName> {
        let mut users = self.claims.holders(key);
        let all = self.plugins.all().into_iter();
        users.extend(all.filter(|(_, loaded)| loaded.handle.uses(key)).map(|(name, _)| name));
        users.into_iter().collect()
    }
}
