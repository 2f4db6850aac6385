//! Owns the wasmtime engine that all plugins share: compiling, and what is linked into components.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Display;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use wasmtime::component::{Component, HasSelf, Linker};
use wasmtime::{Config, InstanceAllocationStrategy};

use super::cache::{Cache, Trusted};
use super::compiler::Compiler;
use super::imports::lacking;
use super::instance::Guest;
use super::limits::MEMORY_BYTES;
use super::manifest::{Inspection, ManifestError, inspect};
use super::pool::Capacity;
use super::{bindings, wasi};
use crate::signing::Signer;

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
    /// The process may not reserve enough address space.
    #[error(
        "the address space of this process is limited to {limit} bytes, and plugins need at least {needed}: raise the limit, as with `ulimit -v {}` or the batch system's limit of virtual memory",
        .needed.div_ceil(1024)
    )]
    AddressSpace {
        /// The limit, in bytes.
        limit: u64,
        /// What is needed at least, in bytes.
        needed: u64,
    },
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

/// The engine.
pub struct Engine {
    engine: wasmtime::Engine,
    linker: Linker<Guest>,
    cache: Cache,
    /// What other programs of this user share with this one.
    shared: Option<Cache>,
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
    pub fn new(cache: Cache, compiler: Compiler, capacity: Capacity) -> Result<Self, EngineError> {
        let pool = InstanceAllocationStrategy::Pooling(capacity.pool()?);
        let engine = wasmtime::Engine::new(&config(pool)).map_err(EngineError::Engine)?;
        let mut linker = Linker::new(&engine);
        wasi::add_to_linker(&mut linker).map_err(EngineError::Engine)?;
        bindings::Plugin::add_to_linker::<_, HasSelf<_>>(&mut linker, |guest| guest)
            .map_err(EngineError::Engine)?;
        Ok(Self { engine, linker, cache, shared: None, compiler })
    }

    /// The same engine, which looks for compiled forms in `shared` too, and leaves there what it compiles.
    pub fn sharing(self, shared: Option<Cache>) -> Self {
        Self { shared, ..self }
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
        let name = self.compiled_name(digest);
        self.caches().any(|cache| cache.has(&name))
    }

    fn component(&self, bytes: &[u8], inspection: &Inspection) -> Result<Component, EngineError> {
        let name = self.compiled_name(inspection.digest);
        if let Some(component) = self.cached(&self.cache, &name) {
            return Ok(component);
        }
        if let Some(component) = self.shared.as_ref().and_then(|shared| self.cached(shared, &name)) {
            return Ok(component);
        }
        let (plugin, begun) = (&inspection.manifest.name, Instant::now());
        let kib = bytes.len() >> 10;
        tracing::info!(%plugin, kib, "compiling; the compiled form is kept for later starts");
        let compiled = self.compiler.compile(&self.engine, bytes)?;
        tracing::info!(%plugin, took = ?begun.elapsed(), "compiled");
        for cache in self.caches() {
            // Without the cache the next start is slow, and that is all.
            if let Err(error) = cache.keep(&name, &compiled) {
                tracing::warn!(%plugin, "cannot keep the compiled component: {error}");
            }
        }
        // SAFETY: these bytes come from `precompile_component` just now, here or in a process of this program.
        unsafe { Component::deserialize(&self.engine, &compiled) }.map_err(EngineError::Compile)
    }

    /// The compiled form's name says what it was compiled from and for which engine.
    fn compiled_name(&self, digest: impl Display) -> String {
        let mut hasher = DefaultHasher::new();
        self.engine.precompile_compatibility_hash().hash(&mut hasher);
        format!("{digest}-{:016x}", hasher.finish())
    }

    fn caches(&self) -> impl Iterator<Item = &Cache> {
        std::iter::once(&self.cache).chain(&self.shared)
    }

    fn cached(&self, cache: &Cache, name: &str) -> Option<Component> {
        let Trusted { file, bytes } = cache.trusted(name)?;
        // SAFETY: the cache has verified that this process or an earlier one of this user wrote the whole file under
        // this name, and nobody else can write into the directory. wasmtime checks the version and the settings.
        match unsafe { Component::deserialize_file(&self.engine, file) } {
            Ok(component) => {
                if !std::ptr::eq(cache, &self.cache)
                    && let Err(error) = self.cache.keep(name, &bytes)
                {
                    tracing::warn!("cannot keep the compiled component: {error}");
                }
                Some(component)
            }
            Err(error) => {
                tracing::warn!("compiling again, the cached form cannot be used: {error:#}");
                None
            }
        }
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

/// How components are compiled and run, and where their instances lie.
pub(super) fn config(instances: InstanceAllocationStrategy) -> Config {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .wasm_component_model(true)
        .memory_reservation(MEMORY_BYTES as u64)
        .allocation_strategy(instances);
    config
}
