//! One page for a browser with the status of one or more roots. It has names and times, and nothing of what is in
//! a container.

use std::fmt::Write;
use std::path::PathBuf;

use crate::status::Status;
use crate::time_text::{self, show_bytes};

const HEAD: &str = "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>sprat-agent</title>\n\
<style>body{font-family:sans-serif;margin:2em}table{border-collapse:collapse}td,th{text-align:left;padding:.3em \
1em;border-bottom:1px solid #ccc}.bad{color:#b00020;font-weight:bold}</style>\n<h1>Backups on this server</h1>\n";

pub fn page(all: &[(PathBuf, Status)], wall_s: i64) -> String {
    let mut text = HEAD.to_owned();
    let _ = write!(
        text,
        "<p>As of {} (UTC).</p>\n<table>\n",
        time_text::name(wall_s)
    );
    text +=
        "<tr><th>Folder<th>Container<th>Past states<th>Last write (UTC)<th>Used<th>State</tr>\n";
    for (root, status) in all {
        let folder = escaped(&root.display().to_string());
        for one in &status.containers {
            let _ = writeln!(
                text,
                "<tr><td>{folder}<td>{}<td>{}<td>{}<td>{}<td>{}</tr>",
                escaped(&one.name),
                one.states,
                time_text::name(one.last_write_s),
                show_bytes(status.used),
                said(&one.problems()),
            );
        }
        // What concerns the root as a whole, and a root without a container.
        let own = status.own_problems();
        if !own.is_empty() || status.containers.is_empty() {
            let used = show_bytes(status.used);
            let said = said(&own);
            let _ = writeln!(
                text,
                "<tr><td>{folder}<td>-<td>-<td>-<td>{used}<td>{said}</tr>"
            );
        }
    }
    text + "</table>\n</html>\n"
}

fn said(problems: &[String]) -> String {
    match problems.is_empty() {
        true => "good".to_owned(),
        false => format!(
            "<span class=\"bad\">{}</span>",
            escaped(&problems.join("; "))
        ),
    }
}

fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            c => out.push(c),
        }
    }
    out
}
