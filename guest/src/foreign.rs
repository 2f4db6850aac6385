//! Reads a document that another program published under a key of the plugin, for the command `import`.
//!
//! Members and rows of the document may be unknown, null or of another type. The plugin keeps unknown members and
//! publishes them again.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use crate::state::{self, Map};
use crate::{Failure, Refusal, verbatim};

/// Maximum total size of the unknown members that are kept of one document or row, in bytes.
const MOST_UNKNOWN: usize = 64 << 10;

/// The members of an object, with their values as unparsed JSON.
pub type Members = BTreeMap<String, Box<RawValue>>;

/// A document that the command `import` takes over.
#[derive(Debug)]
pub struct Document {
    /// The key under which it was published.
    pub key: String,
    members: Members,
}

impl Document {
    /// Reads the body of the command `import`: `{"key": KEY, "document": {…}}`. Any other body is
    /// [`Refusal::Invalid`].
    pub fn read(body: &str) -> Result<Self, Refusal> {
        #[derive(Deserialize)]
        struct Import {
            key: String,
            document: Box<RawValue>,
        }
        let Import { key, document } = crate::json::read(body)?;
        let members = serde_json::from_str(document.get())
            .map_err(|error| Refusal::Invalid(format!("the document is not a JSON object: {error}")))?;
        Ok(Self { key, members })
    }

    /// Returns the rows of a member, which is a list or an object with the ids as names. An absent or null member has
    /// no rows; a member of another type is [`Refusal::Invalid`].
    ///
    /// `id_member` is the member of a row that contains its id. A row that is not an object or has no valid id is
    /// `None`.
    pub fn rows(&self, member: &str, id_member: &str) -> Result<Vec<Option<Row>>, Refusal> {
        let Some(raw) = self.members.get(member).filter(|raw| raw.get() != "null") else {
            return Ok(Vec::new());
        };
        let wrong = |error| Refusal::Invalid(format!("{member} is neither a list nor an object: {error}"));
        if raw.get().starts_with('{') {
            let rows: Members = serde_json::from_str(raw.get()).map_err(wrong)?;
            return Ok(rows.into_iter().map(|(id, row)| Row::of(&row, Some(id), id_member)).collect());
        }
        let rows: Vec<Box<RawValue>> = serde_json::from_str(raw.get()).map_err(wrong)?;
        Ok(rows.iter().map(|row| Row::of(row, None, id_member)).collect())
    }

    /// Reads a member. Returns none if it is absent, null or of another type.
    pub fn get<T: DeserializeOwned>(&self, member: &str) -> Option<T> {
        get(&self.members, member)
    }

    /// Returns the members whose names are not in `known`.
    pub fn unknown(&self, known: &[&str]) -> Unknown {
        Unknown::of(&self.members, known)
    }
}

fn get<T: DeserializeOwned>(members: &Members, member: &str) -> Option<T> {
    serde_json::from_str::<Option<T>>(members.get(member)?.get()).ok()?
}

/// A row of a document.
#[derive(Debug)]
pub struct Row {
    /// The row's id.
    pub id: String,
    members: Members,
}

impl Row {
    /// Reads a row. Returns none if `id` and the id in the row differ, because either could be meant.
    fn of(raw: &RawValue, id: Option<String>, id_member: &str) -> Option<Self> {
        let members: Members = serde_json::from_str(raw.get()).ok()?;
        let own = members.get(id_member).map(|own| serde_json::from_str::<String>(own.get()));
        let own = own.transpose().ok()?;
        if id.is_some() && own.is_some() && id != own {
            return None;
        }
        Some(Self { id: id.or(own)?, members })
    }

    /// Reads a member. Returns none if it is absent, null or of another type.
    pub fn get<T: DeserializeOwned>(&self, member: &str) -> Option<T> {
        get(&self.members, member)
    }

    /// Returns the members whose names are not in `known`.
    pub fn unknown(&self, known: &[&str]) -> Unknown {
        Unknown::of(&self.members, known)
    }
}

/// The unknown members of a document or row, as a JSON object of at most 64 KiB. Members that do not fit are left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unknown(String);

impl Unknown {
    fn of(members: &Members, known: &[&str]) -> Self {
        let mut object = String::from("{");
        let is_unknown = |name: &str| !known.contains(&name);
        // Members that other readers refuse would make the whole document unreadable for them.
        let kept =
            members.iter().filter(|(name, value)| is_unknown(name) && verbatim::check(value.get()).is_ok());
        for (name, value) in kept {
            let name = serde_json::to_string(name).expect("a string is JSON");
            if object.len() + name.len() + value.get().len() < MOST_UNKNOWN {
                let comma = if object.len() > 1 { "," } else { "" };
                object.push_str(&format!("{comma}{name}:{}", value.get()));
            }
        }
        object.push('}');
        Self(object)
    }

    fn is_empty(&self) -> bool {
        self.0 == "{}"
    }
}

/// The stored unknown members by the id of their row. The empty id stands for the document itself.
pub const UNKNOWN: Map<str, Box<RawValue>> = Map::new("unknown/");

/// Stores the unknown members of a row. If there are none, deletes those stored earlier.
pub fn keep(id: &str, unknown: &Unknown) -> Result<(), state::Error> {
    if unknown.is_empty() {
        return UNKNOWN.delete(id);
    }
    state::set(format!("unknown/{id}").as_bytes(), unknown.0.as_bytes())
}

/// All stored unknown members, by the ids of their rows.
#[derive(Debug)]
pub struct Kept(BTreeMap<String, Vec<u8>>);

impl Kept {
    /// Reads all of them from the state. There are few, because only imported rows have any.
    pub fn read() -> Result<Self, state::Error> {
        UNKNOWN.iter_raw(None).collect::<Result<_, _>>().map(Self)
    }

    /// Returns a row's record with its unknown members appended.
    pub fn with<'a>(&self, id: &str, record: &'a [u8]) -> std::borrow::Cow<'a, [u8]> {
        match (self.0.get(id), record.strip_suffix(b"}")) {
            (Some(unknown), Some(own)) => [own, b",", unknown.get(1..).unwrap_or(b"}")].concat().into(),
            _ => record.into(),
        }
    }

    /// Appends the unknown members of the document to `document`, whose JSON object is not closed yet. Appends nothing
    /// if they would exceed `room` bytes.
    pub fn append(&self, document: &mut Vec<u8>, room: usize) {
        let Some(unknown) = self.0.get("").filter(|unknown| document.len() + unknown.len() < room) else {
            return;
        };
        document.push(b',');
        document.extend(unknown.get(1..unknown.len().saturating_sub(1)).unwrap_or_default());
    }
}

/// Converts a failure of an event into a refusal of a command.
pub fn refusal(failure: Failure) -> Refusal {
    match failure {
        Failure::Reject(why) => Refusal::Invalid(why),
        Failure::Retry(_) => Refusal::Other("the command cannot be executed now: try again later".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Host;

    #[test]
    fn a_document_is_read_in_each_form_and_keeps_what_is_unknown() {
        let _host = Host::new();
        let body = r#"{"key":"k","document":{"jobs":{"a":{"state":"running","progress":0.10},"b":7,"c":{"job_id":"d"}},"nodes":[{"node_id":"n","rack":"r1"},{"x":1}],"fleet":"north","updated_at":"-"}}"#;
        let document = Document::read(body).unwrap();
        let jobs = document.rows("jobs", "job_id").unwrap();
        assert_eq!(jobs.iter().flatten().map(|row| row.id.as_str()).collect::<Vec<_>>(), ["a"]);
        assert_eq!(jobs.iter().filter(|row| row.is_none()).count(), 2, "a bad row affects only itself");
        let job = jobs[0].as_ref().unwrap();
        assert_eq!(job.get::<String>("state").as_deref(), Some("running"));
        assert_eq!(job.unknown(&["state"]).0, r#"{"progress":0.10}"#);
        let nodes = document.rows("nodes", "node_id").unwrap();
        assert_eq!(nodes.iter().flatten().map(|row| row.id.as_str()).collect::<Vec<_>>(), ["n"]);
        keep("n", &nodes[0].as_ref().unwrap().unknown(&["node_id"])).unwrap();
        keep("", &document.unknown(&["jobs", "nodes", "updated_at"])).unwrap();
        let kept = Kept::read().unwrap();
        assert_eq!(kept.with("n", br#"{"node_id":"n"}"#).as_ref(), br#"{"node_id":"n","rack":"r1"}"#);
        assert_eq!(kept.with("m", b"{}").as_ref(), b"{}");
        let mut built = b"{\"nodes\":[]".to_vec();
        kept.append(&mut built, 1_000);
        assert_eq!(built, br#"{"nodes":[],"fleet":"north""#);
        for wrong in ["[]", r#"{"key":"k","document":[]}"#, r#"{"key":"k","document":{"nodes":7}}"#] {
            let read = Document::read(wrong).and_then(|document| document.rows("nodes", "node_id").map(drop));
            assert!(matches!(read, Err(Refusal::Invalid(_))), "{wrong}");
        }
    }
}
