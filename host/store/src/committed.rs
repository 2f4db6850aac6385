//! Owns the store's role as the source of the embedded backend. It receives paths and key names, and returns
//! committed documents and records.

use dim_ipfs::embedded::{Committed, CommittedError};
use dim_model::ident::{ContentPath, KeyName};

use crate::{Store, documents, names};

impl Committed for Store {
    fn document(&self, path: &ContentPath) -> Result<Option<Vec<u8>>, CommittedError> {
        Ok(documents::get(&self.snapshot()?, path)?)
    }

    fn record(&self, key: &KeyName) -> Result<Option<Vec<u8>>, CommittedError> {
        let known = names::known(&self.snapshot()?, key)?;
        Ok(known.as_ref().and_then(names::Known::record).map(<[u8]>::to_vec))
    }
}
