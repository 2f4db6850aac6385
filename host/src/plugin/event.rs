//! The words of `wit/event.wit`: events to the interface, and its refusals to replies.

use super::bindings::dim::coordination::event as wit;
use super::limits::REASON_BYTES;
use super::{ReplyError, ipns};
use crate::entry::{Event, Origin};
use crate::escape::escaped;

/// Why there is no answer, in the words of the host.
pub fn reply_error(refusal: wit::Refusal, method: &str) -> ReplyError {
    match refusal {
        wit::Refusal::UnknownMethod => ReplyError::UnknownMethod(method.to_owned()),
        wit::Refusal::Invalid(why) => ReplyError::Invalid(cut(why)),
        wit::Refusal::NotFound(what) => ReplyError::NotFound(cut(what)),
        wit::Refusal::Conflict(why) => ReplyError::Conflict(cut(why)),
        wit::Refusal::Other(why) => ReplyError::Refused(cut(why)),
    }
}

/// What a plugin says of its failure, for the operator.
pub fn said(reason: String) -> String {
    escaped(&cut(reason)).into_owned()
}

/// What a plugin says, as long as anyone reads it.
pub fn cut(mut reason: String) -> String {
    reason.truncate(reason.floor_char_boundary(REASON_BYTES));
    reason
}

/// An event in the words of the interface.
pub fn wit_event(event: &Event) -> wit::Event {
    match event {
        Event::Message { topic, data, origin } => wit::Event::Message(wit::Message {
            topic: topic.to_string(),
            data: data.to_vec(),
            origin: match origin {
                Origin::Plugin(name) => wit::Origin::Plugin(name.to_string()),
                Origin::Host => wit::Origin::Host,
                Origin::Peer(peer) => wit::Origin::Peer(peer.to_string()),
            },
        }),
        Event::Timer { key, due } => wit::Event::Timer(wit::DueTimer { key: key.clone(), due: due.0 }),
        Event::NameChanged(known) => wit::Event::NameChanged(ipns::resolution(known)),
        Event::Gap { topic, since, until } => {
            wit::Event::Gap(wit::Gap { topic: topic.to_string(), since: since.0, until: until.0 })
        }
    }
}
