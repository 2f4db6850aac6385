//! Owns the host functions of `wit/timers.wit`: they convert arguments and refusals, and call the session.

use dim_model::time::Timestamp;

use crate::instance::Guest;
use crate::session::Refusal;

/// Implements the interface for a version of the contract.
macro_rules! implement {
    ($version:ident) => {
        const _: () = {
            use crate::bindings::$version::dim::coordination::timers::{Error, Host};

            impl Host for Guest {
                fn set(&mut self, key: String, at: u64) -> wasmtime::Result<Result<(), Error>> {
                    self.answer(|session| session.set_timer(&key, Some(Timestamp(at))))
                }

                fn clear(&mut self, key: String) -> wasmtime::Result<Result<(), Error>> {
                    self.answer(|session| session.set_timer(&key, None))
                }

                fn get(&mut self, key: String) -> wasmtime::Result<Result<Option<u64>, Error>> {
                    self.answer(|session| Ok(session.timer(&key)?.map(|at| at.map(|at| at.0))))
                }
            }

            impl From<Refusal> for Error {
                fn from(refusal: Refusal) -> Self {
                    match refusal {
                        Refusal::KeyLength(limit) => Error::KeyLength(limit),
                        Refusal::TooMany(limit) => Error::TooMany(limit),
                        Refusal::Limit(name) => Error::LimitExceeded(name.to_string()),
                        Refusal::ReadOnly => Error::ReadOnly,
                        other @ (Refusal::NotGranted(_)
                        | Refusal::Invalid(_)
                        | Refusal::NotYetKnown
                        | Refusal::NotADocument(_)
                        | Refusal::TooLarge(..)
                        | Refusal::Quota(_)) => Error::Other(format!("{other:?}")),
                    }
                }
            }
        };
    };
}
implement!(v0_1);
implement!(v0_2);
