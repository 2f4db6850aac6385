//! Ids that come from outside: each can be a part of a key and of a URL, and be shown to an operator.

/// Checks an id of at most `max` bytes; the error says what is wrong, in the words of the operator.
///
/// ```
/// assert!(dim_guest::id::check("a job_id", "render-7", 128).is_ok());
/// let why = dim_guest::id::check("a job_id", "..", 128).unwrap_err();
/// assert_eq!(why, "a job_id has 1 to 128 bytes, no control characters, and is neither . nor ..");
/// ```
pub fn check(what: &str, id: &str, max: usize) -> Result<(), String> {
    // `.` and `..` have no place in a URL.
    if id.is_empty() || id.len() > max || id.chars().any(char::is_control) || [".", ".."].contains(&id) {
        return Err(format!("{what} has 1 to {max} bytes, no control characters, and is neither . nor .."));
    }
    Ok(())
}
