//! Masks possible secrets in a URL before it is shown.

use reqwest::Url;

/// The text that replaces a secret.
const MASK: &str = "***";

/// Masks the user information, query and fragment of a URL, because they can contain passwords and tokens.
///
/// A text that looks like a URL but is not valid is masked except for the scheme. Any other text is returned unchanged.
///
/// ```
/// assert_eq!(dim_client::masked("http://ada:pw@host:5001/x?token=t"), "http://***@host:5001/x?***");
/// assert_eq!(dim_client::masked("/ip4/127.0.0.1/tcp/5001"), "/ip4/127.0.0.1/tcp/5001");
/// ```
pub fn masked(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://").filter(|(scheme, _)| is_scheme(scheme)) else {
        return text.to_owned();
    };
    if Url::parse(text).is_err() {
        return format!("{scheme}://{MASK}");
    }
    let (rest, hidden) = rest.split_at(rest.find(['?', '#']).unwrap_or(rest.len()));
    let (authority, path) = rest.split_at(rest.find(['/', '\\']).unwrap_or(rest.len()));
    let authority = match authority.rsplit_once('@') {
        Some((_, host)) => format!("{MASK}@{host}"),
        None => authority.to_owned(),
    };
    let query = hidden.chars().next().map(|mark| format!("{mark}{MASK}")).unwrap_or_default();
    format!("{scheme}://{authority}{path}{query}")
}

fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_a_secret_in_a_url_is_masked_and_other_texts_are_left_alone() {
        for (text, shown) in [
            ("http://ada:hush@127.0.0.1:5001", "http://***@127.0.0.1:5001"),
            ("http://hush@kubo/api/v0", "http://***@kubo/api/v0"),
            ("https://a:h@ush@host/@scope/p.wasm", "https://***@host/@scope/p.wasm"),
            ("https://host/p.wasm?X-Amz-Signature=hush", "https://host/p.wasm?***"),
            ("https://host/p.wasm#hush", "https://host/p.wasm#***"),
            ("https://host?hush", "https://host?***"),
            ("http://ada:hu/sh@host", "http://***"),
            ("http://ada:hush@", "http://***"),
            ("https://host/p.wasm", "https://host/p.wasm"),
            ("/ipns/k51", "/ipns/k51"),
            ("./a?b@c.wasm", "./a?b@c.wasm"),
            ("unix:/run/dim.sock", "unix:/run/dim.sock"),
            ("", ""),
        ] {
            assert_eq!(masked(text), shown, "{text}");
            assert_eq!(masked(&masked(text)), shown, "{text} twice");
        }
    }
}
