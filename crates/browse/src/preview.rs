//! The beginning of a file, as text or as numbers. Nothing of it can steer the terminal.

use ratatui::text::Span;
use sprat_session::text;

use crate::answers::PREVIEW_BYTES;
use crate::question::At;
use crate::rows::Rows;

/// A tab ends at a multiple of this.
const TAB: usize = 8;
/// Bytes in a line of numbers.
const NUMBERS: usize = 16;

#[derive(Debug)]
pub(crate) struct Preview {
    pub(crate) at: At,
    /// The whole length of the file.
    pub(crate) bytes: u64,
    content: Vec<u8>,
    pub(crate) rows: Rows,
    /// The lines as they fit into so many columns.
    wrapped: (usize, Vec<String>),
}

impl Preview {
    pub(crate) fn new(at: At, bytes: u64, content: Vec<u8>) -> Self {
        Self {
            at,
            bytes,
            content,
            rows: Rows::default(),
            wrapped: (0, Vec::new()),
        }
    }

    /// What is shown of how much.
    pub(crate) fn extent(&self) -> String {
        let all = text::bytes(self.bytes);
        let what = match self.is_text() {
            true => "text",
            false => "no text, shown as numbers",
        };
        match self.content.len() as u64 >= PREVIEW_BYTES && self.bytes > PREVIEW_BYTES {
            true => format!("the first {} of {all}; {what}", text::bytes(PREVIEW_BYTES)),
            false => format!("{all}; {what}"),
        }
    }

    fn is_text(&self) -> bool {
        !self.content.contains(&0)
    }

    /// How many lines there are; at the width of the last [`Self::lines`].
    pub(crate) fn count(&self) -> usize {
        self.wrapped.1.len()
    }

    /// All lines, none wider than `columns`, and harmless.
    pub(crate) fn lines(&mut self, columns: usize) -> &[String] {
        if self.wrapped.0 != columns {
            let lines = match self.is_text() {
                true => self.text_lines(columns.max(1)),
                false => self.number_lines(),
            };
            self.wrapped = (columns, lines);
        }
        &self.wrapped.1
    }

    fn text_lines(&self, columns: usize) -> Vec<String> {
        let content = String::from_utf8_lossy(&self.content);
        let mut lines = Vec::new();
        for line in content.lines() {
            wrap(&without_tabs(line), columns, &mut lines);
        }
        lines
    }

    fn number_lines(&self) -> Vec<String> {
        let lines = self.content.chunks(NUMBERS).enumerate();
        lines
            .map(|(number, bytes)| {
                let numbers: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                let letters = bytes.iter().map(|byte| match byte {
                    b' '..=b'~' => char::from(*byte),
                    _ => '.',
                });
                let letters: String = letters.collect();
                let width = NUMBERS * 3 - 1;
                format!(
                    "{:08x}  {:width$}  {letters}",
                    number * NUMBERS,
                    numbers.join(" ")
                )
            })
            .collect()
    }
}

fn without_tabs(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut column = 0;
    for c in line.chars() {
        if c == '\t' {
            let blanks = TAB - column % TAB;
            out.extend(std::iter::repeat_n(' ', blanks));
            column += blanks;
        } else {
            out.push(c);
            column += 1;
        }
    }
    out
}

/// Makes a line harmless, and breaks it where it is too wide.
fn wrap(line: &str, columns: usize, lines: &mut Vec<String>) {
    let mut part = String::new();
    let mut width = 0;
    for c in text::harmless_within(line, usize::MAX).chars() {
        let mut bytes = [0; 4];
        let its = Span::raw(&*c.encode_utf8(&mut bytes)).width();
        if width + its > columns && !part.is_empty() {
            lines.push(std::mem::take(&mut part));
            width = 0;
        }
        part.push(c);
        width += its;
    }
    lines.push(part);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(content: &[u8], columns: usize) -> Vec<String> {
        let at = At::top("home", "2026");
        let mut preview = Preview::new(at, content.len() as u64, content.to_vec());
        preview.lines(columns).to_vec()
    }

    #[test]
    fn text_is_wrapped_and_harmless() {
        assert_eq!(
            lines("one\n\tb\u{1b}[2J\u{202e}\r\n\nabcdef".as_bytes(), 20),
            ["one", "        b\\u{1b}[2J\\u", "{202e}", "", "abcdef"]
        );
        assert_eq!(lines(b"abcdef", 4), ["abcd", "ef"]);
        assert_eq!(lines("写真写".as_bytes(), 4), ["写真", "写"]);
        assert_eq!(lines(b"bad \xff\xfe", 80), ["bad \u{fffd}\u{fffd}"]);
        assert_eq!(lines(b"", 80), [""; 0]);
        for columns in 1..10 {
            let all = lines(b"\x9b31m \x1b]0;title\x07 \x08\x7f", columns).concat();
            assert!(!all.chars().any(char::is_control), "{all:?}");
        }
    }

    #[test]
    fn what_is_no_text_is_shown_as_numbers() {
        assert_eq!(
            lines(b"\x7fELF\x00\x01 and more \x1b[m", 80),
            [
                "00000000  7f 45 4c 46 00 01 20 61 6e 64 20 6d 6f 72 65 20  .ELF.. and more ",
                "00000010  1b 5b 6d                                         .[m",
            ]
        );
    }
}
