//! Owns the private keys of the host's IPNS names. The host makes them and stores them in the state directory with
//! mode 0600, so that names are known without a daemon and keys can be in a backup.
//!
//! It receives names of keys and files of keys, and returns keys and IPNS names.

mod exported;
mod private_files;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::sync::{Arc, Mutex, RwLock};

use cap_std::fs::{Dir, DirBuilder, DirBuilderExt, OpenOptions, OpenOptionsExt, Permissions, PermissionsExt};
use dim_model::ident::{IpnsName, KeyName};
use libp2p_identity::Keypair;
use thiserror::Error;

pub use exported::ExportedKeyError;
pub use private_files::PrivateFiles;

/// The directory of the keys, inside the state directory.
const DIRECTORY: &str = "keys";

/// The directory with the names of keys whose private key is in the daemon. No key can have such a name.
const ADOPTED: &str = ".adopted";

/// The error of reading or writing a key.
#[derive(Debug, Error)]
pub enum KeyError {
    /// The file cannot be read or written.
    #[error("cannot use the file of key {key}")]
    File {
        /// The key.
        key: KeyName,
        /// The reason.
        source: std::io::Error,
    },
    /// The file contains no key.
    #[error(
        "the file of key {key} contains no private key in libp2p's format: restore it from a backup, or move it away to get a new key with a new name"
    )]
    Damaged {
        /// The key.
        key: KeyName,
    },
}

/// The error of importing the private key of an adopted key.
#[derive(Debug, Error)]
pub enum TakeKeyError {
    /// The host has no such key.
    #[error("the host has no key {0}: `dim ipns key-id {0}` adopts the daemon's key of that name")]
    NoKey(KeyName),
    /// The bytes are no private key, or the host does not support its kind.
    #[error(transparent)]
    Exported(#[from] ExportedKeyError),
    /// The file contains another key.
    #[error("the file contains the key of the name {theirs}, but {key} has the name {ours}")]
    OtherName {
        /// The key that the file should contain.
        key: KeyName,
        /// The name of the host's key.
        ours: IpnsName,
        /// The name of the key in the file.
        theirs: IpnsName,
    },
    /// The key cannot be stored.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// A key of the host.
#[derive(Clone, Debug)]
pub enum Key {
    /// The host has the private key.
    Own(Arc<Keypair>),
    /// An adopted key: the daemon had it before the host and has the private key.
    Adopted(IpnsName),
}

impl Key {
    /// Returns the IPNS name of the key.
    pub fn name(&self) -> IpnsName {
        match self {
            Key::Own(pair) => name_of(pair),
            Key::Adopted(name) => name.clone(),
        }
    }
}

/// The content of a key's file.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyFile {
    /// Whether the key is adopted. Then `bytes` is the name.
    pub is_adopted: bool,
    /// The private key in libp2p's protobuf format, or the name.
    pub bytes: Vec<u8>,
}

/// Returns the IPNS name of a key pair.
pub fn name_of(pair: &Keypair) -> IpnsName {
    let peer = pair.public().to_peer_id();
    let multihash = cid::multihash::Multihash::from_bytes(&peer.to_bytes());
    IpnsName::from_multihash(multihash.expect("a peer id is a multihash"))
}

/// Returns the Ed25519 key pair of a secret of 32 bytes.
pub fn ed25519_pair(secret: &[u8; 32]) -> Keypair {
    Keypair::ed25519_from_bytes(*secret).expect("32 bytes are an Ed25519 secret")
}

/// The keys of one host.
#[derive(Debug)]
pub struct Keyring {
    dir: Dir,
    adopted: Dir,
    keys: RwLock<BTreeMap<KeyName, Key>>,
    /// The keys that a daemon had before the host, including those whose private key was imported later.
    foreign: RwLock<BTreeSet<KeyName>>,
    /// Serializes the creation of keys, so that concurrent callers get the same key.
    making: Mutex<()>,
}

impl Keyring {
    /// Reads all keys in the state directory `state`. It creates the directory of keys if it is missing.
    pub fn open(state: &Dir) -> Result<Self, KeyError> {
        let file = |source| KeyError::File { key: "directory".parse().expect("a valid name"), source };
        let mut builder = DirBuilder::new();
        builder.mode(0o700);
        if !state.is_dir(DIRECTORY) {
            state.create_dir_with(DIRECTORY, &builder).map_err(file)?;
        }
        let dir = state.open_dir(DIRECTORY).map_err(file)?;
        if !dir.is_dir(ADOPTED) {
            dir.create_dir_with(ADOPTED, &builder).map_err(file)?;
        }
        let adopted = dir.open_dir(ADOPTED).map_err(file)?;
        let ring = Self {
            dir,
            adopted,
            keys: RwLock::default(),
            foreign: RwLock::default(),
            making: Mutex::default(),
        };
        for key in keys_in(&ring.dir).map_err(file)? {
            ring.put(&key, read_own(&ring.dir, &key)?);
        }
        for key in keys_in(&ring.adopted).map_err(file)? {
            let adopted = read_adopted(&ring.adopted, &key)?;
            ring.note_foreign(&key);
            if ring.get(&key).is_none() {
                ring.put(&key, adopted);
            }
        }
        Ok(ring)
    }

    /// Returns the key, if the host has it.
    pub fn get(&self, key: &KeyName) -> Option<Key> {
        self.keys.read().expect("no one panics while holding the keys").get(key).cloned()
    }

    /// Returns the IPNS name of a key, if the host has the key.
    pub fn name(&self, key: &KeyName) -> Option<IpnsName> {
        self.get(key).map(|key| key.name())
    }

    /// Returns the key with an IPNS name, if the host has it.
    pub fn key_of(&self, name: &IpnsName) -> Option<KeyName> {
        let keys = self.keys.read().expect("no one panics while holding the keys");
        keys.iter().find(|(_, key)| key.name() == *name).map(|(key, _)| key.clone())
    }

    /// Returns the keys of `keys` that the host has, with their IPNS names.
    pub fn names_of<'a>(&self, keys: impl Iterator<Item = &'a KeyName>) -> Vec<(KeyName, IpnsName)> {
        keys.filter_map(|key| Some((key.clone(), self.name(key)?))).collect()
    }

    /// Returns all keys.
    pub fn all(&self) -> Vec<(KeyName, Key)> {
        let keys = self.keys.read().expect("no one panics while holding the keys");
        keys.iter().map(|(name, key)| (name.clone(), key.clone())).collect()
    }

    /// Returns the key, or makes it if the host has no key with this name.
    pub fn get_or_create(&self, key: &KeyName) -> Result<Key, KeyError> {
        let _making = self.making.lock().expect("no one panics while making a key");
        if let Some(held) = self.get(key) {
            return Ok(held);
        }
        let pair = Keypair::generate_ed25519();
        let bytes = pair.to_protobuf_encoding().expect("an ed25519 key has a protobuf form");
        write_new(&self.dir, key, &bytes)?;
        let held = Key::Own(Arc::new(pair));
        self.put(key, held.clone());
        Ok(held)
    }

    /// Adopts a key of the daemon: stores its IPNS name. If the host made a key with this key name, its file gets
    /// another name.
    pub fn adopt(&self, key: &KeyName, name: &IpnsName) -> Result<(), KeyError> {
        let _making = self.making.lock().expect("no one panics while making a key");
        if matches!(self.get(key), Some(Key::Own(_))) {
            let io = |source| KeyError::File { key: key.clone(), source };
            self.dir.rename(key.as_str(), &self.dir, format!(".{key}.replaced")).map_err(io)?;
        }
        write_new(&self.adopted, key, name.as_str().as_bytes())?;
        self.note_foreign(key);
        self.put(key, Key::Adopted(name.clone()));
        Ok(())
    }

    /// Returns whether a daemon had the key before the host. Other programs may have published under it.
    pub fn is_foreign(&self, key: &KeyName) -> bool {
        self.foreign.read().expect("no one panics while holding the keys").contains(key)
    }

    /// Imports the private key of an adopted key, in the format of `ipfs key export`. The key becomes the host's own.
    /// For a key that is the host's own already, it checks the file and changes nothing.
    pub fn take_private(&self, key: &KeyName, exported: &[u8]) -> Result<IpnsName, TakeKeyError> {
        let _making = self.making.lock().expect("no one panics while making a key");
        let held = self.get(key).ok_or_else(|| TakeKeyError::NoKey(key.clone()))?;
        let pair = exported::read(exported)?;
        let (ours, theirs) = (held.name(), name_of(&pair));
        if ours != theirs {
            return Err(TakeKeyError::OtherName { key: key.clone(), ours, theirs });
        }
        if let Key::Adopted(_) = held {
            let bytes = pair.to_protobuf_encoding().expect("it was read as one that has this form");
            // The file of the adoption remains. It records that other programs may have published under the key.
            write_new(&self.dir, key, &bytes)?;
            self.put(key, Key::Own(Arc::new(pair)));
        }
        Ok(ours)
    }

    /// Forgets a key and deletes its files.
    pub fn forget(&self, key: &KeyName) -> Result<(), KeyError> {
        let _making = self.making.lock().expect("no one panics while making a key");
        self.keys.write().expect("no one panics while holding the keys").remove(key);
        self.foreign.write().expect("no one panics while holding the keys").remove(key);
        remove(&self.dir, key)?;
        remove(&self.adopted, key)
    }

    /// Returns the content of a key's file, for a backup.
    pub fn export(&self, key: &KeyName) -> Option<KeyFile> {
        Some(match self.get(key)? {
            Key::Own(pair) => KeyFile {
                is_adopted: false,
                bytes: pair.to_protobuf_encoding().expect("what was read in this form is written in it"),
            },
            Key::Adopted(name) => KeyFile { is_adopted: true, bytes: name.as_str().as_bytes().to_vec() },
        })
    }

    /// Stores a key from a backup.
    pub fn import(&self, key: &KeyName, file: &KeyFile) -> Result<(), KeyError> {
        let (dir, read): (_, fn(&Dir, &KeyName) -> _) =
            if file.is_adopted { (&self.adopted, read_adopted) } else { (&self.dir, read_own) };
        write_new(dir, key, &file.bytes)?;
        if file.is_adopted {
            self.note_foreign(key);
        }
        self.put(key, read(dir, key)?);
        Ok(())
    }

    /// Opens a directory for secrets that are no keys of IPNS names. Its name begins with a dot, like no key's.
    pub fn private_files(&self, directory: &str) -> std::io::Result<PrivateFiles> {
        PrivateFiles::open(&self.dir, directory)
    }

    /// The directories for secrets that are no keys of IPNS names, for a backup.
    pub fn private_directories(&self) -> std::io::Result<Vec<String>> {
        let mut directories = Vec::new();
        for entry in self.dir.entries()? {
            let entry = entry?;
            if entry.file_type()?.is_dir()
                && let Ok(name) = entry.file_name().into_string()
                && name.starts_with('.')
                && name != ADOPTED
            {
                directories.push(name);
            }
        }
        Ok(directories)
    }

    fn note_foreign(&self, key: &KeyName) {
        self.foreign.write().expect("no one panics while holding the keys").insert(key.clone());
    }

    fn put(&self, key: &KeyName, held: Key) {
        self.keys.write().expect("no one panics while holding the keys").insert(key.clone(), held);
    }
}

fn keys_in(dir: &Dir) -> std::io::Result<Vec<KeyName>> {
    let mut keys = Vec::new();
    for entry in dir.entries()? {
        let entry = entry?;
        let name = entry.file_name();
        if let Some(key) = name.to_str().and_then(|name| name.parse().ok())
            && entry.file_type()?.is_file()
        {
            // A file that was restored from elsewhere may have another mode.
            dir.set_permissions(name, Permissions::from_mode(0o600))?;
            keys.push(key);
        }
    }
    Ok(keys)
}

fn read_own(dir: &Dir, key: &KeyName) -> Result<Key, KeyError> {
    let pair = Keypair::from_protobuf_encoding(&read(dir, key)?);
    Ok(Key::Own(Arc::new(pair.map_err(|_| KeyError::Damaged { key: key.clone() })?)))
}

fn read_adopted(dir: &Dir, key: &KeyName) -> Result<Key, KeyError> {
    let bytes = read(dir, key)?;
    let name = String::from_utf8_lossy(&bytes).parse();
    name.map(Key::Adopted).map_err(|_| KeyError::Damaged { key: key.clone() })
}

fn read(dir: &Dir, key: &KeyName) -> Result<Vec<u8>, KeyError> {
    let io = |source| KeyError::File { key: key.clone(), source };
    let mut bytes = Vec::new();
    dir.open(key.as_str()).map_err(io)?.take(16 << 10).read_to_end(&mut bytes).map_err(io)?;
    Ok(bytes)
}

/// Deletes the file of a key, if there is one.
fn remove(dir: &Dir, key: &KeyName) -> Result<(), KeyError> {
    let io = |source| KeyError::File { key: key.clone(), source };
    match dir.remove_file(key.as_str()) {
        Ok(()) => dir.open(".").and_then(|dir| dir.sync_all()).map_err(io),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io(error)),
    }
}

fn write_new(dir: &Dir, key: &KeyName, bytes: &[u8]) -> Result<(), KeyError> {
    write_synced(dir, key.as_str(), bytes).map_err(|source| KeyError::File { key: key.clone(), source })
}

/// Writes a file with mode 0600. It is on the disk when the function returns.
fn write_synced(dir: &Dir, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let half = format!(".{name}.half");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut opened = dir.open_with(&half, &options)?;
    opened.write_all(bytes)?;
    opened.sync_all()?;
    dir.rename(&half, dir, name)?;
    // The directory entry must survive a crash too, because the host would otherwise make another key.
    dir.open(".")?.sync_all()
}
