//! Owns topics of a Kubo daemon. It receives messages to publish and topics, and returns streams of messages, and
//! peers.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use dim_model::ident::{PeerName, Topic};
use futures::stream;
use http_body_util::BodyExt as _;
use multibase::Base;
use reqwest::{Body, Response};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::rpc::{Call, Rpc};
use crate::{BackendError, Incoming, Messages, Pubsub};

/// The maximum length of a line of a stream, in bytes: a message of 1 MiB in base64 with its JSON fields.
const MAX_LINE: usize = 2 << 20;

/// The time limit of a publish.
const PUBLISH: Duration = Duration::from_secs(10);

/// The text with which a daemon without pubsub refuses. A daemon that runs offline sends it too.
const DISABLED: &str = "experimental pubsub feature not enabled";

/// The advice that is added to this error for the operator.
const ENABLE: &str =
    "`ipfs config --json Pubsub.Enabled true`, and start the daemon again, not with --offline";

/// The topics of a daemon.
#[derive(Debug)]
pub struct Topics {
    rpc: Arc<Rpc>,
    /// Serializes publishes. Concurrent publishes on one daemon race for sequence numbers and lose messages.
    publishing: Mutex<()>,
}

impl Topics {
    pub fn new(rpc: Arc<Rpc>) -> Self {
        Self { rpc, publishing: Mutex::new(()) }
    }
}

/// The answer of a daemon with a list.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Strings {
    strings: Option<Vec<String>>,
}

impl Strings {
    fn all(self) -> Vec<String> {
        self.strings.unwrap_or_default()
    }
}

/// Encodes a topic or data as multibase base64url without padding, which the RPC requires.
fn encode(bytes: &[u8]) -> String {
    multibase::encode(Base::Base64Url, bytes)
}

#[async_trait]
impl Pubsub for Topics {
    async fn publish(&self, topic: &Topic, data: Bytes) -> Result<(), BackendError> {
        let _turn = self.publishing.lock().await;
        let call = Call::new("pubsub/pub").arg(encode(topic.as_str().as_bytes())).file(data).timeout(PUBLISH);
        self.rpc.bytes(call).await.map(drop).map_err(with_advice)
    }

    async fn subscribe(&self, topic: &Topic) -> Result<Messages, BackendError> {
        // The daemon sends the headers once the subscription is registered.
        let call = Call::new("pubsub/sub").arg(encode(topic.as_str().as_bytes()));
        Ok(messages(self.rpc.stream(call).await.map_err(with_advice)?))
    }

    async fn peers(&self, topic: &Topic) -> Result<Vec<PeerName>, BackendError> {
        let call = Call::new("pubsub/peers").arg(encode(topic.as_str().as_bytes()));
        let peers: Strings = self.rpc.json(call).await.map_err(with_advice)?;
        Ok(peers.all().iter().filter_map(|peer| peer.parse().ok()).collect())
    }

    async fn topics(&self) -> Result<Vec<Topic>, BackendError> {
        let topics: Strings = self.rpc.json(Call::new("pubsub/ls")).await.map_err(with_advice)?;
        let topic = |text: &String| String::from_utf8(multibase::decode(text).ok()?.1).ok()?.parse().ok();
        // A topic that cannot be parsed belongs to another program.
        Ok(topics.all().iter().filter_map(topic).collect())
    }
}

fn with_advice(error: BackendError) -> BackendError {
    match error {
        BackendError::Refused { call, message } if message.contains(DISABLED) => {
            BackendError::Refused { call, message: format!("{message}; {ENABLE}") }
        }
        other => other,
    }
}

/// Returns the messages of a stream of JSON lines.
fn messages(response: Response) -> Messages {
    let lines = Lines { body: http::Response::<Body>::from(response).into_body(), buffer: BytesMut::new() };
    Box::pin(stream::unfold(Some(lines), |lines| async {
        let mut lines = lines?;
        match lines.next().await {
            Ok(Some(line)) => match parse(&line) {
                Ok(message) => Some((Ok(message), Some(lines))),
                Err(error) => Some((Err(error), None)),
            },
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    }))
}

struct Lines {
    body: Body,
    buffer: BytesMut,
}

impl Lines {
    async fn next(&mut self) -> Result<Option<Bytes>, BackendError> {
        let mut looked_at = 0;
        loop {
            if let Some(end) = self.buffer[looked_at..].iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(looked_at + end + 1).freeze();
                if line.len() > 1 {
                    return Ok(Some(line));
                }
                looked_at = 0;
                continue;
            }
            looked_at = self.buffer.len();
            if self.buffer.len() > MAX_LINE {
                return Err(BackendError::TooLarge {
                    what: "a line of pubsub/sub".to_owned(),
                    limit: MAX_LINE,
                });
            }
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            let frame = frame.map_err(|error| BackendError::Unreachable {
                what: "pubsub/sub".to_owned(),
                why: error.to_string(),
            })?;
            if let Ok(data) = frame.into_data() {
                self.buffer.extend_from_slice(&data);
            }
        }
    }
}

fn parse(line: &[u8]) -> Result<Incoming, BackendError> {
    #[derive(Deserialize)]
    struct Message {
        from: String,
        data: String,
        seqno: String,
    }
    let unbelievable = |why: String| BackendError::Unbelievable { call: "pubsub/sub", why };
    let message: Message = serde_json::from_slice(line).map_err(|error| unbelievable(error.to_string()))?;
    let decode = |text: &str| match multibase::decode(text) {
        Ok((_, bytes)) => Ok(Bytes::from(bytes)),
        Err(error) => Err(unbelievable(error.to_string())),
    };
    Ok(Incoming {
        data: decode(&message.data)?,
        from: message.from.parse().map_err(|error| unbelievable(format!("{error}")))?,
        sequence: decode(&message.seqno)?,
    })
}
