//! Owns the event with which a subscription begins, and its text: `head`, `earliest`, a time, or a duration before now.

use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::time::{Since, Timestamp};

/// The event with which a subscription to a topic begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Beginning {
    /// The next one.
    #[default]
    Head,
    /// The first one of this time or later.
    Time(Timestamp),
    /// The earliest one that its writer keeps.
    Earliest,
}

impl Beginning {
    /// The earlier one of two beginnings.
    pub fn min(self, other: Self) -> Self {
        match (self, other) {
            (Self::Earliest, _) | (_, Self::Earliest) => Self::Earliest,
            (Self::Time(one), Self::Time(other)) => Self::Time(one.min(other)),
            (Self::Time(time), Self::Head) | (Self::Head, Self::Time(time)) => Self::Time(time),
            (Self::Head, Self::Head) => Self::Head,
        }
    }
}

/// A beginning as people write it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadFrom {
    place: Place,
    text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Head,
    Time(Since),
    Earliest,
}

impl ReadFrom {
    /// Whether the subscription begins with the next event.
    pub fn is_head(&self) -> bool {
        self.place == Place::Head
    }

    /// The text, as it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Returns the beginning of a subscription that is made at `now`.
    pub fn at(&self, now: Timestamp) -> Beginning {
        match self.place {
            Place::Head => Beginning::Head,
            Place::Time(since) => Beginning::Time(since.before(now)),
            Place::Earliest => Beginning::Earliest,
        }
    }
}

impl Default for ReadFrom {
    fn default() -> Self {
        Self { place: Place::Head, text: "head".to_owned() }
    }
}

impl FromStr for ReadFrom {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let place = match text {
            "head" => Place::Head,
            "earliest" => Place::Earliest,
            time => Place::Time(time.parse().map_err(|how| format!("`head`, `earliest`, or a time: {how}"))?),
        };
        Ok(Self { place, text: text.to_owned() })
    }
}

impl Serialize for ReadFrom {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for ReadFrom {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
