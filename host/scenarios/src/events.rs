//! Owns the reader of recorded events. Receives a file; returns its header and its records, line by line, because the
//! file may be larger than the memory.

use std::fs::File;
use std::io::{BufRead, BufReader, Read as _};
use std::path::{Path, PathBuf};

use dim_model::entry::export::{Header, Malformed, Record};
use dim_model::time::Timestamp;
use thiserror::Error;

/// Maximum length of a line, in bytes: the largest document as text or in base64, including escapes.
const MAX_LINE: u64 = 128 << 20;

/// The reason why recorded events cannot be read.
#[derive(Debug, Error)]
pub enum EventsError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    File {
        /// The path of the file.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// A line is malformed.
    #[error("{path}, line {line}")]
    Line {
        /// The path of the file.
        path: PathBuf,
        /// The number of the line, from 1.
        line: u64,
        /// The defect of the line.
        source: Malformed,
    },
    /// The file is empty.
    #[error("{path} is no export of events: it has no first line")]
    Empty {
        /// The path of the file.
        path: PathBuf,
    },
}

/// A reader of recorded events: an iterator over the records, in the order of the log.
#[derive(Debug)]
pub struct Events {
    /// The first line of the export: the host, its plugins and its keys.
    pub header: Header,
    path: PathBuf,
    file: BufReader<File>,
    line: u64,
    /// The bytes of the lines read so far.
    bytes: u64,
    /// The first record, which was read in advance.
    first: Option<Record>,
    /// The offset and the time of the last record.
    last: Option<(u64, Timestamp)>,
}

impl Events {
    /// Opens a file, and reads its first line and the first record.
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

    /// The number of bytes of the lines read so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The time of the first record; the end of the export if there is none.
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

/// Reads the next line. Returns none at the end of the file.
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
