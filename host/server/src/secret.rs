//! Owns the secrets of the config. It receives the place of a secret, an environment variable or a file, and returns
//! a value that no output shows.

use std::fmt;
use std::path::PathBuf;

use secrecy::SecretString;
use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;

/// The maximum length of a secret, in bytes.
const MAX_SECRET: usize = 64 << 10;

/// The place of a secret, as in `{ env: NAME }` or `{ file: PATH }`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Secret {
    /// In an environment variable.
    Env(String),
    /// In a file; white space at its end is removed.
    File(PathBuf),
}

/// An error that prevents the use of a secret.
#[derive(Debug, Error)]
pub enum SecretError {
    /// The variable is missing or empty.
    #[error("the environment has no variable {0} with a secret")]
    NoVariable(String),
    /// The file cannot be read.
    #[error("cannot read the secret in {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// The file is empty or too long.
    #[error("the secret in {0} is empty or too long")]
    Length(PathBuf),
}

impl Secret {
    /// Reads the secret.
    pub fn read(&self) -> Result<SecretString, SecretError> {
        match self {
            Self::Env(name) => {
                let value = std::env::var(name).ok().filter(|value| !value.is_empty());
                value.map(SecretString::from).ok_or_else(|| SecretError::NoVariable(name.clone()))
            }
            Self::File(path) => {
                let unread = |source| SecretError::File { path: path.clone(), source };
                let text = std::fs::read_to_string(path).map_err(unread)?;
                let secret = text.trim_end();
                if secret.is_empty() || secret.len() > MAX_SECRET {
                    return Err(SecretError::Length(path.clone()));
                }
                Ok(SecretString::from(secret))
            }
        }
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, deny_unknown_fields)]
        enum Form {
            Env { env: String },
            File { file: PathBuf },
            // The value might be a secret, so the error does not repeat it.
            Other(serde::de::IgnoredAny),
        }
        match Form::deserialize(deserializer)? {
            Form::Env { env } => Ok(Self::Env(env)),
            Form::File { file } => Ok(Self::File(file)),
            Form::Other(_) => Err(serde::de::Error::custom(
                "a secret must not be in the config itself: give its place, { env: NAME } or { file: PATH }",
            )),
        }
    }
}

/// The value of a header: a plain text or a secret.
#[derive(Clone, Serialize, Deserialize)]
#[serde(from = "HeaderForm", untagged)]
pub enum HeaderText {
    /// A plain text.
    Plain(String),
    /// A secret.
    Secret(Secret),
}

/// The debug form hides plain texts too, because they may be secrets.
impl fmt::Debug for HeaderText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(_) => f.write_str("Plain"),
            Self::Secret(secret) => secret.fmt(f),
        }
    }
}

/// A header as it is written in the file, where YAML reads `1` as a number and `true` as a boolean.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text, { env: NAME } or { file: PATH }")]
enum HeaderForm {
    Text(String),
    Whole(i64),
    Switch(bool),
    Secret(Secret),
}

impl From<HeaderForm> for HeaderText {
    fn from(form: HeaderForm) -> Self {
        match form {
            HeaderForm::Text(text) => Self::Plain(text),
            HeaderForm::Whole(number) => Self::Plain(number.to_string()),
            HeaderForm::Switch(value) => Self::Plain(value.to_string()),
            HeaderForm::Secret(secret) => Self::Secret(secret),
        }
    }
}

impl HeaderText {
    /// Reads the value.
    pub fn read(&self) -> Result<SecretString, SecretError> {
        match self {
            Self::Plain(text) => Ok(SecretString::from(text.as_str())),
            Self::Secret(secret) => secret.read(),
        }
    }
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;

    fn parse(text: &str) -> Result<Secret, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_secret_is_read_from_where_it_is_and_never_stands_in_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "hush\n").unwrap();
        let secret = parse(&format!(r#"{{"file": {path:?}}}"#)).unwrap();
        let read = secret.read().unwrap();
        assert_eq!(read.expose_secret(), "hush");
        assert!(!format!("{read:?} {secret:?}").contains("hush"));
        std::fs::write(&path, "\n").unwrap();
        assert!(matches!(secret.read(), Err(SecretError::Length(_))));
        assert!(matches!(
            parse(r#"{"env": "DIM_NO_SUCH_VARIABLE"}"#).unwrap().read(),
            Err(SecretError::NoVariable(_))
        ));
        for inline in [r#""hush""#, r#"{"value": "hush"}"#, r#"{"env": "A", "file": "hush"}"#] {
            let why = parse(inline).unwrap_err();
            assert!(why.contains("{ env: NAME }") && !why.contains("hush"), "{why}");
        }
    }
}
