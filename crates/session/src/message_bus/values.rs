//! Values of any signature, read one after the other.

use std::io;

use super::{Reader, unknown};

/// How deep values may lie in each other.
const DEPTH_MAX: usize = 16;

/// A value of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A string, an object path or a signature.
    Text(String),
    /// A number of 32 bits, signed ones as their bits; a byte; or a boolean (0 or 1).
    Number(u32),
}

impl Reader<'_> {
    /// Reads the values of a signature.
    pub(super) fn values(
        &mut self,
        signature: &str,
        into: &mut Vec<Value>,
        depth: usize,
    ) -> io::Result<()> {
        if depth > DEPTH_MAX {
            return Err(unknown());
        }
        let mut rest = signature;
        while !rest.is_empty() {
            let (one, others) = rest.split_at(type_len(rest)?);
            self.value(one, into, depth)?;
            rest = others;
        }
        Ok(())
    }

    /// Reads a value of one complete type.
    fn value(&mut self, kind: &str, into: &mut Vec<Value>, depth: usize) -> io::Result<()> {
        match kind.as_bytes() {
            [b's' | b'o'] => into.push(Value::Text(self.text()?)),
            [b'g'] => into.push(Value::Text(self.signature()?)),
            [b'u' | b'i' | b'b'] => into.push(Value::Number(self.number()?)),
            [b'y'] => into.push(Value::Number(self.byte()?.into())),
            [b'v'] => {
                let kind = self.signature()?;
                self.values(&kind, into, depth + 1)?;
            }
            [b'(' | b'{', _, .., _] => {
                self.align(8);
                self.values(&kind[1..kind.len() - 1], into, depth + 1)?;
            }
            [b'a', item, ..] => {
                let len = usize::try_from(self.number()?).map_err(|_| unknown())?;
                self.align(match item {
                    b'y' | b'g' | b'v' => 1,
                    b'(' | b'{' => 8,
                    _ => 4,
                });
                let end = self.at.checked_add(len).ok_or_else(unknown)?;
                while self.at < end {
                    self.values(&kind[1..], into, depth + 1)?;
                }
            }
            _ => return Err(unknown()),
        }
        Ok(())
    }
}

/// The length of the first complete type of a signature.
fn type_len(signature: &str) -> io::Result<usize> {
    let bytes = signature.as_bytes();
    // The parts of a signature are bytes.
    if !signature.is_ascii() {
        return Err(unknown());
    }
    let arrays = bytes.iter().take_while(|byte| **byte == b'a').count();
    let mut depth = 0_usize;
    for (at, byte) in bytes.iter().enumerate().skip(arrays) {
        match byte {
            b'(' | b'{' => depth += 1,
            b')' | b'}' => depth = depth.checked_sub(1).ok_or_else(unknown)?,
            _ => {}
        }
        if depth == 0 {
            return Ok(at + 1);
        }
    }
    Err(unknown())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message_bus::{Message, Values};

    #[test]
    fn nested_values_read_back_and_torn_ones_are_refused() {
        let mut values = Values::default();
        values.array(8, [("one", 1), ("two", 2)], |values, (text, number)| {
            values.align(8);
            values.text(text);
            values.number(number);
        });
        values.signature("b");
        values.number(1);
        values.array(8, [0; 0], Values::number);
        values.text("end");
        let message = Message {
            signature: "a(su)va{sv}s".to_owned(),
            body: values.0,
            ..Message::default()
        };
        let text = |text: &str| Value::Text(text.to_owned());
        let read = [
            text("one"),
            Value::Number(1),
            text("two"),
            Value::Number(2),
            Value::Number(1),
            text("end"),
        ];
        assert_eq!(message.values().unwrap(), read);
        for end in 0..message.body.len() {
            let torn = Message {
                signature: message.signature.clone(),
                body: message.body[..end].to_vec(),
                ..Message::default()
            };
            assert!(torn.values().is_err(), "{end}");
        }
        let deep = format!("{}s{}", "(".repeat(40), ")".repeat(40));
        for wrong in ["a", "(s", "s)", "x", "é", "()", "a()", "a{", deep.as_str()] {
            let message = Message {
                signature: wrong.to_owned(),
                body: vec![1; 64],
                ..Message::default()
            };
            assert!(message.values().is_err(), "{wrong}");
        }
    }
}
