//! Fuzzes files that may be encrypted documents.

use dim_model::ident::IpnsName;
use dim_network::encrypted_documents::{DocumentKey, Encrypted};
use dim_topics::membership::encryption::Secret;

const FLEET: &str = "k51qzi5uqu5djmw2yvf8kk5cdjc1ddc00f4md56jwi6f79xzcay9j3gkdgdwu5";

fn secret() -> Secret {
    Secret::new([7; 32])
}

fn name() -> IpnsName {
    FLEET.parse().expect("an IPNS name")
}

fn key() -> DocumentKey {
    let group = "all".parse().expect("a group");
    DocumentKey { fleet: FLEET.to_owned(), group, epoch: [9; 16], secret: secret() }
}

/// Reads the file. It is decrypted only if it was encrypted with the secret, and parse errors contain nothing of it.
pub fn run(file: &[u8]) {
    let encrypted = match Encrypted::parse(file) {
        None => return,
        Some(Err(error)) => {
            let message = error.to_string();
            assert!(message.len() < 200 && message.is_ascii(), "{message}");
            return;
        }
        Some(Ok(encrypted)) => encrypted,
    };
    assert!(encrypted.decrypt(&[]).is_none(), "it was decrypted without a key");
    let wrong = encrypted.decrypt(&[Secret::new([8; 32])]).expect("there is a secret");
    assert!(wrong.is_err(), "it was decrypted with a wrong key");
    if let Some(Ok(document)) = encrypted.decrypt(&[secret()]) {
        let again = encrypted.key(secret()).encrypt(encrypted.name(), &document);
        let again = Encrypted::parse(&again).expect("an encrypted document").expect("a sound one");
        assert_eq!(again, encrypted, "nobody without the key made it");
    }
}

/// Returns encrypted documents, of which one is empty.
pub fn seeds() -> Vec<Vec<u8>> {
    [&br#"{"jobs":{}}"#[..], b""].map(|document| key().encrypt(&name(), document)).into()
}
