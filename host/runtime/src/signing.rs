//! Owns the signatures of components: it signs components, verifies signatures and finds the signer.
//!
//! A signature is an Ed25519 signature in the first custom section, `signature`, over all sections after it, in
//! the format of the WebAssembly module-signatures proposal,
//! <https://github.com/WebAssembly/tool-conventions/blob/main/Signatures.md>. The key identifier of signatures
//! made here is the public key itself, which identifies the signer. Other signatures are verified with the
//! known keys.

use std::io;

use dim_model::signer::Signer;
use thiserror::Error;
use wasmparser::{Parser, Payload};
use wasmsign2::{KeyPair, Module, PublicKey, PublicKeySet, SecretKey, SignatureData, WSError};

/// The custom section of a signature.
const SECTION: &str = "signature";

/// Most signatures of a component.
const MAX_SIGNATURES: usize = 8;

/// Longest signature section, in bytes.
const MAX_SECTION: usize = 64 << 10;

/// The reason why a component cannot be signed, or its signature is invalid.
#[derive(Debug, Error)]
pub enum SigningError {
    /// The text or the file contains no key.
    #[error("it is no Ed25519 key in PEM, or its line of base64")]
    NoKey,
    /// The input is not a component.
    #[error("it cannot be signed: {0}")]
    Unsigned(#[source] WSError),
    /// The section is damaged, or has an unsupported kind.
    #[error("its signature cannot be read: {0}")]
    Unreadable(String),
    /// The signature does not fit these bytes, or its key is not known.
    #[error(
        "its signature fits none of the keys that are known: it was changed after it was signed, or someone else has signed it"
    )]
    Invalid,
}

/// A secret key for signatures.
pub struct SigningKey {
    secret: SecretKey,
    public: PublicKey,
}

impl SigningKey {
    /// Generates a new key.
    pub fn generate() -> Self {
        let KeyPair { pk: public, sk: secret } = KeyPair::generate();
        Self { secret, public }
    }

    /// Reads a PEM file with PKCS #8, as OpenSSL writes it.
    pub fn from_pem(text: &str) -> Result<Self, SigningError> {
        let secret = SecretKey::from_pem(text).map_err(|_| SigningError::NoKey)?;
        let public = PublicKey { pk: secret.sk.public_key(), key_id: None };
        Ok(Self { secret, public })
    }

    /// Encodes the key as a PEM file.
    pub fn to_pem(&self) -> String {
        self.secret.to_pem()
    }

    /// The signer that the key belongs to.
    pub fn signer(&self) -> Signer {
        Signer::from_key(*self.public.pk)
    }

    /// Signs a component; replaces an existing signature.
    pub fn sign(&self, component: &[u8]) -> Result<Vec<u8>, SigningError> {
        let module = Module::deserialize(&mut io::Cursor::new(component)).map_err(SigningError::Unsigned)?;
        let signed =
            self.secret.sign(module, Some(&self.public.to_bytes())).map_err(SigningError::Unsigned)?;
        let mut bytes = Vec::with_capacity(component.len() + 256);
        signed.serialize(&mut bytes).map_err(SigningError::Unsigned)?;
        Ok(bytes)
    }
}

/// Finds the signer of a component, if it is signed: one of `known`, or the key that the signature names.
pub fn signer_of<'a>(
    component: &[u8],
    known: impl IntoIterator<Item = &'a Signer>,
) -> Result<Option<Signer>, SigningError> {
    let Some(section) = section(component) else { return Ok(None) };
    let unreadable = |why: &str| SigningError::Unreadable(why.to_owned());
    if section.len() > MAX_SECTION {
        return Err(unreadable("it is too long"));
    }
    let data = SignatureData::deserialize(section).map_err(|error| unreadable(&error.to_string()))?;
    if data.signed_hashes_set.iter().any(|set| set.hashes.len() != 1) {
        // An attacker who truncates a component could keep the signature of a part.
        return Err(unreadable("it signs parts of a component instead of the whole"));
    }
    let signatures = data.signed_hashes_set.iter().map(|set| set.signatures.len()).sum::<usize>();
    if signatures > MAX_SIGNATURES {
        return Err(unreadable("there are too many"));
    }
    let known: Vec<PublicKey> =
        known.into_iter().filter_map(|signer| PublicKey::from_pem(&signer.to_pem()).ok()).collect();
    let named = data.signed_hashes_set.iter().flat_map(|set| &set.signatures);
    let named = named.filter_map(|signature| PublicKey::from_bytes(signature.key_id.as_deref()?).ok());
    let candidates: Vec<PublicKey> = known.into_iter().chain(named).collect();
    let set = PublicKeySet::new(candidates.iter().cloned().collect());
    let valid = set.verify(&mut io::Cursor::new(component), None).map_err(|_| SigningError::Invalid)?;
    let first = candidates.iter().find(|candidate| valid.contains(candidate));
    first.map(|signer| Some(Signer::from_key(*signer.pk))).ok_or(SigningError::Invalid)
}

/// The signature section, if the component begins with one.
fn section(component: &[u8]) -> Option<&[u8]> {
    let mut payloads = Parser::new(0).parse_all(component);
    let Some(Ok(Payload::Version { .. })) = payloads.next() else { return None };
    match payloads.next() {
        Some(Ok(Payload::CustomSection(section))) if section.name() == SECTION => Some(section.data()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An empty component with a custom section.
    fn component() -> Vec<u8> {
        let mut bytes = b"\0asm\x0d\0\x01\0".to_vec();
        bytes.extend(b"\x00\x05\x01xabc");
        bytes
    }

    #[test]
    fn who_has_signed_is_known_by_the_signature_alone_and_any_change_shows() {
        let (key, other) = (SigningKey::generate(), SigningKey::generate());
        let none: [&Signer; 0] = [];
        assert_eq!(signer_of(&component(), none).unwrap(), None);
        let signed = key.sign(&component()).unwrap();
        assert_eq!(signer_of(&signed, none).unwrap(), Some(key.signer()));
        assert_eq!(signer_of(&signed, [&other.signer()]).unwrap(), Some(key.signer()));
        // After a second signature only the last one exists.
        let again = other.sign(&signed).unwrap();
        assert_eq!(signer_of(&again, none).unwrap(), Some(other.signer()));
        assert_eq!(again.len(), signed.len());
        for at in signed.len() - 4..signed.len() {
            let mut changed = signed.clone();
            changed[at] ^= 1;
            assert!(matches!(signer_of(&changed, none), Err(SigningError::Invalid)), "{at}");
        }
        let longer = [&signed[..], b"\x00\x02\x01y"].concat();
        assert!(matches!(signer_of(&longer, none), Err(SigningError::Invalid)));
    }

    #[test]
    fn keys_are_read_in_pem_and_as_a_line() {
        let key = SigningKey::generate();
        let signer = key.signer();
        assert_eq!(signer.to_pem().parse::<Signer>().unwrap(), signer);
        assert_eq!(signer.to_string().parse::<Signer>().unwrap(), signer);
        assert_eq!(SigningKey::from_pem(&key.to_pem()).unwrap().signer(), signer);
        assert!("ssh-ed25519 AAAA".parse::<Signer>().is_err());
        assert!(SigningKey::from_pem(&signer.to_pem()).is_err());
        // An example as OpenSSL writes it (`openssl genpkey -algorithm ed25519`), from RFC 8410.
        let example = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n-----END PRIVATE KEY-----\n";
        let public = "MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=";
        assert_eq!(SigningKey::from_pem(example).unwrap().signer(), public.parse().unwrap());
    }

    #[test]
    fn a_signature_that_is_none_is_an_error_and_no_signature() {
        let none: [&Signer; 0] = [];
        for data in [&b""[..], b"\x01", &[0xff; 70], &vec![0; MAX_SECTION + 1]] {
            let mut bytes = b"\0asm\x0d\0\x01\0\x00".to_vec();
            let mut length = data.len() + 1 + SECTION.len();
            while length > 0x7f {
                bytes.push(u8::try_from(length & 0x7f).unwrap() | 0x80);
                length >>= 7;
            }
            bytes.push(u8::try_from(length).unwrap());
            bytes.push(9);
            bytes.extend(SECTION.as_bytes());
            bytes.extend(data);
            assert!(signer_of(&bytes, none).is_err(), "{} bytes", data.len());
        }
    }
}
