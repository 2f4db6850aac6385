//! Owns the format of the records of a backup. It converts between records and bytes.

use std::io::{self, Read, Write};

use prost::Message as _;

use super::BackupError;

/// The format version of backups that this host writes.
pub const FORM: u32 = 3;

/// The format version of backups without private files. Earlier hosts read them.
pub const FORM_WITHOUT_PRIVATE_FILES: u32 = 2;

/// The maximum length of a record, in bytes: a row with the largest document, and a margin.
const LONGEST: usize = 64 << 20;

/// A record. Field numbers are never reused.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Record {
    /// The content.
    #[prost(oneof = "Content", tags = "1, 2, 3, 4, 5, 6")]
    pub content: Option<Content>,
}

/// The content of a record.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Content {
    /// The first record.
    #[prost(message, tag = "1")]
    Head(Head),
    /// A key.
    #[prost(message, tag = "2")]
    Key(Key),
    /// A row of a table.
    #[prost(message, tag = "3")]
    Row(Row),
    /// The last record.
    #[prost(message, tag = "4")]
    End(End),
    /// A part of an installed component.
    #[prost(message, tag = "5")]
    Component(Component),
    /// A secret that is no key of an IPNS name.
    #[prost(message, tag = "6")]
    PrivateFile(PrivateFile),
}

/// The description of a backup.
#[derive(Clone, PartialEq, Eq, prost::Message, serde::Serialize)]
pub struct Head {
    /// The format version of the records.
    #[prost(uint32, tag = "1")]
    pub form: u32,
    /// The format of the store.
    #[prost(uint64, tag = "2")]
    pub store_format: u64,
    /// The host's identity.
    #[prost(string, tag = "3")]
    pub host: String,
    /// The time of the backup, RFC 3339.
    #[prost(string, tag = "4")]
    pub time: String,
    /// The version of the host that wrote it.
    #[prost(string, tag = "5")]
    pub version: String,
}

/// A key, with the content of its file.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Key {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(bool, tag = "2")]
    pub is_adopted: bool,
    #[prost(bytes = "vec", tag = "3")]
    pub bytes: Vec<u8>,
}

/// A secret that is no key of an IPNS name, in a directory beside the keys.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PrivateFile {
    #[prost(string, tag = "1")]
    pub directory: String,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(bytes = "vec", tag = "3")]
    pub bytes: Vec<u8>,
}

/// A part of a component. The parts of one component are adjacent.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Component {
    #[prost(bytes = "vec", tag = "1")]
    pub bytes: Vec<u8>,
    #[prost(bool, tag = "2")]
    pub is_last: bool,
}

/// A row, with the bytes of its table.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Row {
    #[prost(string, tag = "1")]
    pub table: String,
    #[prost(bytes = "vec", tag = "2")]
    pub key: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    pub value: Vec<u8>,
}

/// The number of records of each kind.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct End {
    #[prost(uint64, tag = "1")]
    pub keys: u64,
    #[prost(uint64, tag = "2")]
    pub rows: u64,
    #[prost(uint64, tag = "3")]
    pub components: u64,
    #[prost(uint64, tag = "4")]
    pub private_files: u64,
}

impl Content {
    /// Writes a record.
    pub fn write(self, out: &mut impl Write) -> io::Result<()> {
        let bytes = Record { content: Some(self) }.encode_to_vec();
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        out.write_all(&length.to_be_bytes())?;
        out.write_all(&bytes)
    }

    /// Reads a record. Returns [`BackupError::Damaged`] if it is incomplete, too long or of an unknown kind.
    pub fn read(input: &mut impl Read) -> Result<Self, BackupError> {
        let damaged = |why: String| BackupError::Damaged(why);
        let mut length = [0; 4];
        let short = |error: io::Error| damaged(format!("it ends too early: {error}"));
        input.read_exact(&mut length).map_err(short)?;
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if length > LONGEST {
            return Err(damaged(format!("a record of {length} bytes")));
        }
        let mut bytes = vec![0; length];
        input.read_exact(&mut bytes).map_err(short)?;
        let record = Record::decode(bytes.as_slice()).map_err(|error| damaged(error.to_string()))?;
        record.content.ok_or_else(|| damaged("a record of an unknown kind".to_owned()))
    }
}
