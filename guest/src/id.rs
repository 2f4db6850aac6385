//! Checks ids from outside. A valid id can be a part of a key and of a URL, and can be shown to the operator.

/// Checks an id of at most `max` bytes. `what` names the id in the error, which is a text for the operator.
///
/// ```
/// assert!(dim_guest::id::check("a job_id", "render-7", 128).is_ok());
/// let why = dim_guest::id::check("a job_id", "..", 128).unwrap_err();
/// assert_eq!(why, "a job_id must have 1 to 128 bytes and no control characters, and must not be . or ..");
/// ```
pub fn check(what: &str, id: &str, max: usize) -> Result<(), String> {
    // `.` and `..` cannot be a path segment of a URL.
    if id.is_empty() || id.len() > max || id.chars().any(char::is_control) || [".", ".."].contains(&id) {
        return Err(format!(
            "{what} must have 1 to {max} bytes and no control characters, and must not be . or .."
        ));
    }
    Ok(())
}
