//! Owns the private keys behind the host's IPNS names: made here, kept with mode 0600 in the state
//! directory, so that names are known without a daemon and can be backed up.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::sync::{Arc, RwLock};

use cap_std::fs::{Dir, DirBuilder, DirBuilderExt, OpenOptions, OpenOptionsExt};
use libp2p_identity::Keypair;
use thiserror::Error;

use crate::ident::{IpnsName, KeyName};
use crate::store::Store;

/// The directory of the keys, inside the state directory.
const DIRECTORY: &str = "keys";

/// The ending of a file that names a key whose private half the daemon keeps.
const ADOPTED: &str = ".adopted";

/// Why a key cannot be had.
#[derive(Debug, Error)]
pub enum KeyError {
    /// The file cannot be read or written.
    #[error("cannot use the file of key {key}")]
    File {
        /// Which.
        key: KeyName,
        /// Why.
        source: std::io::Error,
    },
    /// The file holds no key.
    #[error(
        "the file of key {key} holds no private key in libp2p's form: restore it from a backup, or move it away for a new key and a new name"
    )]
    Damaged {
        /// Which.
        key: KeyName,
    },
}

/// A key of the host.
#[derive(Clone, Debug)]
pub enum Key {
    /// Its private half is here.
    Own(Arc<Keypair>),
    /// The daemon had it first and keeps its private half.
    Adopted(IpnsName),
}

impl Key {
    /// The name that belongs to the key.
    pub fn name(&self) -> IpnsName {
        match self {
            Key::Own(pair) => name_of(pair),
            Key::Adopted(name) => name.clone(),
        }
    }
}

/// The IPNS name of a key pair.
pub fn name_of(pair: &Keypair) -> IpnsName {
    let peer = pair.public().to_peer_id();
    let multihash = cid::multihash::Multihash::from_bytes(&peer.to_bytes());
    IpnsName::from_multihash(multihash.expect("a peer id is a multihash"))
}

/// The keys of one host.
#[derive(Debug)]
pub struct Keyring {
    dir: Dir,
    keys: RwLock<BTreeMap<KeyName, Key>>,
}

impl Keyring {
    /// Reads all keys of a state directory.
    pub fn open(store: &Store) -> Result<Self, KeyError> {
        let file = |source| KeyError::File { key: "directory".parse().expect("a valid name"), source };
        let mut builder = DirBuilder::new();
        builder.mode(0o700);
        if !store.dir().is_dir(DIRECTORY) {
            store.dir().create_dir_with(DIRECTORY, &builder).map_err(file)?;
        }
        let dir = store.dir().open_dir(DIRECTORY).map_err(file)?;
        let ring = Self { dir, keys: RwLock::default() };
        for entry in ring.dir.entries().map_err(file)? {
            let name = entry.map_err(file)?.file_name();
            let Some(name) = name.to_str() else { continue };
            let Ok(key) = name.strip_suffix(ADOPTED).unwrap_or(name).parse::<KeyName>() else { continue };
            let held = if name.ends_with(ADOPTED) { ring.read_adopted(&key)? } else { ring.read_own(&key)? };
            ring.put(&key, held);
        }
        Ok(ring)
    }

    /// The key, if the host has it.
    pub fn get(&self, key: &KeyName) -> Option<Key> {
        self.keys.read().expect("no one panics while holding the keys").get(key).cloned()
    }

    /// The name of a key, if the host has it.
    pub fn name(&self, key: &KeyName) -> Option<IpnsName> {
        self.get(key).map(|key| key.name())
    }

    /// All keys.
    pub fn all(&self) -> Vec<(KeyName, Key)> {
        let keys = self.keys.read().expect("no one panics while holding the keys");
        keys.iter().map(|(name, key)| (name.clone(), key.clone())).collect()
    }

    /// The key, made if the host has none of that name.
    pub fn get_or_create(&self, key: &KeyName) -> Result<Key, KeyError> {
        if let Some(held) = self.get(key) {
            return Ok(held);
        }
        let pair = Keypair::generate_ed25519();
        let bytes = pair.to_protobuf_encoding().expect("an ed25519 key has a protobuf form");
        self.write_new(key, key.as_str(), &bytes)?;
        let held = Key::Own(Arc::new(pair));
        self.put(key, held.clone());
        Ok(held)
    }

    /// Takes over the name of a key that the daemon had first. One that was made here is set aside
    /// under another file name.
    pub fn adopt(&self, key: &KeyName, name: &IpnsName) -> Result<(), KeyError> {
        if matches!(self.get(key), Some(Key::Own(_))) {
            let io = |source| KeyError::File { key: key.clone(), source };
            self.dir.rename(key.as_str(), &self.dir, format!(".{key}.replaced")).map_err(io)?;
        }
        self.write_new(key, &format!("{key}{ADOPTED}"), name.as_str().as_bytes())?;
        self.put(key, Key::Adopted(name.clone()));
        Ok(())
    }

    fn put(&self, key: &KeyName, held: Key) {
        self.keys.write().expect("no one panics while holding the keys").insert(key.clone(), held);
    }

    fn read_own(&self, key: &KeyName) -> Result<Key, KeyError> {
        let bytes = self.read(key, key.as_str())?;
        let pair =
            Keypair::from_protobuf_encoding(&bytes).map_err(|_| KeyError::Damaged { key: key.clone() })?;
        Ok(Key::Own(Arc::new(pair)))
    }

    fn read_adopted(&self, key: &KeyName) -> Result<Key, KeyError> {
        let bytes = self.read(key, &format!("{key}{ADOPTED}"))?;
        let text = String::from_utf8_lossy(&bytes);
        let name = text.parse().map_err(|_| KeyError::Damaged { key: key.clone() })?;
        Ok(Key::Adopted(name))
    }

    fn read(&self, key: &KeyName, file: &str) -> Result<Vec<u8>, KeyError> {
        let io = |source| KeyError::File { key: key.clone(), source };
        let mut bytes = Vec::new();
        self.dir.open(file).map_err(io)?.take(16 << 10).read_to_end(&mut bytes).map_err(io)?;
        Ok(bytes)
    }

    fn write_new(&self, key: &KeyName, file: &str, bytes: &[u8]) -> Result<(), KeyError> {
        let io = |source| KeyError::File { key: key.clone(), source };
        let half = format!(".{file}.half");
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut opened = self.dir.open_with(&half, &options).map_err(io)?;
        opened.write_all(bytes).and_then(|()| opened.sync_all()).map_err(io)?;
        self.dir.rename(&half, &self.dir, file).map_err(io)?;
        // The name of the file must survive a crash too, or the host would make another key.
        self.dir.open(".").and_then(|dir| dir.sync_all()).map_err(io)
    }
}
