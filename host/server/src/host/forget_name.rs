//! Owns the removal of an own name from the host: its value, its hold and its key. The host deletes nothing in the
//! daemon and publishes nothing.

use std::sync::Arc;

use dim_ipfs::keys::{Key, KeyError};
use dim_model::ident::{IpnsName, KeyName, PluginName};
use dim_store::commit::CommitError;
use dim_store::{StoreError, names};
use serde::Serialize;
use thiserror::Error;
use utoipa::ToSchema;

use super::Host;

/// The decision about a private key that the host has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrivateKey {
    /// The key and its name stay.
    Keep,
    /// The key is deleted permanently.
    Delete,
}

/// A name that the host has forgotten.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Forgotten {
    /// The key.
    pub key: KeyName,
    /// The name of the key; null if the key did not exist any more.
    #[schema(required)]
    pub name: Option<IpnsName>,
    /// Whether the host deleted the private key. If false, the daemon has it.
    pub deleted_key: bool,
}

/// An error that prevents the removal of a name.
#[derive(Debug, Error)]
pub enum ForgetError {
    /// The host has no such key.
    #[error("the host has no key {0}")]
    NoKey(KeyName),
    /// A plugin uses the key.
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
    /// The file of the key cannot be removed.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The removal cannot be committed.
    #[error(transparent)]
    Commit(#[from] CommitError),
}

impl From<StoreError> for ForgetError {
    fn from(error: StoreError) -> Self {
        Self::Commit(error.into())
    }
}

impl Host {
    /// Forgets a name that no plugin uses. After a failure the call can be repeated.
    pub async fn forget(
        self: &Arc<Self>,
        key: &KeyName,
        private: PrivateKey,
    ) -> Result<Forgotten, ForgetError> {
        self.all_loaded().await;
        let held = self.storage.keys.get(key);
        if held.is_none() && names::known(&self.storage.store.snapshot()?, key)?.is_none() {
            return Err(ForgetError::NoKey(key.clone()));
        }
        if let Some(plugin) = self.users(key).into_iter().next() {
            return Err(ForgetError::InUse { key: key.clone(), plugin });
        }
        let is_own = matches!(held, Some(Key::Own(_)));
        if is_own && private == PrivateKey::Keep {
            return Err(ForgetError::OwnKey(key.clone()));
        }
        // The key goes first: without it the host publishes nothing under the name and records nothing about it.
        self.storage.keys.forget(key)?;
        let forgotten = key.clone();
        self.storage.commit.write(move |write| names::forget(write, &forgotten)).await?;
        self.exchange.links.failures.clear(key);
        let name = held.map(|held| held.name());
        tracing::info!(%key, name = name.as_ref().map(tracing::field::display), is_own, "forgot the name");
        Ok(Forgotten { key: key.clone(), name, deleted_key: is_own })
    }

    /// Returns the plugins that publish under a key or read it, or are about to.
    pub fn users(&self, key: &KeyName) -> Vec<PluginName> {
        let mut users = self.deployment.claims.holders(key);
        let all = self.plugins.all().into_iter();
        users.extend(all.filter(|(_, loaded)| loaded.handle.uses(key)).map(|(name, _)| name));
        users.into_iter().collect()
    }
}
