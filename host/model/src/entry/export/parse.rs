//! Owns the parsing of exported records. It receives lines of any origin and returns records; unknown members are
//! errors.

use serde::Deserialize;

use super::{CatchingUp, Data, Malformed, Record, Span, What};
use crate::entry::{Missing, Resolution};
use crate::ident::{PeerName, PluginName, Topic};
use crate::time::Timestamp;

/// A record as written in a line: exactly one member has its content, and no member is unknown.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Written {
    offset: u64,
    time: Timestamp,
    message: Option<Message>,
    gap: Option<Gap>,
    catching_up: Option<BegunCatchUp>,
    caught_up: Option<CaughtUp>,
    heard: Option<Vec<Span>>,
    peers: Option<Peers>,
    name: Option<Name>,
    confirmed: Option<Resolution>,
    command: Option<Command>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Message {
    topic: Topic,
    from: String,
    earlier_for: Option<CatchingUp>,
    text: Option<String>,
    base64: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Gap {
    topic: Topic,
    since: Timestamp,
    until: Timestamp,
    missing: Option<Missing>,
    earlier_for: Option<CatchingUp>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BegunCatchUp {
    plugin: PluginName,
    subscription: u64,
    topic: Topic,
    #[serde(default)]
    own_too: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CaughtUp {
    plugin: PluginName,
    subscription: u64,
    topic: Topic,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Peers {
    topic: Topic,
    peers: Vec<PeerName>,
}

#[derive(Deserialize)]
struct Name {
    #[serde(flatten)]
    resolution: Resolution,
    document: Option<Data>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Command {
    plugin: PluginName,
    method: String,
    body: String,
}

impl TryFrom<Written> for Record {
    type Error = Malformed;

    fn try_from(written: Written) -> Result<Self, Malformed> {
        let Written { offset, time, message, gap, catching_up, caught_up, .. } = written;
        let Written { heard, peers, name, confirmed, command, .. } = written;
        let message = message.map(What::try_from).transpose()?;
        let gap = gap.map(|Gap { topic, since, until, missing, earlier_for }| What::Gap {
            topic,
            since,
            until,
            missing,
            earlier_for,
        });
        let catching_up = catching_up.map(|it| What::CatchingUp {
            who: CatchingUp { plugin: it.plugin, subscription: it.subscription },
            topic: it.topic,
            own_too: it.own_too,
        });
        let caught_up = caught_up.map(|CaughtUp { plugin, subscription, topic }| What::CaughtUp {
            who: CatchingUp { plugin, subscription },
            topic,
        });
        let peers = peers.map(|Peers { topic, peers }| What::Peers { topic, peers });
        let name = name.map(|Name { resolution, document }| What::Name { resolution, document });
        let command = command.map(|Command { plugin, method, body }| What::Command { plugin, method, body });
        let all = [
            message,
            gap,
            catching_up,
            caught_up,
            heard.map(What::Heard),
            peers,
            name,
            confirmed.map(What::Confirmed),
            command,
        ];
        let mut told = all.into_iter().flatten();
        match (told.next(), told.next()) {
            (Some(what), None) => Ok(Self { offset, time, what }),
            _ => Err(Malformed::Sort),
        }
    }
}

impl TryFrom<Message> for What {
    type Error = Malformed;

    fn try_from(written: Message) -> Result<Self, Malformed> {
        let Message { topic, from, earlier_for, text, base64 } = written;
        let data = match (text, base64) {
            (Some(text), None) => Data::Text(text),
            (None, Some(base64)) => Data::Base64(base64),
            _ => return Err(Malformed::Data),
        };
        Ok(Self::Message { topic, from, earlier_for, data })
    }
}
