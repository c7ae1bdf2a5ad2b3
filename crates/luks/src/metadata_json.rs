//! Parses the text of the metadata as strict JSON.
//!
//! libcryptsetup's parser (json-c) is less strict: of two equal names it uses the last one, and it cuts
//! names at NUL. Both are errors here, so that the two parsers can't understand a text differently.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value};

/// Cuts the JSON text out of its area and parses it. The error says what is wrong.
///
/// This checks only the form, so an error is a fault of this copy.
/// [`Metadata::read`](crate::metadata::Metadata::read) checks the content.
pub(crate) fn parse_area(area: &[u8]) -> Result<Value, String> {
    let end = area
        .iter()
        .position(|&byte| byte == 0)
        .ok_or("metadata without an end")?;
    if area[end..].iter().any(|&byte| byte != 0) {
        return Err("bytes behind the end of the metadata".to_owned());
    }
    let text = str::from_utf8(&area[..end]).map_err(|_| "metadata are not UTF-8".to_owned())?;
    if !text.starts_with('{') {
        return Err("metadata are not a JSON object".to_owned());
    }
    serde_json::from_str::<Strict>(text)
        .map(|strict| strict.0)
        // Only the position: serde's message may quote the input.
        .map_err(|error| format!("metadata are not strict JSON (column {})", error.column()))
}

/// JSON in which no object has two equal names, and no name contains NUL.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Strict;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Strict, E> {
        Ok(Strict(Value::Bool(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Strict, E> {
        Ok(Strict(Value::Number(value.into())))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Strict, E> {
        Ok(Strict(Value::Number(value.into())))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Strict, E> {
        Number::from_f64(value)
            .map(|number| Strict(Value::Number(number)))
            .ok_or_else(|| E::custom("not a number"))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Strict, E> {
        if value.contains('\0') {
            return Err(E::custom("NUL in a text"));
        }
        Ok(Strict(Value::String(value.to_owned())))
    }

    fn visit_unit<E>(self) -> Result<Strict, E> {
        Ok(Strict(Value::Null))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Strict, A::Error> {
        let mut list = Vec::new();
        while let Some(Strict(value)) = access.next_element()? {
            list.push(value);
        }
        Ok(Strict(Value::Array(list)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Strict, A::Error> {
        let mut map = Map::new();
        while let Some(name) = access.next_key::<String>()? {
            if name.contains('\0') {
                return Err(de::Error::custom("NUL in a name"));
            }
            let Strict(value) = access.next_value()?;
            if map.insert(name, value).is_some() {
                return Err(de::Error::custom("a name twice"));
            }
        }
        Ok(Strict(Value::Object(map)))
    }
}
