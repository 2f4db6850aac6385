//! Owns suggestions for misspelt words. It receives a word and the known words, and returns the known word that was
//! probably meant.

/// The minimum similarity at which one word may be meant for the other.
const ALIKE: f64 = 0.84;

/// Returns the word that was probably meant.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase().replace('-', "_");
    let likeness = |known: &str| {
        let known = known.to_lowercase().replace('-', "_");
        let moved = strsim::damerau_levenshtein(&word, &known);
        // One wrong letter changes a short word too much.
        let is_near = moved <= 2 && word.len().max(known.len()) > 3 * moved;
        if is_near { 1.0 } else { strsim::jaro_winkler(&word, &known) }
    };
    let known = known.into_iter().map(|known| (likeness(known), known));
    known.filter(|(alike, _)| *alike >= ALIKE).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, known)| known)
}

/// Returns the question `; did you mean …?`, or an empty text if no known word is similar.
pub fn meant<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    nearest(word, known).map(|known| format!("; did you mean `{known}`?")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_word_is_told_from_a_word_of_another_program() {
        let known = ["ipfs", "topics", "signing", "plugins", "limits", "api", "store"];
        for (word, meant) in [
            ("topic", "topics"),
            ("signings", "signing"),
            ("plugin", "plugins"),
            ("Topics", "topics"),
            ("limit", "limits"),
            ("tpoics", "topics"),
            ("singing", "signing"),
        ] {
            assert_eq!(nearest(word, known), Some(meant), "{word}");
        }
        for foreign in ["orchestrator", "registry", "logging", "state_dir", "app", "rest", "tools", "grpc"] {
            assert_eq!(nearest(foreign, known), None, "{foreign}");
        }
    }
}
