//! Contains only the bindings to the contract in `wit/`.
//!
//! `wit-bindgen` has generated them once, so that the build of a plugin does not build the generator. A test compares them
//! with what the generator returns. To generate them again, run
//! `DIM_WRITE_BINDINGS=1 cargo test --workspace the_bindings_of_the_sdk`.

#![allow(missing_docs, clippy::all, clippy::unwrap_used)]

#[rustfmt::skip]
mod generated;

pub use generated::*;
