//! The plugins that come with the host. It owns their components and the form that the build has compiled them to.

/// The name, the component, and the compressed compiled form of each bundled plugin.
struct Bundled {
    name: &'static str,
    component: &'static [u8],
    compressed: &'static [u8],
}

macro_rules! bundled {
    ($name:literal, $file:literal) => {
        Bundled {
            name: $name,
            component: include_bytes!(concat!(env!("OUT_DIR"), "/", $file, ".wasm")),
            compressed: include_bytes!(concat!(env!("OUT_DIR"), "/", $file, ".cwasm.zst")),
        }
    };
}

const BUNDLED: [Bundled; 3] = [
    bundled!("heartbeat-watchdog", "heartbeat_watchdog"),
    bundled!("job-tracker", "job_tracker"),
    bundled!("node-registry", "node_registry"),
];

/// Returns the names of the bundled plugins.
pub fn names() -> impl Iterator<Item = &'static str> {
    BUNDLED.iter().map(|bundled| bundled.name)
}

/// Returns the component of a bundled plugin.
pub fn component(name: &str) -> Option<&'static [u8]> {
    BUNDLED.iter().find(|bundled| bundled.name == name).map(|bundled| bundled.component)
}

/// Returns the component of each bundled plugin and the form that wasmtime compiled it to when this program was built, as
/// a zstd frame (RFC 8878).
pub fn compiled() -> impl Iterator<Item = (&'static [u8], &'static [u8])> {
    BUNDLED.iter().map(|bundled| (bundled.component, bundled.compressed))
}
