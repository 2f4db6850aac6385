//! Owns the host functions of `wit/pubsub.wit`: they convert arguments and refusals, and call the session.

use bytes::Bytes;
use dim_model::beginning::Beginning;
use dim_model::ident::PeerName;
use dim_model::time::{Timestamp, nanoseconds};

use dim_store::entry_context::SubscriptionRequest;

use crate::bindings::v0_1::dim::coordination::pubsub as v0_1;
use crate::bindings::v0_2::dim::coordination::pubsub as wit;
use crate::instance::Guest;
use crate::session::{Refusal, allowed};

/// Implements the interface for a version of the contract.
macro_rules! implement {
    ($version:ident, $($subscribe:tt)*) => {
        const _: () = {
            use crate::bindings::$version::dim::coordination::pubsub::{Error, Hearing, Host};

            impl Host for Guest {
                fn publish(&mut self, topic: String, data: Vec<u8>) -> wasmtime::Result<Result<(), Error>> {
                    self.answer(|session| session.publish(&topic, Bytes::from(data)))
                }

                $($subscribe)*

                fn unsubscribe(&mut self, topic: String) -> wasmtime::Result<Result<(), Error>> {
                    self.answer(|session| session.subscribe(&topic, SubscriptionRequest(None)))
                }

                fn list_peers(&mut self, topic: String) -> wasmtime::Result<Result<Vec<String>, Error>> {
                    self.answer(|session| {
                        let topic = allowed!(session.heard_topic(&topic));
                        Ok(Ok(session.context.peers(&topic).iter().map(PeerName::to_string).collect()))
                    })
                }

                fn list_topics(&mut self) -> wasmtime::Result<Vec<String>> {
                    self.count_call()?;
                    Ok(self.session().context.subscriptions().iter().map(ToString::to_string).collect())
                }

                fn heard(&mut self, topic: String, since: u64) -> wasmtime::Result<Result<Hearing, Error>> {
                    self.answer(|session| {
                        let topic = allowed!(session.heard_topic(&topic));
                        let (listened, confirmed) = session.context.heard(&topic, Timestamp(since));
                        Ok(Ok(Hearing { listened: nanoseconds(listened), confirmed_until: confirmed.0 }))
                    })
                }
            }

            impl From<Refusal> for Error {
                fn from(refusal: Refusal) -> Self {
                    match refusal {
                        Refusal::NotGranted(topic) => Error::NotGranted(topic),
                        Refusal::Invalid(why) => Error::InvalidArgument(why),
                        Refusal::TooLarge(_, limit) => Error::TooLarge(limit),
                        Refusal::Limit(name) => Error::LimitExceeded(name.to_string()),
                        Refusal::ReadOnly => Error::ReadOnly,
                        other @ (Refusal::NotYetKnown
                        | Refusal::NotADocument(_)
                        | Refusal::KeyLength(_)
                        | Refusal::Quota(_)
                        | Refusal::TooMany(_)) => Error::Other(format!("{other:?}")),
                    }
                }
            }
        };
    };
}

implement!(
    v0_1,
    fn subscribe(&mut self, topic: String) -> wasmtime::Result<Result<(), v0_1::Error>> {
        self.answer(|session| session.subscribe(&topic, SubscriptionRequest(Some(Beginning::Head))))
    }
);

implement!(
    v0_2,
    fn subscribe(
        &mut self,
        topic: String,
        beginning: wit::Beginning,
    ) -> wasmtime::Result<Result<(), wit::Error>> {
        let beginning = match beginning {
            wit::Beginning::Head => Beginning::Head,
            wit::Beginning::Time(time) => Beginning::Time(Timestamp(time)),
            wit::Beginning::Earliest => Beginning::Earliest,
        };
        self.answer(|session| session.subscribe(&topic, SubscriptionRequest(Some(beginning))))
    }
);
