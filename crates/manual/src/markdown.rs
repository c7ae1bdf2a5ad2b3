//! Markdown, as far as `docs/config.md` and `docs/agent.md` use it, as the source of a man page.

use std::fmt::Write as _;

use clap_mangen::roff::{Inline, Roff, bold, italic, roman};
use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

/// The sections of the page. The first heading, its title, is left out.
pub fn to_man(markdown: &str) -> String {
    let mut page = Page::default();
    let options = Options::ENABLE_TABLES;
    for event in Parser::new_ext(markdown, options) {
        page.add(event);
    }
    page.roff.to_roff()
}

/// What was read so far.
#[derive(Default)]
struct Page {
    roff: Roff,
    /// Of the paragraph, heading or cell that is being read.
    inlines: Vec<Inline>,
    /// The text of a code block.
    code: Option<String>,
    is_bold: bool,
    /// The headings of the table, and the cells of its row.
    headings: Vec<String>,
    cells: Vec<Vec<Inline>>,
    /// A list item has no `.PP` before its first paragraph.
    in_item: bool,
}

impl Page {
    fn add(&mut self, event: Event<'_>) {
        match event {
            Event::Start(tag) => self.start(&tag),
            Event::End(tag) => self.end(tag),
            Event::Text(text) => match &mut self.code {
                Some(code) => code.push_str(&text),
                None if self.is_bold => self.inlines.push(bold(text.to_string())),
                None => self.inlines.push(roman(text.to_string())),
            },
            Event::Code(text) => self.inlines.push(bold(text.to_string())),
            Event::SoftBreak | Event::HardBreak => self.inlines.push(roman(" ")),
            _ => {}
        }
    }

    fn start(&mut self, tag: &Tag<'_>) {
        match tag {
            Tag::Strong => self.is_bold = true,
            Tag::CodeBlock(CodeBlockKind::Fenced(_) | CodeBlockKind::Indented) => {
                self.code = Some(String::new());
            }
            Tag::Item => {
                self.roff.control("IP", ["\\(bu", "2"]);
                self.in_item = true;
            }
            _ => {}
        }
    }

    fn end(&mut self, tag: TagEnd) {
        match tag {
            TagEnd::Heading(level) => self.heading(level as usize),
            TagEnd::Strong => self.is_bold = false,
            TagEnd::Paragraph => {
                if !self.in_item {
                    self.roff.control("PP", []);
                }
                self.text();
            }
            TagEnd::Item => {
                self.text();
                self.in_item = false;
            }
            TagEnd::CodeBlock => {
                let code = self.code.take().unwrap_or_default();
                self.roff.control("PP", []);
                self.roff.control("EX", []);
                for line in code.lines() {
                    self.roff.text([roman(line)]);
                }
                self.roff.control("EE", []);
            }
            TagEnd::TableCell => self.cells.push(std::mem::take(&mut self.inlines)),
            TagEnd::TableHead => {
                let cells = std::mem::take(&mut self.cells);
                self.headings = cells.iter().map(|cell| plain(cell)).collect();
            }
            TagEnd::TableRow => self.row(),
            TagEnd::Table => {
                self.roff.control("PP", []);
            }
            _ => {}
        }
    }

    fn heading(&mut self, level: usize) {
        let text = plain(&std::mem::take(&mut self.inlines));
        match level {
            1 => {
                self.roff.control("SH", ["DESCRIPTION"]);
            }
            2 => {
                let name = text.trim_matches(['[', ']']).to_uppercase();
                self.roff.control("SH", [name.as_str()]);
            }
            _ => {
                self.roff.control("SS", [text.as_str()]);
            }
        }
    }

    fn text(&mut self) {
        let inlines = std::mem::take(&mut self.inlines);
        if !inlines.is_empty() {
            self.roff.text(inlines);
        }
    }

    /// A row: the first cell, and below it the others. Columns between the first and the last are short
    /// facts with their heading.
    fn row(&mut self) {
        let mut cells = std::mem::take(&mut self.cells).into_iter();
        let Some(first) = cells.next() else { return };
        self.roff.control("TP", []);
        self.roff.text(first);
        let mut body: Vec<Inline> = Vec::new();
        let last = self.headings.len().saturating_sub(1);
        for (cell, (number, heading)) in cells.zip(self.headings.iter().enumerate().skip(1)) {
            if cell.is_empty() {
                continue;
            }
            if number < last {
                let mut heading = heading.clone();
                let _ = write!(heading, ": ");
                body.push(italic(heading));
                body.extend(cell);
                body.push(roman(". "));
            } else {
                body.extend(cell);
            }
        }
        self.roff.text(body);
    }
}

fn plain(inlines: &[Inline]) -> String {
    let text = |inline: &Inline| match inline {
        Inline::Roman(text) | Inline::Italic(text) | Inline::Bold(text) => text.clone(),
        Inline::LineBreak => " ".to_owned(),
    };
    inlines.iter().map(text).collect()
}
