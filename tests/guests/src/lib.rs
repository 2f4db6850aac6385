//! Plugins that the tests drive. Each is an example, so that each becomes a component of its own.
