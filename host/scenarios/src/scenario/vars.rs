//! Owns the variables of a scenario. Receives JSON with `${…}`; returns it with the values filled in.

use dim_model::ident::PeerName;
use dim_model::time::{Timestamp, duration_of, nanoseconds};
use libp2p_identity::PeerId;
use serde_json::Value;

use crate::identity::{key_for, name_for, peer_of};

/// The known variables, for error texts.
const KNOWN: &str = "${now}, ${now+30s}, ${now-30s}, ${i}, ${peer.WORD}, ${name.WORD}, ${key.KEY} and ${host.id}; $${ stands for ${ itself";

/// The values of the variables at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Vars {
    /// The seed from which peers and names derive.
    pub seed: u64,
    /// The time.
    pub now: Timestamp,
    /// The round of the repetition, from 1.
    pub round: u64,
}

impl Vars {
    /// Fills in the variables of a value, including those in the names of members.
    pub fn fill(&self, value: &Value) -> Value {
        match value {
            Value::String(text) if text == "${i}" => self.round.into(),
            Value::String(text) => Value::String(self.fill_text(text)),
            Value::Array(items) => items.iter().map(|item| self.fill(item)).collect(),
            Value::Object(members) => {
                let filled = members.iter().map(|(name, value)| (self.fill_text(name), self.fill(value)));
                Value::Object(filled.collect())
            }
            other => other.clone(),
        }
    }

    /// Fills in the variables of a text. An unknown variable stays as it is.
    pub fn fill_text(&self, text: &str) -> String {
        let (mut filled, mut rest) = (String::new(), text);
        while let Some((before, after)) = rest.split_once("${") {
            if let Some(before) = before.strip_suffix('$') {
                // `$${` is the escape for `${`.
                filled.push_str(before);
                filled.push_str("${");
                rest = after;
                continue;
            }
            filled.push_str(before);
            let value = after.split_once('}').and_then(|(name, after)| Some((self.value(name)?, after)));
            rest = match value {
                Some((value, after)) => {
                    filled.push_str(&value);
                    after
                }
                None => {
                    filled.push_str("${");
                    after
                }
            };
        }
        filled.push_str(rest);
        filled
    }

    /// Escapes a value, so that [`Vars::fill`] returns it unchanged.
    pub fn escaped(value: &Value) -> Value {
        let escape = |text: &str| text.replace("${", "$${");
        match value {
            Value::String(text) => Value::String(escape(text)),
            Value::Array(items) => items.iter().map(Self::escaped).collect(),
            Value::Object(members) => {
                let escaped = members.iter().map(|(name, value)| (escape(name), Self::escaped(value)));
                Value::Object(escaped.collect())
            }
            other => other.clone(),
        }
    }

    /// Checks that members and their names contain only known variables. The error names the member.
    pub fn only_known<'a>(members: impl IntoIterator<Item = (&'a String, &'a Value)>) -> Result<(), String> {
        let vars = Self { seed: 0, now: Timestamp(0), round: 0 };
        for (name, value) in members {
            let unknown = vars.unknown_in(name).or_else(|| vars.unknown(value));
            if let Some(word) = unknown {
                return Err(format!("{name}: ${{{word}}} is no variable; there are {KNOWN}"));
            }
        }
        Ok(())
    }

    fn unknown(&self, value: &Value) -> Option<String> {
        match value {
            Value::String(text) => self.unknown_in(text),
            Value::Array(items) => items.iter().find_map(|item| self.unknown(item)),
            Value::Object(members) => {
                members.iter().find_map(|(name, value)| self.unknown_in(name).or_else(|| self.unknown(value)))
            }
            _ => None,
        }
    }

    fn unknown_in(&self, text: &str) -> Option<String> {
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("${") {
            rest = after;
            if let Some((word, _)) = after.split_once('}').filter(|_| !before.ends_with('$'))
                && self.value(word).is_none()
            {
                return Some(word.to_owned());
            }
        }
        None
    }

    /// The value of a variable. None if the name is unknown.
    fn value(&self, name: &str) -> Option<String> {
        if let Some((sort, word)) = name.split_once('.') {
            return match sort {
                "peer" => Some(peer_of(self.seed, word).to_string()),
                "name" => Some(name_for(self.seed, word).to_string()),
                "key" => Some(key_for(self.seed, word).to_string()),
                "host" if word == "id" => Some(peer_of(self.seed, "host").to_string()),
                _ => None,
            };
        }
        match name.strip_prefix("now") {
            Some("") => Some(self.now.to_string()),
            Some(by) if by.starts_with('+') => Some(self.now.after(duration_of(&by[1..]).ok()?).to_string()),
            Some(by) if by.starts_with('-') => {
                let by = nanoseconds(duration_of(&by[1..]).ok()?);
                Some(Timestamp(self.now.0.saturating_sub(by)).to_string())
            }
            Some(_) => None,
            None => (name == "i").then(|| self.round.to_string()),
        }
    }

    /// The peer behind a word. A peer id is its own peer.
    pub fn peer(&self, word: &str) -> PeerName {
        let is_id = word.parse::<PeerId>().is_ok();
        word.parse().ok().filter(|_| is_id).unwrap_or_else(|| peer_of(self.seed, word))
    }
}
