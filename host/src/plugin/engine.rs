//! Owns the wasmtime engine that all plugins share: compiling, the cache of compiled components,
//! and what is linked into them.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Display;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cap_std::ambient_authority;
use cap_std::fs::{Dir, MetadataExt as _};
use thiserror::Error;
use wasmtime::component::{Component, HasSelf, Linker};
use wasmtime::{Config, InstanceAllocationStrategy, PoolingAllocationConfig};

use super::compiler::Compiler;
use super::imports::lacking;
use super::instance::Guest;
use super::limits::MEMORY_BYTES;
use super::manifest::{Inspection, ManifestError, inspect};
use super::{bindings, wasi};
use crate::ident::Digest;
use crate::signing::Signer;
use crate::store::Store;

/// Most instances of plugins at one time, those of rehearsals included. Address space is reserved for each.
const MAX_INSTANCES: u32 = 1_000;

/// Why a component cannot run here.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The file is not a plugin.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// It imports what the host lacks.
    #[error("{0}")]
    Imports(String),
    /// The machine cannot run the engine.
    #[error("the WebAssembly engine cannot start")]
    Engine(#[source] wasmtime::Error),
    /// The compiler refuses it.
    #[error("the component does not compile")]
    Compile(#[source] wasmtime::Error),
    /// Compiling it takes more than is allowed.
    #[error("{0}")]
    TooMuch(String),
    /// The compiler breaks down over it.
    #[error("the compiler breaks down over it: {0}")]
    Compiler(String),
    /// It needs what the host lacks, or lacks what the host calls.
    #[error("the component does not fit the world `dim:coordination/plugin@0.1.0`")]
    World(#[source] wasmtime::Error),
}

/// Where compiled components lie. They run as they are: nobody else may write there.
#[derive(Debug)]
pub struct Cache {
    dir: Dir,
    path: PathBuf,
}

impl Cache {
    /// The one in a host's state directory.
    pub fn of(store: &Store) -> std::io::Result<Self> {
        Ok(Self { dir: store.dir().try_clone()?, path: store.path().to_owned() })
    }

    /// A directory of its own, made if it is missing; the error says why it cannot be trusted.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        std::os::unix::fs::DirBuilderExt::mode(std::fs::DirBuilder::new().recursive(true), 0o700)
            .create(path)?;
        let dir = Dir::open_ambient_dir(path, ambient_authority())?;
        let (mode, owner) = (dir.dir_metadata()?.mode(), dir.dir_metadata()?.uid());
        if mode & 0o022 != 0 || owner != rustix::process::geteuid().as_raw() {
            return Err(std::io::Error::other(format!("others may write into {}", path.display())));
        }
        Ok(Self { dir, path: path.to_owned() })
    }

    /// Removes what was compiled longest ago, until all of it has no more than so many bytes.
    pub fn keep_within(&self, bytes: u64) -> std::io::Result<()> {
        if !self.dir.is_dir(COMPILED) {
            return Ok(());
        }
        let mut files = Vec::new();
        for file in self.dir.read_dir(COMPILED)? {
            // Another program may be about to write or remove it.
            let Ok((name, known)) = file.and_then(|file| Ok((file.file_name(), file.metadata()?))) else {
                continue;
            };
            files.push((known.modified()?, known.len(), Path::new(COMPILED).join(name)));
        }
        files.sort_by(|one, other| other.cmp(one));
        let mut held = 0;
        for (_, size, file) in files {
            held += size;
            if held > bytes {
                // Another program may have removed it.
                let _ = self.dir.remove_file(file);
            }
        }
        Ok(())
    }
}

/// The directory of compiled components in a cache.
const COMPILED: &str = "compiled";

/// The engine.
pub struct Engine {
    engine: wasmtime::Engine,
    linker: Linker<Guest>,
    cache: Cache,
    compiler: Compiler,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").finish_non_exhaustive()
    }
}

/// A component that is ready to be instantiated.
#[derive(Clone)]
pub struct Prepared {
    /// What is known of the file.
    pub inspection: Arc<Inspection>,
    pub(super) pre: bindings::PluginPre<Guest>,
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").field("inspection", &self.inspection).finish_non_exhaustive()
    }
}

impl Engine {
    /// How often the deadline of a running call is looked at.
    pub const EPOCH: Duration = Duration::from_millis(10);

    /// An engine that keeps what it has compiled in `cache`.
    pub fn new(cache: Cache, compiler: Compiler) -> Result<Self, EngineError> {
        let engine = wasmtime::Engine::new(&config()).map_err(EngineError::Engine)?;
        let mut linker = Linker::new(&engine);
        wasi::add_to_linker(&mut linker).map_err(EngineError::Engine)?;
        bindings::Plugin::add_to_linker::<_, HasSelf<_>>(&mut linker, |guest| guest)
            .map_err(EngineError::Engine)?;
        Ok(Self { engine, linker, cache, compiler })
    }

    /// Lets the deadlines of running calls come one [`Engine::EPOCH`] nearer.
    pub fn tick(&self) {
        self.engine.increment_epoch();
    }

    /// Compiles a component that was judged, or takes its compiled form from the cache. Takes seconds
    /// for a large one.
    pub fn prepare(&self, bytes: &[u8], inspection: Inspection) -> Result<Prepared, EngineError> {
        let component = self.component(bytes, &inspection)?;
        let pre = self.linker.instantiate_pre(&component).map_err(EngineError::World)?;
        let pre = bindings::PluginPre::new(pre).map_err(EngineError::World)?;
        Ok(Prepared { inspection: Arc::new(inspection), pre })
    }

    /// Whether the compiled form of a component of this digest is in the cache.
    pub fn has_compiled(&self, digest: impl Display) -> bool {
        self.cache.dir.exists(self.cache_path(digest))
    }

    fn component(&self, bytes: &[u8], inspection: &Inspection) -> Result<Component, EngineError> {
        let path = self.cache_path(inspection.digest);
        if let Some(component) = self.cached(&path) {
            return Ok(component);
        }
        let (plugin, begun) = (&inspection.manifest.name, Instant::now());
        let kib = bytes.len() >> 10;
        tracing::info!(%plugin, kib, "compiling; the compiled form is kept for later starts");
        let compiled = self.compiler.compile(&self.engine, bytes)?;
        tracing::info!(%plugin, took = ?begun.elapsed(), "compiled");
        // Without the cache the next start is slow, and that is all.
        if let Err(error) = self.keep(&path, &compiled) {
            tracing::warn!(%plugin, "cannot keep the compiled component: {error}");
        }
        // SAFETY: these bytes come from `precompile_component` just now, here or in a process of this program.
        unsafe { Component::deserialize(&self.engine, &compiled) }.map_err(EngineError::Compile)
    }

    /// The compiled form's name says what it was compiled from and for which engine.
    fn cache_path(&self, digest: impl Display) -> PathBuf {
        let mut hasher = DefaultHasher::new();
        self.engine.precompile_compatibility_hash().hash(&mut hasher);
        Path::new(COMPILED).join(format!("{digest}-{:016x}.cwasm", hasher.finish()))
    }

    fn cached(&self, name: &Path) -> Option<Component> {
        let dir = &self.cache.dir;
        let (compiled, digest) = (dir.read(name).ok()?, dir.read(digest_of(name)).ok()?);
        if Digest::of(&compiled).as_bytes() != digest.as_slice() {
            tracing::warn!(file = %name.display(), "compiling again, the cached form is damaged");
            return None;
        }
        // SAFETY: nobody else writes into the directory, as was checked when it was opened; the file is whole,
        // as its digest says. wasmtime checks the version and the settings.
        match unsafe { Component::deserialize_file(&self.engine, self.cache.path.join(name)) } {
            Ok(component) => Some(component),
            Err(error) => {
                tracing::warn!("compiling again, the cached form cannot be used: {error:#}");
                None
            }
        }
    }

    fn keep(&self, name: &Path, compiled: &[u8]) -> std::io::Result<()> {
        let dir = &self.cache.dir;
        dir.create_dir_all(COMPILED)?;
        for (name, bytes) in [(name, compiled), (&digest_of(name), Digest::of(compiled).as_bytes())] {
            // Two threads may compile the same.
            let half =
                name.with_extension(format!("{}.{:?}.half", std::process::id(), std::thread::current().id()));
            dir.write(&half, bytes)?;
            dir.rename(&half, dir, name)?;
        }
        Ok(())
    }
}

/// Looks at a component without running it: whether it is a plugin that finds here what it imports. `known` are
/// those who may have signed it.
pub fn judge<'a>(
    bytes: &[u8],
    known: impl IntoIterator<Item = &'a Signer>,
) -> Result<Inspection, EngineError> {
    let inspection = inspect(bytes)?.signed(bytes, known)?;
    match lacking(&inspection.imports) {
        Some(why) => Err(EngineError::Imports(why)),
        None => Ok(inspection),
    }
}

/// Where the digest of a compiled form lies: the compiled form runs as it is, so damage must be seen.
fn digest_of(compiled: &Path) -> PathBuf {
    compiled.with_extension("sha256")
}

/// How components are compiled and run.
pub(super) fn config() -> Config {
    let mut pool = PoolingAllocationConfig::new();
    // A component is made of many core instances: Python's of about thirty.
    pool.total_component_instances(MAX_INSTANCES)
        .total_core_instances(MAX_INSTANCES * 4)
        .total_memories(MAX_INSTANCES)
        .total_tables(MAX_INSTANCES * 4)
        // Calls are synchronous: no stacks beside the threads' own.
        .total_stacks(1)
        .max_core_instances_per_component(100)
        .max_memories_per_component(4)
        .max_tables_per_component(100)
        .max_memory_size(MEMORY_BYTES)
        .table_elements(60_000);
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .wasm_component_model(true)
        .memory_reservation(MEMORY_BYTES as u64)
        .allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_keeps_what_was_compiled_last_and_is_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dim");
        let cache = Cache::open(&path).unwrap();
        cache.keep_within(0).unwrap();
        std::fs::create_dir(path.join(COMPILED)).unwrap();
        for (age, name) in ["new", "older", "oldest"].into_iter().enumerate() {
            let file = path.join(COMPILED).join(name);
            std::fs::write(&file, [0; 10]).unwrap();
            let at = std::time::SystemTime::now() - Duration::from_secs(60 * age as u64);
            std::fs::File::options().write(true).open(&file).unwrap().set_modified(at).unwrap();
        }
        let left = || std::fs::read_dir(path.join(COMPILED)).unwrap().count();
        cache.keep_within(30).unwrap();
        assert_eq!(left(), 3);
        cache.keep_within(29).unwrap();
        assert!(left() == 2 && !path.join(COMPILED).join("oldest").exists());
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        assert!(Cache::open(&path).unwrap_err().to_string().contains("others may write"));
    }
}
