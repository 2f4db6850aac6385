//! Owns the wasmtime engine that all plugins share: the compilation and the linking of components. It receives
//! the bytes of components and returns components that can be instantiated.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::fmt::Display;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dim_model::ident::Digest;
use dim_model::signer::Signer;
use dim_store::plugin_limits::MEMORY_BYTES;
use thiserror::Error;
use wasmtime::InstanceAllocationStrategy;
use wasmtime::component::{Component, Linker};

use crate::compile_settings::{MEMORY_RESERVATION, config};
use crate::compiled_cache::{Cache, Trusted};
use crate::compiler::Compiler;
use crate::contract::{self, Linked};
use crate::imports::lacking;
use crate::instance::Guest;
use crate::manifest::{Inspection, ManifestError, inspect};
use crate::pool::Capacity;
use crate::wasi;

/// The reason why a component cannot run here.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The file is not a plugin.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The component imports an interface that the host does not offer.
    #[error("{0}")]
    Imports(String),
    /// The engine cannot run on this machine.
    #[error("the WebAssembly engine cannot start")]
    Engine(#[source] wasmtime::Error),
    /// The process cannot reserve enough address space.
    #[error(
        "the address space of this process is limited to {limit} bytes, and plugins need at least {needed}: raise the limit, as with `ulimit -v {}` or the batch system's limit of virtual memory",
        .needed.div_ceil(1024)
    )]
    AddressSpace {
        /// The limit of the process, in bytes.
        limit: u64,
        /// The minimum for plugins, in bytes.
        needed: u64,
    },
    /// The compiler refuses the component.
    #[error("the component does not compile")]
    Compile(#[source] wasmtime::Error),
    /// The compilation exceeds a limit.
    #[error("{0}")]
    TooMuch(String),
    /// The compiler fails for a reason other than the component's content.
    #[error("the compiler failed: {0}")]
    Compiler(String),
    /// The imports or exports of the component do not fit the contract.
    #[error("the component does not fit the world `dim:coordination/plugin@{version}`")]
    World {
        /// The version of the contract.
        version: &'static str,
        /// The reason.
        source: wasmtime::Error,
    },
}

/// The engine.
pub struct Engine {
    engine: wasmtime::Engine,
    linker: Linker<Guest>,
    cache: Cache,
    /// The cache that other programs of this user share, if there is one.
    shared: Option<Cache>,
    /// The compiled forms of components that are part of this program, compressed, by the digest of the component.
    built_in: BTreeMap<String, &'static [u8]>,
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
    /// The inspection of the file.
    pub inspection: Arc<Inspection>,
    pub(super) linked: Linked,
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").field("inspection", &self.inspection).finish_non_exhaustive()
    }
}

impl Engine {
    /// The interval of the checks of the deadline of a running call.
    pub const EPOCH: Duration = Duration::from_millis(10);

    /// Creates an engine that stores compiled components in `cache`.
    pub fn new(cache: Cache, compiler: Compiler, capacity: Capacity) -> Result<Self, EngineError> {
        let pool = InstanceAllocationStrategy::Pooling(capacity.pool()?);
        let engine = wasmtime::Engine::new(&config(pool)).map_err(EngineError::Engine)?;
        let mut linker = Linker::new(&engine);
        wasi::add_to_linker(&mut linker).map_err(EngineError::Engine)?;
        contract::add_to_linker(&mut linker).map_err(EngineError::Engine)?;
        Ok(Self { engine, linker, cache, shared: None, built_in: BTreeMap::new(), compiler })
    }

    /// Makes the engine use `shared` as well: it looks for compiled components there, and stores its own.
    pub fn sharing(self, shared: Option<Cache>) -> Self {
        Self { shared, ..self }
    }

    /// Adds compiled forms that are part of this program, each as a zstd frame with the digest of its component. A form
    /// that was compiled with other settings, or for a processor with other features, is not used: the component is
    /// compiled.
    ///
    /// # Safety
    ///
    /// Each frame must contain the unchanged result of wasmtime's `Engine::precompile_component` for the component of
    /// that digest.
    pub unsafe fn with_built_in(self, built_in: impl IntoIterator<Item = (Digest, &'static [u8])>) -> Self {
        let built_in = built_in.into_iter().map(|(digest, frame)| (digest.to_string(), frame)).collect();
        Self { built_in, ..self }
    }

    /// Advances the epoch by one [`Engine::EPOCH`], which brings the deadlines of running calls nearer.
    pub fn tick(&self) {
        self.engine.increment_epoch();
    }

    /// Compiles an inspected component, or takes its compiled form from the cache. Takes seconds for a large one.
    pub fn prepare(&self, bytes: &[u8], inspection: Inspection) -> Result<Prepared, EngineError> {
        let component = self.component(bytes, &inspection)?;
        let version = contract::version_of(&inspection.imports);
        let unfit = |source| EngineError::World { version, source };
        let pre = self.linker.instantiate_pre(&component).map_err(unfit)?;
        let linked = Linked::new(pre, version).map_err(unfit)?;
        Ok(Prepared { inspection: Arc::new(inspection), linked })
    }

    /// Whether a cache contains the compiled form of the component with this digest.
    pub fn has_compiled(&self, digest: impl Display) -> bool {
        let digest = digest.to_string();
        if self.built_in.contains_key(&digest) {
            return true;
        }
        let name = self.compiled_name(digest);
        self.caches().any(|cache| cache.has(&name))
    }

    fn component(&self, bytes: &[u8], inspection: &Inspection) -> Result<Component, EngineError> {
        if let Some(component) = self.built_in(inspection.digest) {
            return Ok(component);
        }
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
            // Without the cache only the next start is slower.
            if let Err(error) = cache.keep(&name, &compiled) {
                tracing::warn!(%plugin, "cannot keep the compiled component: {error}");
            }
        }
        // SAFETY: these bytes come from `precompile_component` just now, here or in a process of this program.
        unsafe { Component::deserialize(&self.engine, &compiled) }.map_err(EngineError::Compile)
    }

    fn built_in(&self, digest: Digest) -> Option<Component> {
        let frame = self.built_in.get(&digest.to_string())?;
        let compiled = zstd::decode_all(*frame).expect("a frame that is part of this program");
        // SAFETY: the caller of `with_built_in` vouches for the bytes. wasmtime checks the version and the settings.
        let component = unsafe { Component::deserialize(&self.engine, &compiled) };
        component
            .inspect_err(|error| {
                tracing::debug!("the compiled form in the program cannot be used here: {error:#}")
            })
            .ok()
    }

    /// The name of a compiled form, made of the component's digest and the version and settings of the engine.
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

/// Inspects a component without running it, and checks its imports. `known` are possible signers of the component.
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

const _: () = assert!(MEMORY_RESERVATION == MEMORY_BYTES as u64, "a memory has its whole reservation");
