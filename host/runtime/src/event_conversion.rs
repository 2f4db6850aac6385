//! Owns the conversion of events to the types of `wit/event.wit`, and of its refusals to replies.

use dim_model::entry::{Event, Origin};
use dim_model::escape::escaped;
use dim_store::batch::ReplyError;
use dim_store::plugin_limits::REASON_BYTES;

use crate::bindings::dim::coordination::event as wit;
use crate::host_functions::ipns;

/// Converts a refusal of the plugin to an error of the reply.
pub fn reply_error(refusal: wit::Refusal, method: &str) -> ReplyError {
    match refusal {
        wit::Refusal::UnknownMethod => ReplyError::UnknownMethod(method.to_owned()),
        wit::Refusal::Invalid(why) => ReplyError::Invalid(cut(why)),
        wit::Refusal::NotFound(what) => ReplyError::NotFound(cut(what)),
        wit::Refusal::Conflict(why) => ReplyError::Conflict(cut(why)),
        wit::Refusal::Other(why) => ReplyError::Refused(cut(why)),
    }
}

/// Cuts the plugin's reason of a failure and escapes it, for the operator.
pub fn said(reason: String) -> String {
    escaped(&cut(reason)).into_owned()
}

/// Cuts a plugin's text to the longest accepted reason.
pub fn cut(mut reason: String) -> String {
    reason.truncate(reason.floor_char_boundary(REASON_BYTES));
    reason
}

/// Converts an event to the type of the interface.
pub fn wit_event(event: &Event) -> wit::Event {
    match event {
        Event::Message { topic, data, origin } => wit::Event::Message(wit::Message {
            topic: topic.to_string(),
            data: data.to_vec(),
            origin: match origin {
                Origin::Plugin(name) => wit::Origin::Plugin(name.to_string()),
                Origin::Host => wit::Origin::Host,
                Origin::Peer(peer) => wit::Origin::Peer(peer.to_string()),
                // Contract 0.1.0 knows no members.
                Origin::Member(event) => wit::Origin::Peer(event.writer.peer().to_string()),
            },
        }),
        Event::Timer { key, due } => wit::Event::Timer(wit::DueTimer { key: key.clone(), due: due.0 }),
        Event::NameChanged(known) => wit::Event::NameChanged(ipns::resolution(known)),
        Event::Gap { topic, since, until } => {
            wit::Event::Gap(wit::Gap { topic: topic.to_string(), since: since.0, until: until.0 })
        }
    }
}
