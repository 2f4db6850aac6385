//! Fuzzes the loader with valid random components from wasm-smith.

use arbitrary::Unstructured;
use dim_runtime::{Cache, Capacity, Compiler, Engine, inspect, judge};
use wasm_smith::{Component, Config};

/// The manifest that is added to each component, because the loader refuses a component without one.
const MANIFEST: &[u8] = b"name = \"a\"\nversion = \"0.1.0\"\ndescription = \"d\"\nstate-version = 1\n";

struct Loader {
    engine: Engine,
    dir: tempfile::TempDir,
}

impl Loader {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let cache = Cache::open(dir.path()).expect("a directory of its own");
        Self { engine: Engine::new(cache, Compiler::Here, Capacity::Bench).expect("an engine"), dir }
    }
}

thread_local! {
    static LOADER: Loader = Loader::new();
}

/// Judges and compiles a component.
pub fn run(data: &[u8]) {
    let config = Config { max_instructions: 50, max_components: 2, max_modules: 3, ..Config::default() };
    let Ok(component) = Component::new(config, &mut Unstructured::new(data)) else { return };
    let bytes = with_manifest(component.to_bytes());
    let judged = judge(&bytes, []);
    let inspection = inspect(&bytes).expect("it is valid and has a manifest");
    LOADER.with(|loader| {
        let prepared = loader.engine.prepare(&bytes, inspection);
        // One of the two steps must refuse a component that is not a plugin.
        assert!(judged.is_err() || prepared.is_err(), "a random component was accepted as a plugin");
        std::fs::remove_dir_all(loader.dir.path().join("compiled")).ok();
    });
}

/// Appends the manifest as a custom section.
fn with_manifest(mut component: Vec<u8>) -> Vec<u8> {
    let section = [b"\x0cdim-manifest", MANIFEST].concat();
    component.extend([0, u8::try_from(section.len()).expect("one byte") | 0x80, 0x00]);
    component.extend(section);
    component
}

/// Returns pseudo-random bytes from which wasm-smith builds components.
pub fn seeds() -> Vec<Vec<u8>> {
    (0..8_u32)
        .map(|n| (0..2048_u32).map(|k| (k.wrapping_mul(2_654_435_761 + n) >> 13) as u8).collect())
        .collect()
}
