//! The effective settings of each table, with the origin of each: for `sprat config show`.

use std::path::PathBuf;

use toml::de::DeValue;

/// Where a value stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The file.
    pub file: PathBuf,
    /// Counted from 1.
    pub line: usize,
}

/// A key and its value as it is written, or its default. A secret is `***`.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    /// The key.
    pub key: &'static str,
    /// Its value.
    pub value: toml::Value,
    /// Where it stands; `None`: it is the default.
    pub origin: Option<Origin>,
    /// This version does something with it.
    pub in_effect: bool,
}

/// A value as it is written.
pub(super) fn written(value: &DeValue<'_>) -> toml::Value {
    match value {
        DeValue::String(text) => toml::Value::String(text.to_string()),
        DeValue::Integer(number) => match number.as_str().parse::<i64>() {
            Ok(number) if value.as_integer().is_some_and(|n| n.radix() == 10) => number.into(),
            _ => toml::Value::String(number.to_string()),
        },
        DeValue::Boolean(flag) => (*flag).into(),
        DeValue::Float(number) => toml::Value::String(number.to_string()),
        DeValue::Datetime(time) => toml::Value::Datetime(*time),
        DeValue::Array(values) => {
            let values = values.iter().map(|value| written(value.get_ref()));
            toml::Value::Array(values.collect())
        }
        DeValue::Table(table) => {
            let entries = table.iter();
            let entries =
                entries.map(|(key, value)| (key.get_ref().to_string(), written(value.get_ref())));
            toml::Value::Table(entries.collect())
        }
    }
}
