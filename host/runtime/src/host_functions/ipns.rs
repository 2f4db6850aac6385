//! Owns the host functions of `wit/ipns.wit`: they convert arguments and refusals, and call the session.

use std::time::Duration;

use bytes::Bytes;
use dim_model::entry;
use dim_store::effect::NameValue;

use crate::instance::Guest;
use crate::session::{Refusal, allowed, word};

/// Implements the interface for a version of the contract.
macro_rules! implement {
    ($version:ident) => {
        const _: () = {
            use crate::bindings::$version::dim::coordination::ipns::{Document, Error, Host, Resolution};

            impl Host for Guest {
                fn publish(
                    &mut self,
                    key: String,
                    path: String,
                    lifetime: Option<u64>,
                ) -> wasmtime::Result<Result<(), Error>> {
                    let lifetime = lifetime.map(Duration::from_nanos);
                    self.answer(|session| {
                        let path = allowed!(word(&path));
                        session.set_name(&key, NameValue::Path(path), lifetime)
                    })
                }

                fn update_state(
                    &mut self,
                    key: String,
                    data: Vec<u8>,
                    lifetime: Option<u64>,
                ) -> wasmtime::Result<Result<(), Error>> {
                    let lifetime = lifetime.map(Duration::from_nanos);
                    self.answer(|session| session.set_document(&key, Bytes::from(data), lifetime))
                }

                fn key_id(&mut self, key: String) -> wasmtime::Result<Result<String, Error>> {
                    self.answer(|session| Ok(session.key_id(&key)?.map(|name| name.to_string())))
                }

                fn follow(&mut self, name: String) -> wasmtime::Result<Result<(), Error>> {
                    self.answer(|session| session.follow(&name, true))
                }

                fn unfollow(&mut self, name: String) -> wasmtime::Result<Result<(), Error>> {
                    self.answer(|session| session.follow(&name, false))
                }

                fn resolve(&mut self, name: String) -> wasmtime::Result<Result<Resolution, Error>> {
                    self.answer(|session| Ok(session.resolve(&name)?.map(|known| (&known).into())))
                }

                fn get_state(&mut self, name: String) -> wasmtime::Result<Result<Document, Error>> {
                    self.answer(|session| {
                        let answer = session.get_document(&name)?;
                        Ok(answer.map(|(source, data)| Document { source: Resolution::from(&source), data }))
                    })
                }
            }

            impl From<&entry::Resolution> for Resolution {
                fn from(known: &entry::Resolution) -> Self {
                    Self {
                        name: known.name.to_string(),
                        path: known.path.to_string(),
                        sequence: known.sequence,
                        valid_until: known.valid_until.0,
                        confirmed_at: known.confirmed_at.0,
                    }
                }
            }

            impl From<Refusal> for Error {
                fn from(refusal: Refusal) -> Self {
                    match refusal {
                        Refusal::NotGranted(what) => Error::NotGranted(what),
                        Refusal::Invalid(why) => Error::InvalidArgument(why),
                        Refusal::NotYetKnown => Error::NotYetKnown,
                        Refusal::NotADocument(what) => Error::NotADocument(what),
                        Refusal::TooLarge(_, limit) => Error::TooLarge(limit),
                        Refusal::Limit(name) => Error::LimitExceeded(name.to_string()),
                        Refusal::ReadOnly => Error::ReadOnly,
                        other @ (Refusal::KeyLength(_) | Refusal::Quota(_) | Refusal::TooMany(_)) => {
                            Error::Other(format!("{other:?}"))
                        }
                    }
                }
            }
        };
    };
}
implement!(v0_1);
implement!(v0_2);
