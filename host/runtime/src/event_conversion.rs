//! Owns the conversion of events to the types of each contract, and of refusals to replies.

use dim_model::entry::{Event, Origin};
use dim_model::escape::escaped;
use dim_store::batch::ReplyError;
use dim_store::plugin_limits::REASON_BYTES;

use crate::bindings::v0_1::dim::coordination::event as v0_1;
use crate::bindings::v0_2::dim::coordination::event as wit;

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

/// Converts an event to the type of contract 0.2.0.
pub fn event_v0_2(event: &Event) -> wit::Event {
    match event {
        Event::Message { topic, data, origin } => wit::Event::Message(wit::Message {
            topic: topic.to_string(),
            data: data.to_vec(),
            origin: match origin {
                Origin::Plugin(name) => wit::Origin::Plugin(name.to_string()),
                Origin::Host => wit::Origin::Host,
                Origin::Peer(peer) => wit::Origin::Peer(peer.to_string()),
                Origin::Member(event) => wit::Origin::Member(wit::MemberEvent {
                    writer: event.writer.to_string(),
                    peer: event.writer.peer().to_string(),
                    incarnation: hex(&event.incarnation),
                    sequence: event.sequence,
                    time: event.time.0,
                }),
            },
        }),
        Event::Timer { key, due } => wit::Event::Timer(wit::DueTimer { key: key.clone(), due: due.0 }),
        Event::NameChanged(known) => wit::Event::NameChanged(known.into()),
        Event::Gap { topic, since, until, missing } => wit::Event::Gap(wit::Gap {
            topic: topic.to_string(),
            since: since.0,
            until: until.0,
            missing: missing.as_ref().map(|it| wit::MissingEvents {
                writer: it.writer.to_string(),
                peer: it.writer.peer().to_string(),
                incarnation: hex(&it.incarnation),
                first: it.first,
                next: it.next,
            }),
        }),
    }
}

/// Converts an event to the type of contract 0.1.0, which knows no members: a member is the peer of its key, and a gap
/// does not name the missing events.
pub fn event_v0_1(event: &Event) -> v0_1::Event {
    match event {
        Event::Message { topic, data, origin } => v0_1::Event::Message(v0_1::Message {
            topic: topic.to_string(),
            data: data.to_vec(),
            origin: match origin {
                Origin::Plugin(name) => v0_1::Origin::Plugin(name.to_string()),
                Origin::Host => v0_1::Origin::Host,
                Origin::Peer(peer) => v0_1::Origin::Peer(peer.to_string()),
                Origin::Member(event) => v0_1::Origin::Peer(event.writer.peer().to_string()),
            },
        }),
        Event::Timer { key, due } => v0_1::Event::Timer(v0_1::DueTimer { key: key.clone(), due: due.0 }),
        Event::NameChanged(known) => v0_1::Event::NameChanged(known.into()),
        Event::Gap { topic, since, until, .. } => {
            v0_1::Event::Gap(v0_1::Gap { topic: topic.to_string(), since: since.0, until: until.0 })
        }
    }
}

/// The text of an incarnation.
fn hex(incarnation: &[u8; 16]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(32);
    for byte in incarnation {
        let _ = write!(text, "{byte:02x}");
    }
    text
}
