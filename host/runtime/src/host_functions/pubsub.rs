//! Owns the host functions of `wit/pubsub.wit`: they convert arguments and refusals, and call the session.

use bytes::Bytes;
use dim_model::ident::PeerName;
use dim_model::time::{Timestamp, nanoseconds};

use crate::bindings::dim::coordination::pubsub::{Error, Hearing, Host};
use crate::instance::Guest;
use crate::session::{Refusal, allowed};

impl Host for Guest {
    fn publish(&mut self, topic: String, data: Vec<u8>) -> wasmtime::Result<Result<(), Error>> {
        self.answer(|session| session.publish(&topic, Bytes::from(data)))
    }

    fn subscribe(&mut self, topic: String) -> wasmtime::Result<Result<(), Error>> {
        self.answer(|session| session.subscribe(&topic, true))
    }

    fn unsubscribe(&mut self, topic: String) -> wasmtime::Result<Result<(), Error>> {
        self.answer(|session| session.subscribe(&topic, false))
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
