// The settings of the compiler. A compiled form runs only in an engine with the same settings. The build script of
// `dim-bundled` includes this file, too, so it contains no doc comment of a module and imports only wasmtime.

use wasmtime::{Config, InstanceAllocationStrategy};

/// Address space of one linear memory, in bytes: the largest that a plugin can be allowed.
pub const MEMORY_RESERVATION: u64 = 1 << 30;

/// Returns the settings of an engine. `instances` is no setting of the compiler: an engine that only compiles reserves
/// no memory for instances.
pub fn config(instances: InstanceAllocationStrategy) -> Config {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .wasm_component_model(true)
        .memory_reservation(MEMORY_RESERVATION)
        .allocation_strategy(instances);
    config
}
