//! Owns recorded events as they lie in a file: read line by line, for there may be many.

use std::fs::File;
use std::io::{BufRead, BufReader, Read as _};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::entry::exported::{Header, Malformed, Record};
use crate::time::Timestamp;

/// Longest line, in bytes: the largest document, written as text or in base64, with room for what must be escaped.
const MAX_LINE: u64 = 128 << 20;

/// Why recorded events cannot be read.
#[derive(Debug, Error)]
pub enum EventsError {
    /// The file.
    #[error("cannot read {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line.
    #[error("{path}, line {line}")]
    Line {
        /// Of which file.
        path: PathBuf,
        /// Which, from 1.
        line: u64,
        /// What is wrong with it.
        source: Malformed,
    },
    /// The file breaks off.
    #[error("{path} is no export of events: it has no first line")]
    Empty {
        /// Which.
        path: PathBuf,
    },
}

/// Recorded events, one after the other.
#[derive(Debug)]
pub struct Events {
    /// What is told of the host.
    pub header: Header,
    path: PathBuf,
    file: BufReader<File>,
    line: u64,
    /// Bytes of the lines read so far.
    bytes: u64,
    /// The first record, which was looked at.
    first: Option<Record>,
    /// The place and the time of the last record that was read.
    last: Option<(u64, Timestamp)>,
}

impl Events {
    /// Opens a file and reads its first line.
    pub fn open(path: &Path) -> Result<Self, EventsError> {
        let file = File::open(path).map_err(|source| EventsError::File { path: path.to_owned(), source })?;
        let mut file = BufReader::with_capacity(1 << 20, file);
        let first =
            read_line(path, &mut file)?.ok_or_else(|| EventsError::Empty { path: path.to_owned() })?;
        let header = Header::read(&first);
        let header = header.map_err(|source| EventsError::Line { path: path.to_owned(), line: 1, source })?;
        let mut events =
            Self { header, path: path.to_owned(), file, line: 1, bytes: 0, first: None, last: None };
        events.first = events.next().transpose()?;
        Ok(events)
    }

    /// How many bytes of lines were read.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// When the first record was appended; the end if there is none.
    pub fn begin(&self) -> Timestamp {
        self.first.as_ref().map_or(self.header.until, |first| first.time)
    }
}

impl Iterator for Events {
    type Item = Result<Record, EventsError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(first) = self.first.take() {
            return Some(Ok(first));
        }
        let line = match read_line(&self.path, &mut self.file).transpose()? {
            Ok(line) => line,
            Err(error) => return Some(Err(error)),
        };
        self.line += 1;
        self.bytes += line.len() as u64;
        let record = Record::read(&line).and_then(|record| match record.follows(self.last) {
            true => Ok(record),
            false => Err(Malformed::Order),
        });
        if let Ok(record) = &record {
            self.last = Some((record.offset, record.time));
        }
        Some(record.map_err(|source| EventsError::Line { path: self.path.clone(), line: self.line, source }))
    }
}

/// The next line; none at the end of the file.
fn read_line(path: &Path, file: &mut BufReader<File>) -> Result<Option<String>, EventsError> {
    let mut line = String::new();
    let read = file.take(MAX_LINE).read_line(&mut line);
    let read = read.and_then(|read| match read as u64 == MAX_LINE {
        true => Err(std::io::Error::other(format!("a line has more than {MAX_LINE} bytes"))),
        false => Ok(read),
    });
    let read = read.map_err(|source| EventsError::File { path: path.to_owned(), source })?;
    Ok((read > 0).then_some(line))
}
