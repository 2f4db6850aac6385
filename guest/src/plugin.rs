//! Defines the trait of a plugin and the macro that exports it from a component.

use std::cell::RefCell;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::{Event, Failure, Refusal};

/// A plugin, as its author implements it.
///
/// The host creates an instance with [`start`](Plugin::start) and then calls one method at a time.
pub trait Plugin: Sized + 'static {
    /// The plugin's config, read from the JSON object that the host passes.
    type Config: DeserializeOwned;

    /// Starts an instance. The host calls it before the first entry of every instance, also after a
    /// trap and after each start of the host.
    ///
    /// `from_state_version` is the version of the existing state, or none if there is no state yet.
    ///
    /// # Errors
    ///
    /// After an error the plugin does not start, or the host refuses the upgrade.
    fn start(config: Self::Config, from_state_version: Option<u32>) -> Result<Self, String>;

    /// Handles one event.
    ///
    /// # Errors
    ///
    /// The host drops the effects of a failed event. It stores a rejected event as a dead letter and
    /// delivers a retried one again.
    fn handle(&mut self, event: Event) -> Result<(), Failure>;

    /// Executes a command. `body` and the reply are JSON. The host sends the reply when the effects
    /// are durable. The default refuses every method.
    fn command(&mut self, method: &str, body: &str) -> Result<String, Refusal> {
        let _ = (method, body);
        Err(Refusal::UnknownMethod)
    }

    /// Answers a query. `body` and the reply are JSON. Every effect returns an error. The default
    /// refuses every method.
    fn query(&self, method: &str, body: &str) -> Result<String, Refusal> {
        let _ = (method, body);
        Err(Refusal::UnknownMethod)
    }
}

/// The config type of a plugin without config.
#[derive(Debug, Default, Deserialize)]
pub struct NoConfig {}

/// The single instance of a plugin in its component.
#[doc(hidden)]
pub struct Instance<P>(RefCell<Option<P>>);

// SAFETY: a component of this world has one thread; the host never calls two exports at a time.
unsafe impl<P> Sync for Instance<P> {}

impl<P: Plugin> Instance<P> {
    pub const fn new() -> Self {
        Self(RefCell::new(None))
    }

    pub fn start(&self, config: &str, from_state_version: Option<u32>) -> Result<(), String> {
        let config = serde_json::from_str(config).map_err(|error| format!("config: {error}"))?;
        *self.0.borrow_mut() = Some(P::start(config, from_state_version)?);
        Ok(())
    }

    pub fn handle(&self, event: Event) -> Result<(), Failure> {
        self.with(|plugin| plugin.handle(event))
    }

    pub fn command(&self, method: &str, body: &str) -> Result<String, Refusal> {
        self.with(|plugin| plugin.command(method, body))
    }

    pub fn query(&self, method: &str, body: &str) -> Result<String, Refusal> {
        self.with(|plugin| plugin.query(method, body))
    }

    fn with<R>(&self, call: impl FnOnce(&mut P) -> R) -> R {
        call(self.0.borrow_mut().as_mut().expect("the host calls `start` before any other export"))
    }
}

impl<P: Plugin> Default for Instance<P> {
    fn default() -> Self {
        Self::new()
    }
}

/// Exports a [`Plugin`] from a component, with its manifest as a custom section.
///
/// The path of the manifest is relative to the file that calls the macro.
#[macro_export]
macro_rules! export_plugin {
    ($plugin:ty, manifest: $manifest:literal) => {
        const _: () = {
            use $crate::macro_support as bindings;

            static INSTANCE: bindings::Instance<$plugin> = bindings::Instance::new();

            struct Component;

            impl bindings::Guest for Component {
                fn start(config: String, from: Option<u32>) -> Result<(), String> {
                    INSTANCE.start(&config, from)
                }

                fn handle(event: $crate::Event) -> Result<(), $crate::Failure> {
                    INSTANCE.handle(event)
                }

                fn command(method: String, body: String) -> Result<String, $crate::Refusal> {
                    INSTANCE.command(&method, &body)
                }

                fn query(method: String, body: String) -> Result<String, $crate::Refusal> {
                    INSTANCE.query(&method, &body)
                }
            }

            #[cfg(target_family = "wasm")]
    bindings::export_component!(Component with_types_in bindings);

            // In a native program the exports of several plugins would have the same names. The reference makes the
            // compiler check the implementation nevertheless.
            #[cfg(not(target_family = "wasm"))]
            #[used]
            static HANDLE: fn($crate::Event) -> Result<(), $crate::Failure> =
                <Component as bindings::Guest>::handle;

            #[used]
            #[cfg_attr(target_family = "wasm", unsafe(link_section = "dim-manifest"))]
            static MANIFEST: [u8; include_bytes!($manifest).len()] = *include_bytes!($manifest);

            // Standard metadata sections of WebAssembly.
            $crate::metadata_section!("version", env!("CARGO_PKG_VERSION"));
            $crate::metadata_section!("authors", env!("CARGO_PKG_AUTHORS"));
            $crate::metadata_section!("licenses", env!("CARGO_PKG_LICENSE"));
        };
    };
}

/// Writes a text into a custom section of the component.
#[doc(hidden)]
#[macro_export]
macro_rules! metadata_section {
    ($name:literal, $text:expr) => {
        const _: () = {
            const TEXT: &str = $text;

            #[used]
            #[cfg_attr(target_family = "wasm", unsafe(link_section = $name))]
            static SECTION: [u8; TEXT.len()] = {
                let mut bytes = [0; TEXT.len()];
                bytes.copy_from_slice(TEXT.as_bytes());
                bytes
            };
        };
    };
}
