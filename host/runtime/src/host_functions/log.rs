//! Owns the host function of `wit/log.wit`: it converts arguments and calls the session.

use std::fmt::Write as _;

use dim_store::plugin_limits::LINE_BYTES;

use crate::instance::Guest;

/// Implements the interface for a version of the contract.
macro_rules! implement {
    ($version:ident) => {
        const _: () = {
            use crate::bindings::$version::dim::coordination::log::{Field, Host, Level};

            impl Host for Guest {
                fn write(
                    &mut self,
                    level: Level,
                    message: String,
                    fields: Vec<Field>,
                ) -> wasmtime::Result<()> {
                    self.count_call()?;
                    let mut line = message;
                    for Field { name, value } in fields {
                        let _ = write!(line, " {name}={value:?}");
                        if line.len() > LINE_BYTES {
                            break;
                        }
                    }
                    line.truncate(line.floor_char_boundary(LINE_BYTES));
                    self.session_mut().line(severity(level), line);
                    Ok(())
                }
            }

            fn severity(level: Level) -> tracing::Level {
                match level {
                    Level::Trace => tracing::Level::TRACE,
                    Level::Debug => tracing::Level::DEBUG,
                    Level::Info => tracing::Level::INFO,
                    Level::Warn => tracing::Level::WARN,
                    Level::Error => tracing::Level::ERROR,
                }
            }
        };
    };
}
implement!(v0_1);
implement!(v0_2);
