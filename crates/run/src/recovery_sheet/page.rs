//! The recovery sheet as one page to print: no script, nothing fetched, the secret as a QR code.

use std::fmt::Write as _;

use qrcode::{Color, EcLevel, QrCode};
use sprat_session::Failure;
use zeroize::Zeroizing;

use super::text::{LOST_IN_A_BACKUP, NO_RECOVERY_KEY, RECOVERY_KEY, Sheet, Step};
use crate::html::escape_into;

/// Light modules around the code; without them readers don't find it (ISO/IEC 18004).
const QUIET_ZONE: usize = 4;

/// Characters in a command's line on a printed page (A4 or Letter), in the font below.
const LINE_CHARACTERS_MAX: usize = 78;

const STYLE: &str = "\
body{font:11pt/1.35 sans-serif;max-width:46em;margin:1.5em auto;padding:0 1em;color:#000;background:#fff}
h1{font-size:17pt;margin:0}
.secret{font-weight:bold;border-bottom:3px solid #000;padding-bottom:.3em}
.key{display:flex;gap:1.5em;align-items:center;border:2px solid #000;padding:.8em;margin:1em 0}
.key svg{width:52mm;height:52mm;flex:none}
.key code{font-size:15pt;font-weight:bold;word-spacing:.2em;overflow-wrap:anywhere}
table{border-collapse:collapse}th{text-align:left;padding-right:1em;vertical-align:top;white-space:nowrap}
td,pre,code{font-family:monospace;overflow-wrap:anywhere}td{font-size:9pt}
pre{font-size:9.5pt;white-space:pre-wrap;background:#f2f2f2;padding:.4em;margin:.2em 0 .6em}
li{break-inside:avoid}@page{margin:14mm}";

/// The page. The QR code contains `secret`, the recovery key as it is typed.
pub fn page(sheet: &Sheet<'_>, secret: Option<&str>) -> Result<Zeroizing<String>, Failure> {
    // Enough for every page: to grow would leave parts of the secret in freed memory.
    let mut page = Zeroizing::new(String::with_capacity(256 << 10));
    // Writing to a String can't fail.
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\
         <title>sprat recovery sheet</title><style>{STYLE}</style></head><body>\n\
         <h1>sprat recovery sheet</h1>\n\
         <p class=\"secret\">SECRET: print it, keep it off this machine, delete this file</p>\n"
    );
    match secret {
        Some(secret) => {
            page.push_str("<div class=\"key\">");
            draw(&mut page, secret)?;
            let _ = writeln!(
                page,
                "<div>Recovery key, typed with its dashes<br><code>{}</code></div></div>",
                escaped(secret).as_str()
            );
        }
        None => {
            let _ = writeln!(
                page,
                "<div class=\"key\"><div>Recovery key, to be written here by hand<br><br>\
                 <code>{NO_RECOVERY_KEY}</code></div></div>"
            );
        }
    }
    for unknown in sheet.unknown() {
        let unknown = escaped(unknown);
        let _ = writeln!(page, "<p>NOT ON THIS SHEET: {}</p>", unknown.as_str());
    }
    page.push_str("<table>\n");
    for (name, value) in sheet.fields() {
        if name != RECOVERY_KEY {
            let _ = writeln!(
                page,
                "<tr><th>{}</th><td>{}</td></tr>",
                escaped(name.trim()).as_str(),
                escaped(&value).as_str()
            );
        }
    }
    let _ = writeln!(
        page,
        "</table>\n<p>{}</p>\n<p>To restore everything without sprat, run these commands as root on any \
         Linux machine with cryptsetup, sshfs and rsync, while no backup runs:</p>\n<ol>",
        escaped(&sheet.advice()).as_str()
    );
    print_steps(&mut page, &sheet.steps());
    page.push_str(
        "</ol>\n<p>If the account may only read: add <code>--readonly</code> to <code>cryptsetup \
         open</code> and use <code>mount -o ro,noload</code>; if the file system is btrfs, <code>mount \
         -o ro</code>. If <code>mount</code> does not know btrfs, use another Linux: RHEL and Rocky have \
         none. The package btrfs-progs has the programs that check it.</p>\n\
         <p>With sprat on a new machine, as root:</p>\n<ol>",
    );
    print_steps(&mut page, &sheet.steps_with_sprat());
    let _ = writeln!(
        page,
        "</ol>\n<p>{}</p><pre>{}</pre>",
        LOST_IN_A_BACKUP,
        escaped(&broken(&sheet.unlock())).as_str()
    );
    page.push_str(
        "<p>To test this sheet: <code>sprat key rehearse</code>.</p>\n\
         </body></html>\n",
    );
    Ok(page)
}

fn print_steps(page: &mut String, steps: &[Step]) {
    for step in steps {
        let lines: Vec<String> = step.commands.iter().map(|line| broken(line)).collect();
        let commands = escaped(&lines.join("\n"));
        let _ = writeln!(
            page,
            "<li>{}<pre>{}</pre></li>",
            escaped(&step.what).as_str(),
            commands.as_str()
        );
    }
}

/// Breaks a command into lines that fit the page, in the shell's syntax: where a browser wraps a line, a
/// reader can't see whether a space belongs there. A command with several lines, or a comment, stays.
fn broken(command: &str) -> String {
    let stays = command.contains(['\n', '#']) || command.chars().count() <= LINE_CHARACTERS_MAX;
    if stays {
        return command.to_owned();
    }
    let (mut words, mut quote, mut escaped) = (vec![String::new()], None, false);
    for c in command.chars() {
        let splits = c == ' ' && quote.is_none() && !escaped;
        match (quote, c) {
            _ if escaped => escaped = false,
            (None | Some('"'), '\\') => escaped = true,
            (None, '"' | '\'') => quote = Some(c),
            (Some(open), _) if open == c => quote = None,
            _ => {}
        }
        match words.last_mut() {
            Some(word) if !splits => word.push(c),
            _ => words.push(String::new()),
        }
    }
    let mut lines = String::new();
    let mut columns = 0;
    for (index, word) in words.iter().enumerate() {
        let len = word.chars().count();
        // A space before, and room for ` \\` behind.
        if index > 0 && columns + 1 + len + 2 > LINE_CHARACTERS_MAX {
            lines.push_str(" \\\n  ");
            columns = 2;
        } else if index > 0 {
            lines.push(' ');
            columns += 1;
        }
        lines.push_str(word);
        columns += len;
    }
    lines
}

/// Draws the QR code as SVG: one square a dark module.
fn draw(page: &mut String, secret: &str) -> Result<(), Failure> {
    let code = QrCode::with_error_correction_level(secret.as_bytes(), EcLevel::Q)
        .map_err(|error| Failure::failed("can't make a QR code of the key").caused_by(&error))?;
    let width = code.width();
    let side = width + 2 * QUIET_ZONE;
    let _ = write!(
        page,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {side} {side}\" \
         shape-rendering=\"crispEdges\" role=\"img\" aria-label=\"recovery key\">\
         <rect width=\"{side}\" height=\"{side}\" fill=\"#fff\"/><path fill=\"#000\" d=\""
    );
    let colors = Zeroizing::new(
        code.to_colors()
            .into_iter()
            .map(|color| color == Color::Dark)
            .collect::<Vec<bool>>(),
    );
    for (index, dark) in colors.iter().enumerate() {
        if *dark {
            let (x, y) = (index % width + QUIET_ZONE, index / width + QUIET_ZONE);
            let _ = write!(page, "M{x} {y}h1v1h-1z");
        }
    }
    page.push_str("\"/></svg>");
    Ok(())
}

fn escaped(text: &str) -> Zeroizing<String> {
    let mut out = Zeroizing::new(String::with_capacity(text.len() * 6));
    escape_into(&mut out, text);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_command_is_broken_as_the_shell_takes_it() {
        let folder = "long".repeat(12);
        for command in [
            format!(
                "sprat --fingerprint 893B-F403 key add /srv/{folder}/x --new-key-file /etc/sprat/keys/x.key"
            ),
            format!(
                "cp 'it is  here/{folder}' \"and \\\" there/{folder}\" un\\ broken\\ {folder} -a"
            ),
        ] {
            let lines = broken(&command);
            assert!(lines.lines().count() > 1, "{lines}");
            let mut all = lines.lines().rev();
            assert!(!all.next().unwrap().ends_with('\\'), "{lines}");
            assert!(all.all(|line| line.ends_with(" \\")), "{lines}");
            assert_eq!(words(&lines), words(&command), "{lines}");
        }
        let fits = lines_of(&broken(&format!("sprat a {folder} {folder} {folder}")));
        assert!(
            fits.iter().all(|len| *len <= LINE_CHARACTERS_MAX),
            "{fits:?}"
        );
        for whole in [
            "ls -l",
            &format!("printf 'a\n{folder}{folder}'"),
            &format!("ls # {folder}{folder}"),
        ] {
            assert_eq!(broken(whole), whole);
        }
    }

    /// As the shell splits them.
    fn words(command: &str) -> String {
        let script = format!("printf '<%s>' {command}");
        let ran = std::process::Command::new("sh")
            .arg("-c")
            .arg(script)
            .output();
        let ran = ran.unwrap();
        assert!(ran.status.success(), "{ran:?}");
        String::from_utf8(ran.stdout).unwrap()
    }

    fn lines_of(text: &str) -> Vec<usize> {
        text.lines().map(|line| line.chars().count()).collect()
    }
}
