//! Owns the escaping of untrusted text for people: on a terminal, in the log, in an error. It receives text and
//! returns text that stays on its line, moves no cursor, and hides and reorders nothing.

use std::borrow::Cow;

/// Characters that [`str::escape_debug`] escapes, and that are harmless outside a literal.
const HARMLESS: [char; 3] = ['\\', '\'', '"'];

/// Returns whether a character is invisible although it is no control or format character: variation selectors,
/// fillers.
fn is_unseen(c: char) -> bool {
    matches!(
        c,
        '\u{34f}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{2800}' | '\u{3164}' | '\u{16fe4}' | '\u{1d159}' | '\u{fe00}'..='\u{fe0f}' | '\u{ffa0}' | '\u{e0100}'..='\u{e01ef}'
    )
}

/// Escapes invisible characters, as in `\u{1b}`: control and format characters, those that change the direction of
/// text, all blanks but the space, and unassigned ones. Text that was escaped before stays the same.
pub fn escaped(text: &str) -> Cow<'_, str> {
    // Most text needs no escaping.
    if text.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    for piece in text.split_inclusive(|c| HARMLESS.contains(&c) || is_unseen(c)) {
        let last = piece.chars().next_back().filter(|c| HARMLESS.contains(c) || is_unseen(*c));
        let seen = last.map_or(piece, |last| &piece[..piece.len() - last.len_utf8()]);
        out.extend(seen.escape_debug());
        match last {
            Some(unseen) if is_unseen(unseen) => out.extend(unseen.escape_unicode()),
            harmless => out.extend(harmless),
        }
    }
    Cow::Owned(out)
}

/// Escapes a word that is shown beside others, such as an id in a table. It also escapes blanks at both ends.
pub fn escaped_word(text: &str) -> Cow<'_, str> {
    let word = escaped(text);
    let inner = word.trim_matches(' ');
    if inner.len() == word.len() {
        return word;
    }
    let before = word.len() - word.trim_start_matches(' ').len();
    let blank = |count: usize| "\\u{20}".repeat(count);
    Cow::Owned(format!("{}{inner}{}", blank(before), blank(word.len() - before - inner.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_seen_is_written_out() {
        let hidden = ('\0'..='\u{9f}').filter(|c| c.is_control()).chain([
            '\u{a0}',
            '\u{ad}',
            '\u{34f}',
            '\u{61c}',
            '\u{115f}',
            '\u{180e}',
            '\u{2003}',
            '\u{2028}',
            '\u{2029}',
            '\u{2060}',
            '\u{2064}',
            '\u{206f}',
            '\u{2800}',
            '\u{3000}',
            '\u{3164}',
            '\u{fe0f}',
            '\u{feff}',
            '\u{ffa0}',
            '\u{fff9}',
            '\u{16fe4}',
            '\u{1d159}',
            '\u{e0001}',
            '\u{e007f}',
            '\u{e0100}',
            '\u{10ffff}',
        ]);
        let bidirectional = ('\u{202a}'..='\u{202e}').chain('\u{2066}'..='\u{2069}');
        for c in hidden.chain(bidirectional).chain('\u{200b}'..='\u{200f}') {
            let text = format!("a{c}b");
            let shown = escaped(&text);
            assert!(shown.starts_with("a\\") && shown.ends_with('b') && !shown.contains(c), "{c:?}: {shown}");
            assert_eq!(escaped(&shown), shown, "it is escaped once");
        }
        assert_eq!(escaped("\u{1b}[2J\n"), "\\u{1b}[2J\\n");
    }

    #[test]
    fn what_can_be_seen_stays_as_it_is() {
        for text in [
            "",
            "job 7",
            "C:\\dir",
            "it's \"quoted\"",
            "größer",
            "e\u{301}",
            "हिन्दी",
            "日本語",
            "🦀 ✓ →",
            "  at x",
        ] {
            assert_eq!(escaped(text), text);
        }
    }

    #[test]
    fn blanks_at_the_ends_of_a_word_are_written_out() {
        assert_eq!(escaped_word("a b"), "a b");
        assert_eq!(escaped_word(" a  "), "\\u{20}a\\u{20}\\u{20}");
        assert_eq!(escaped_word("  "), "\\u{20}\\u{20}");
        assert_eq!(escaped_word("\t"), "\\t");
    }
}
