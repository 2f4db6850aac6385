//! Owns the bindings that wasmtime generates for each version of the contract, and nothing else.

#![allow(missing_docs, clippy::all, clippy::pedantic)]

/// The bindings of `contracts/0.1.0`.
pub mod v0_1 {
    wasmtime::component::bindgen!({
        path: "contracts/0.1.0",
        world: "plugin",
        imports: { default: trappable },
    });
}

/// The bindings of `wit/`.
pub mod v0_2 {
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "plugin",
        imports: { default: trappable },
    });
}
