//! The plugins that come with the host.

/// Each by name, with its component.
pub const PLUGINS: [(&str, &[u8]); 3] = [
    ("heartbeat-watchdog", include_bytes!(concat!(env!("OUT_DIR"), "/heartbeat_watchdog.wasm"))),
    ("job-tracker", include_bytes!(concat!(env!("OUT_DIR"), "/job_tracker.wasm"))),
    ("node-registry", include_bytes!(concat!(env!("OUT_DIR"), "/node_registry.wasm"))),
];

/// The component of a bundled plugin.
pub fn component(name: &str) -> Option<&'static [u8]> {
    PLUGINS.iter().find(|(bundled, _)| *bundled == name).map(|(_, component)| *component)
}
