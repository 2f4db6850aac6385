//! Typed commands and queries: an enum whose variants are the methods.

use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, EnumAccess, IntoDeserializer, VariantAccess, Visitor,
};
use serde::{Deserializer, forward_to_deserialize_any};

use crate::Refusal;

/// Reads the method and the body of a command or a query.
///
/// # Errors
///
/// Returns [`Refusal::UnknownMethod`] if no variant has the name `method`, and [`Refusal::Invalid`] if `body` does not
/// fit the variant. A unit variant accepts any body.
///
/// ```
/// use dim_guest::{Refusal, call};
/// use serde::Deserialize;
///
/// #[derive(Debug, Deserialize, PartialEq)]
/// #[serde(rename_all = "kebab-case")]
/// enum Command {
///     Forget { node: String },
///     ForgetAll,
/// }
///
/// let forget: Command = call::read("forget", r#"{"node":"n1"}"#)?;
/// assert_eq!(forget, Command::Forget { node: "n1".into() });
/// let all: Command = call::read("forget-all", "{}")?;
/// assert_eq!(all, Command::ForgetAll);
/// assert!(matches!(call::read::<Command>("remember", "{}"), Err(Refusal::UnknownMethod)));
/// assert!(matches!(call::read::<Command>("forget", "{}"), Err(Refusal::Invalid(_))));
/// # Ok::<(), Refusal>(())
/// ```
pub fn read<T: DeserializeOwned>(method: &str, body: &str) -> Result<T, Refusal> {
    T::deserialize(Call { method, body }).map_err(|error| match error {
        Error::UnknownMethod => Refusal::UnknownMethod,
        Error::Body(why) => Refusal::Invalid(why),
    })
}

/// A deserializer whose input is one enum: the method is the variant, the body is its content.
struct Call<'a> {
    method: &'a str,
    body: &'a str,
}

/// The error of a call that cannot be deserialized.
#[derive(Debug)]
enum Error {
    UnknownMethod,
    Body(String),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::UnknownMethod => f.write_str("unknown method"),
            Self::Body(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for Error {}

impl de::Error for Error {
    fn custom<T: std::fmt::Display>(why: T) -> Self {
        Self::Body(why.to_string())
    }

    fn unknown_variant(_: &str, _: &'static [&'static str]) -> Self {
        Self::UnknownMethod
    }
}

impl From<serde_json::Error> for Error {
    fn from(error: serde_json::Error) -> Self {
        Self::Body(error.to_string())
    }
}

impl<'de> Deserializer<'de> for Call<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_enum(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_enum(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

impl<'a, 'de> EnumAccess<'de> for Call<'a> {
    type Error = Error;
    type Variant = Body<'a>;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Body<'a>), Error> {
        let method: StrDeserializer<'_, Error> = self.method.into_deserializer();
        Ok((seed.deserialize(method)?, Body(self.body)))
    }
}

struct Body<'a>(&'a str);

impl Body<'_> {
    fn json(&self) -> Result<serde_json::Value, Error> {
        Ok(serde_json::from_str(self.0)?)
    }
}

impl<'de> VariantAccess<'de> for Body<'_> {
    type Error = Error;

    /// Ignores the body: a method without parameters accepts any body.
    fn unit_variant(self) -> Result<(), Error> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Error> {
        Ok(seed.deserialize(self.json()?)?)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Error> {
        Ok(self.json()?.deserialize_any(visitor)?)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        Ok(self.json()?.deserialize_any(visitor)?)
    }
}
