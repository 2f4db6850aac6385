//! Owns the host functions of `wit/state.wit`: they convert arguments and refusals, and call the session.

use crate::instance::Guest;
use crate::session::Refusal;

/// Most pairs in one page of a scan.
const PAGE_PAIRS: usize = 10_000;

/// Implements the interface for a version of the contract.
macro_rules! implement {
    ($version:ident) => {
        const _: () = {
            use crate::bindings::$version::dim::coordination::state::{Error, Host, Pair};

            impl Host for Guest {
                fn get(&mut self, key: Vec<u8>) -> wasmtime::Result<Result<Option<Vec<u8>>, Error>> {
                    self.answer(|session| session.get_state(&key))
                }

                fn set(&mut self, key: Vec<u8>, value: Vec<u8>) -> wasmtime::Result<Result<(), Error>> {
                    self.answer(|session| session.set_state(&key, Some(&value)))
                }

                fn delete(&mut self, key: Vec<u8>) -> wasmtime::Result<Result<(), Error>> {
                    self.answer(|session| session.set_state(&key, None))
                }

                fn scan(
                    &mut self,
                    prefix: Vec<u8>,
                    after: Option<Vec<u8>>,
                    limit: u32,
                ) -> wasmtime::Result<Result<Vec<Pair>, Error>> {
                    let limit = usize::try_from(limit).unwrap_or(PAGE_PAIRS).min(PAGE_PAIRS);
                    self.answer(|session| {
                        let page = session.scan(&prefix, after.as_deref(), limit)?;
                        Ok(page
                            .map(|rows| rows.into_iter().map(|(key, value)| Pair { key, value }).collect()))
                    })
                }
            }

            impl From<Refusal> for Error {
                fn from(refusal: Refusal) -> Self {
                    match refusal {
                        Refusal::KeyLength(limit) => Error::KeyLength(limit),
                        Refusal::TooLarge(_, limit) => Error::ValueTooLarge(limit),
                        Refusal::Quota(quota) => Error::QuotaExceeded(quota),
                        Refusal::Limit(name) => Error::LimitExceeded(name.to_string()),
                        Refusal::ReadOnly => Error::ReadOnly,
                        other @ (Refusal::NotGranted(_)
                        | Refusal::Invalid(_)
                        | Refusal::NotYetKnown
                        | Refusal::NotADocument(_)
                        | Refusal::TooMany(_)) => Error::Other(format!("{other:?}")),
                    }
                }
            }
        };
    };
}
implement!(v0_1);
implement!(v0_2);
