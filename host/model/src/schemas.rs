//! Owns the OpenAPI schemas of the identifiers and times.

use utoipa::openapi::schema::SchemaType;
use utoipa::openapi::{KnownFormat, ObjectBuilder, RefOr, Schema, SchemaFormat, Type};
use utoipa::{PartialSchema, ToSchema};

use crate::ident::{ContentPath, Digest, IpnsName, KeyName, MAX_TOPIC, PluginName, Topic};
use crate::time::{Since, Timestamp};

macro_rules! text_schemas {
    ($($name:ident: $description:literal $(, $limit:ident $value:expr)*;)*) => {$(
        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                let text = ObjectBuilder::new().schema_type(SchemaType::Type(Type::String));
                text.description(Some($description))$(.$limit(Some($value)))*.into()
            }
        }

        impl ToSchema for $name {}
    )*};
}

text_schemas! {
    Topic: "A pubsub topic: 1 to 512 bytes of UTF-8 without control characters",
        min_length 1, max_length MAX_TOPIC;
    PluginName: "The name of a plugin", pattern "^[a-z][a-z0-9-]{0,63}$";
    KeyName: "The operator's name of an IPNS key, as in `ipfs key gen`; not `self`",
        pattern "^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$";
    IpnsName: "An IPNS name in canonical form: a CIDv1 with codec `libp2p-key` in base36", pattern "^k[0-9a-z]+$";
    ContentPath: "The target of a name: `/ipfs/CID` or `/ipns/NAME`, and a path below it", pattern "^/ip[fn]s/.";
    Digest: "The SHA-256 of a component file, in hexadecimal", pattern "^[0-9a-f]{64}$";
    Since: "A time in RFC 3339, a duration before now as in `10m`, `2h` or `1d`, or seconds since 1970";
    Timestamp: "A time in RFC 3339, in UTC", format SchemaFormat::KnownFormat(KnownFormat::DateTime);
}
