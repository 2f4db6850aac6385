//! STUB
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct Verbatim(Box<RawValue>);
impl Verbatim {
    pub fn get(&self) -> &str {
        self.0.get()
    }
}
impl<'de> Deserialize<'de> for Verbatim {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(d)?;
        let (mut depth, mut most, mut text, mut esc) = (0, 0, false, false);
        for c in raw.get().bytes() {
            if text {
                if esc {
                    esc = false
                } else if c == b'\\' {
                    esc = true
                } else if c == b'"' {
                    text = false
                }
            } else {
                match c {
                    b'"' => text = true,
                    b'[' | b'{' => {
                        depth += 1;
                        most = most.max(depth)
                    }
                    b']' | b'}' => depth -= 1,
                    _ => {}
                }
            }
        }
        if most > 64 {
            return Err(serde::de::Error::custom("too deep"));
        }
        Ok(Self(raw))
    }
}
