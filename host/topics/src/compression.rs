//! Owns the compression of the events of a bundle (RFC 8878). A thread keeps its contexts, because making one costs more
//! than compressing a small bundle.

use std::cell::RefCell;

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::get_frame_content_size;

use crate::malformed::Malformed;

/// The compression level.
const LEVEL: i32 = 1;

thread_local! {
    static COMPRESSOR: RefCell<Compressor<'static>> =
        RefCell::new(Compressor::new(LEVEL).expect("the memory of a context"));
    static DECOMPRESSOR: RefCell<Decompressor<'static>> =
        RefCell::new(Decompressor::new().expect("the memory of a context"));
}

/// Compresses bytes into one zstd frame with its content size.
pub fn compress(raw: &[u8]) -> Vec<u8> {
    COMPRESSOR.with_borrow_mut(|it| it.compress(raw)).expect("the memory of one message")
}

/// Decompresses one zstd frame of untrusted bytes. The frame must have its content size, at most `limit` bytes.
pub fn decompress(frame: &[u8], limit: usize) -> Result<Vec<u8>, Malformed> {
    let size = get_frame_content_size(frame).ok().flatten();
    let size = size.ok_or(Malformed::Events("they are no zstd frame with its size"))?;
    let bytes = usize::try_from(size).unwrap_or(usize::MAX);
    if bytes > limit {
        return Err(Malformed::TooLarge { bytes, limit });
    }
    let raw = DECOMPRESSOR.with_borrow_mut(|it| it.decompress(frame, bytes));
    raw.map_err(|_| Malformed::Events("the zstd frame is damaged"))
}
