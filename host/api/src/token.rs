//! Owns the token of callers over TCP. It makes or reads the token, and refuses requests without it.

use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use rand::Rng as _;
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use crate::ApiError;

/// The minimum length of a token that an operator chooses, in bytes.
const LEAST: usize = 16;

/// The token of callers. Only its digest is in memory.
#[derive(Clone)]
pub struct Token(Arc<[u8; 32]>);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

impl Token {
    /// Makes the token that the operator has chosen. Returns an error if it is too short or has other characters than
    /// visible ASCII.
    pub fn new(secret: &SecretString) -> io::Result<Self> {
        let bytes = secret.expose_secret().as_bytes();
        if bytes.len() < LEAST || !bytes.iter().all(u8::is_ascii_graphic) {
            let why = format!("the API's token needs {LEAST} visible ASCII characters or more");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        Ok(Self::of(bytes))
    }

    /// Returns the token of a state directory. It is made if there is none; only the owner can read its file.
    pub fn in_state_dir(dir: &Path) -> io::Result<Self> {
        let file = dir.join(dim_client::TOKEN);
        match std::fs::read_to_string(&file) {
            // An empty file is the rest of a failed attempt and is replaced.
            Ok(text) if !text.trim_end().is_empty() => {
                return Self::new(&SecretString::from(text.trim_end()));
            }
            Ok(_) => std::fs::remove_file(&file)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let mut bytes = [0; 32];
        rand::rng().fill_bytes(&mut bytes);
        let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let half = dir.join(format!("{}.half", dim_client::TOKEN));
        let mut made =
            std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&half)?;
        made.write_all(format!("{text}\n").as_bytes())?;
        made.sync_all()?;
        std::fs::rename(&half, &file)?;
        Ok(Self::of(text.as_bytes()))
    }

    fn of(token: &[u8]) -> Self {
        Self(Arc::new(Sha256::digest(token).into()))
    }

    /// Compares a token in constant time.
    fn is(&self, shown: &[u8]) -> bool {
        let shown: [u8; 32] = Sha256::digest(shown).into();
        self.0.ct_eq(&shown).into()
    }
}

/// Requires the token as `Authorization: Bearer TOKEN`, <https://www.rfc-editor.org/rfc/rfc6750>.
pub async fn require(State(token): State<Token>, request: Request, next: Next) -> Result<Response, ApiError> {
    let shown = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let shown = shown.and_then(|value| value.split_once(' '));
    match shown {
        Some((scheme, shown))
            if scheme.eq_ignore_ascii_case("bearer") && token.is(shown.trim().as_bytes()) =>
        {
            Ok(next.run(request).await)
        }
        _ => Err(ApiError::unauthorized()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_of_a_state_directory_stays_and_a_short_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = Token::in_state_dir(dir.path()).unwrap();
        let text = std::fs::read_to_string(dir.path().join(dim_client::TOKEN)).unwrap();
        assert!(first.is(text.trim_end().as_bytes()) && !first.is(b"") && !first.is(text.as_bytes()));
        assert!(Token::in_state_dir(dir.path()).unwrap().is(text.trim_end().as_bytes()));
        assert!(Token::new(&SecretString::from("short")).is_err());
        assert!(Token::new(&SecretString::from("white space is none of it")).is_err());
        assert!(!format!("{first:?}").contains(text.trim_end()));
    }
}
