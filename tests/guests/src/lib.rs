//! Plugins for the tests. Each plugin is a Cargo example, because each example becomes its own component.
