//! Contains only the bindings that `wit-bindgen` generates from `wit/`.

#![allow(missing_docs, clippy::all)]

wit_bindgen::generate!({
    path: "../wit",
    world: "plugin",
    pub_export_macro: true,
    export_macro_name: "export_component",
    default_bindings_module: "dim_guest::macro_support",
});
