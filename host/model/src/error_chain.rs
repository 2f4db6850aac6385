//! Owns the text of errors for the operator. It receives errors and returns one line with all causes, without terms
//! of programmers.

/// Returns an error with its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Returns the problem and its place in a YAML file, in one line.
pub fn in_yaml(error: &serde_saphyr::Error) -> String {
    let told = error.render_with_formatter(&serde_saphyr::UserMessageFormatter);
    told.trim_start_matches("error: ").to_owned()
}

/// The maximum number of items that a list in a sentence names.
const NAMED: usize = 20;

/// Returns a list for a sentence: the first items, and the number of the others.
pub fn listed(items: &[String]) -> String {
    let named = items[..items.len().min(NAMED)].join(", ");
    match items.len().checked_sub(NAMED) {
        None | Some(0) => named,
        Some(more) => format!("{named} and {more} more"),
    }
}
