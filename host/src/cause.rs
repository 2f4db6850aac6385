//! Owns how an error is told to the operator: with its causes, and without the words of those who write programs.

/// An error with its causes on one line.
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

/// What is wrong with a YAML file, and where, in one line.
pub fn in_yaml(error: &serde_saphyr::Error) -> String {
    let told = error.render_with_formatter(&serde_saphyr::UserMessageFormatter);
    told.trim_start_matches("error: ").to_owned()
}

/// The most items of a list that a sentence names.
const NAMED: usize = 20;

/// A list within a sentence: its first items, and how many more there are.
pub fn listed(items: &[String]) -> String {
    let named = items[..items.len().min(NAMED)].join(", ");
    match items.len().checked_sub(NAMED) {
        None | Some(0) => named,
        Some(more) => format!("{named} and {more} more"),
    }
}
