//! Owns the private keys behind the host's IPNS names: made here, kept with mode 0600 in the state
//! directory, so that names are known without a daemon and can be backed up.

mod exported;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::sync::{Arc, Mutex, RwLock};

use cap_std::fs::{Dir, DirBuilder, DirBuilderExt, OpenOptions, OpenOptionsExt, Permissions, PermissionsExt};
use libp2p_identity::Keypair;
use thiserror::Error;

use crate::ident::{IpnsName, KeyName};
use crate::store::Store;

pub use exported::ExportedKeyError;

/// The directory of the keys, inside the state directory.
const DIRECTORY: &str = "keys";

/// The directory for the names of keys whose private half the daemon keeps; no key has such a name.
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

/// Why the private half of a key is not taken.
#[derive(Debug, Error)]
pub enum TakeKeyError {
    /// There is no such key.
    #[error("the host has no key {0}: `dim ipns key-id {0}` adopts the daemon's key of that name")]
    NoKey(KeyName),
    /// It is no key, or one that cannot be kept.
    #[error(transparent)]
    Exported(#[from] ExportedKeyError),
    /// It is another key.
    #[error("the file holds the key of the name {theirs}, and {key} has the name {ours}")]
    OtherName {
        /// Which key it should be.
        key: KeyName,
        /// The name of the host's key.
        ours: IpnsName,
        /// The name of the key in the file.
        theirs: IpnsName,
    },
    /// It cannot be stored.
    #[error(transparent)]
    Key(#[from] KeyError),
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

/// A key in the form of its file.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyFile {
    /// Whether a daemon keeps the private half, and these are the bytes of the name.
    pub is_adopted: bool,
    /// The private key in libp2p's protobuf form, or the name.
    pub bytes: Vec<u8>,
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
    adopted: Dir,
    keys: RwLock<BTreeMap<KeyName, Key>>,
    /// Those that a daemon had before the host did, also where the private half was handed over since.
    foreign: RwLock<BTreeSet<KeyName>>,
    /// Held while a key is made, so that two who ask for it at once get the same.
    making: Mutex<()>,
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

    /// The key, if the host has it.
    pub fn get(&self, key: &KeyName) -> Option<Key> {
        self.keys.read().expect("no one panics while holding the keys").get(key).cloned()
    }

    /// The name of a key, if the host has it.
    pub fn name(&self, key: &KeyName) -> Option<IpnsName> {
        self.get(key).map(|key| key.name())
    }

    /// Those of these keys that the host has, and their names.
    pub fn names_of<'a>(&self, keys: impl Iterator<Item = &'a KeyName>) -> Vec<(KeyName, IpnsName)> {
        keys.filter_map(|key| Some((key.clone(), self.name(key)?))).collect()
    }

    /// All keys.
    pub fn all(&self) -> Vec<(KeyName, Key)> {
        let keys = self.keys.read().expect("no one panics while holding the keys");
        keys.iter().map(|(name, key)| (name.clone(), key.clone())).collect()
    }

    /// The key, made if the host has none of that name.
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

    /// Takes over the name of a key that the daemon had first. One that was made here is set aside
    /// under another file name.
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

    /// Whether a daemon had the key before the host did: others may have published under it.
    pub fn is_foreign(&self, key: &KeyName) -> bool {
        self.foreign.read().expect("no one panics while holding the keys").contains(key)
    }

    /// Takes the private half of an adopted key, as `ipfs key export` writes it. From then on the key is the host's own.
    /// The private half of a key that the host has already is read and changes nothing.
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
            // The file of the adoption stays: it tells that others may have published under the key.
            write_new(&self.dir, key, &bytes)?;
            self.put(key, Key::Own(Arc::new(pair)));
        }
        Ok(ours)
    }

    /// Forgets a key, and deletes what the host has of it.
    pub fn forget(&self, key: &KeyName) -> Result<(), KeyError> {
        let _making = self.making.lock().expect("no one panics while making a key");
        self.keys.write().expect("no one panics while holding the keys").remove(key);
        self.foreign.write().expect("no one panics while holding the keys").remove(key);
        remove(&self.dir, key)?;
        remove(&self.adopted, key)
    }

    /// A key in the form of its file, for a backup.
    pub fn export(&self, key: &KeyName) -> Option<KeyFile> {
        Some(match self.get(key)? {
            Key::Own(pair) => KeyFile {
                is_adopted: false,
                bytes: pair.to_protobuf_encoding().expect("what was read in this form is written in it"),
            },
            Key::Adopted(name) => KeyFile { is_adopted: true, bytes: name.as_str().as_bytes().to_vec() },
        })
    }

    /// Takes a key from a backup.
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
            // One that was restored from elsewhere may have another mode.
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

/// Removes the file of a key, if there is one.
fn remove(dir: &Dir, key: &KeyName) -> Result<(), KeyError> {
    let io = |source| KeyError::File { key: key.clone(), source };
    match dir.remove_file(key.as_str()) {
        Ok(()) => dir.open(".").and_then(|dir| dir.sync_all()).map_err(io),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io(error)),
    }
}

fn write_new(dir: &Dir, key: &KeyName, bytes: &[u8]) -> Result<(), KeyError> {
    let io = |source| KeyError::File { key: key.clone(), source };
    let half = format!(".{key}.half");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut opened = dir.open_with(&half, &options).map_err(io)?;
    opened.write_all(bytes).and_then(|()| opened.sync_all()).map_err(io)?;
    dir.rename(&half, dir, key.as_str()).map_err(io)?;
    // The name of the file must survive a crash too, or the host would make another key.
    dir.open(".").and_then(|dir| dir.sync_all()).map_err(io)
}
