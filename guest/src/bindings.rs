//! The bindings that `wit-bindgen` makes of `wit/`, and nothing else.

#![allow(missing_docs, clippy::all)]

wit_bindgen::generate!({
    path: "../wit",
    world: "plugin",
    pub_export_macro: true,
    export_macro_name: "export_component",
    default_bindings_module: "dim_guest::macro_support",
});
