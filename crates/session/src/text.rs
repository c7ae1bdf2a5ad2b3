//! Text for people: foreign bytes made harmless, and numbers made short.

use std::fmt::Write as _;
use std::time::Duration;

/// Longest line of a message, in characters; what a server says beyond it is cut.
const LINE_CHARACTERS_MAX: usize = 2000;

/// Makes foreign text harmless for a terminal: control characters, invisible ones and those that
/// turn the direction of writing are escaped, and it is cut to a bounded length.
pub fn harmless(text: &str) -> String {
    harmless_within(text, LINE_CHARACTERS_MAX)
}

/// As [`harmless`], at most `characters_max` characters of `text`.
pub fn harmless_within(text: &str, characters_max: usize) -> String {
    let mut shown = String::with_capacity(text.len().min(characters_max.saturating_mul(4)));
    for (count, c) in text.chars().enumerate() {
        if count == characters_max {
            shown.push('…');
            break;
        }
        if is_harmful(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// As [`harmless`], in at most so many columns of a terminal: what is wider would wrap.
pub fn harmless_columns(text: &str, columns_max: usize) -> String {
    let (mut shown, mut columns) = (String::new(), 0);
    // Up to here it can still be cut, with room for the sign of that.
    let mut fits = 0;
    for c in text.chars() {
        let from = shown.len();
        if is_harmful(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
        columns += columns_of(&shown[from..]);
        if columns > columns_max {
            shown.truncate(fits);
            shown.push('…');
            break;
        }
        if columns < columns_max {
            fits = shown.len();
        }
    }
    shown
}

/// How many columns a terminal needs for text.
fn columns_of(text: &str) -> usize {
    text.chars().map(width).sum()
}

/// How many columns a terminal gives a character: none to those that are put over another one, two to the
/// wide ones of East Asia and to pictures (UAX #11, and its table EastAsianWidth.txt; a block of which some
/// are wide counts as wide).
fn width(c: char) -> usize {
    match c {
        '\u{300}'..='\u{36f}'
        | '\u{1ab0}'..='\u{1aff}'
        | '\u{20d0}'..='\u{20ff}'
        | '\u{fe00}'..='\u{fe0f}'
        | '\u{fe20}'..='\u{fe2f}' => 0,
        '\u{1100}'..='\u{115f}'
        | '\u{231a}'..='\u{231b}'
        | '\u{23e9}'..='\u{23f3}'
        | '\u{2600}'..='\u{27bf}'
        | '\u{2e80}'..='\u{303e}'
        | '\u{3041}'..='\u{a4cf}'
        | '\u{a960}'..='\u{a97f}'
        | '\u{ac00}'..='\u{d7a3}'
        | '\u{f900}'..='\u{faff}'
        | '\u{fe10}'..='\u{fe19}'
        | '\u{fe30}'..='\u{fe6f}'
        | '\u{ff00}'..='\u{ff60}'
        | '\u{ffe0}'..='\u{ffe6}'
        | '\u{1f000}'..='\u{1faff}'
        | '\u{20000}'..='\u{3fffd}' => 2,
        _ => 1,
    }
}

/// Control characters, line and paragraph separators, and Unicode's invisible and
/// direction-changing format characters (UAX #9, and U+200B..U+200F, U+2060..U+206F, U+FEFF).
fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{061c}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// `1.5 GiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut unit = 0;
    let mut whole = count;
    let mut rest = 0;
    while whole >= 1024 && unit < UNITS.len() {
        rest = whole % 1024;
        whole /= 1024;
        unit += 1;
    }
    let name = UNITS[unit - 1];
    if whole < 100 {
        format!("{whole}.{} {name}", rest * 10 / 1024)
    } else {
        format!("{whole} {name}")
    }
}

/// `1,234,567`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 file`, `2 files`.
pub fn counted(number: u64, one: &str, many: &str) -> String {
    format!("{} {}", count(number), if number == 1 { one } else { many })
}

/// A path for a shell command in a hint: quoted where the shell would take it for something else.
pub fn quoted(path: &std::path::Path) -> String {
    let text = harmless(&path.display().to_string());
    match shlex::try_quote(&text) {
        Ok(quoted) => quoted.into_owned(),
        Err(_) => text,
    }
}

/// `7 s`, `4 min 5 s`, `2 h 10 min`, `3 d 4 h`.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// A table with its columns aligned; the columns in `right` (numbers) to the right.
pub fn table(rows: &[Vec<String>], right: &[usize]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| columns_of(cell)).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let blank = widths[column] - columns_of(cell);
            let gap = if column == 0 { "" } else { "  " };
            // Writing to a String can't fail.
            let _ = if right.contains(&column) {
                write!(line, "{gap}{:blank$}{cell}", "")
            } else {
                write!(line, "{gap}{cell}{:blank$}", "")
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Parses a time: a whole number, and one of `units` (s, m, h, d, w) behind it, or its word, such as `2 h`,
/// `90 min`, `14 days`.
pub fn parse_time(text: &str, units: &str) -> Result<Duration, String> {
    let text = text.trim_end();
    let digits = text.find(|c: char| !c.is_ascii_digit());
    let (number, unit) = text.split_at(digits.unwrap_or(text.len()));
    let unit = unit.trim_start();
    let (letter, seconds) = match unit {
        "s" | "sec" | "second" | "seconds" => ('s', 1),
        "m" | "min" | "minute" | "minutes" => ('m', 60),
        "h" | "hour" | "hours" => ('h', 3600),
        "d" | "day" | "days" => ('d', 86_400),
        "w" | "week" | "weeks" => ('w', 7 * 86_400),
        "month" | "months" | "y" | "year" | "years" => {
            return Err(format!("{unit:?} has no fixed length; use days or weeks"));
        }
        _ => (' ', 0),
    };
    if number.is_empty() || !units.contains(letter) {
        let units: Vec<String> = units.chars().map(String::from).collect();
        return Err(format!(
            "write a whole number and a unit (one of {})",
            units.join(", ")
        ));
    }
    let number = number.parse::<u64>().ok();
    let seconds = number.and_then(|number| number.checked_mul(seconds));
    seconds
        .map(Duration::from_secs)
        .ok_or_else(|| "that is too long".to_owned())
}

/// Parses a size: a whole number and K, M, G, T, P or KiB … PiB (powers of 1024), or kB, MB, GB, TB, PB
/// (powers of 1000).
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit());
    let (number, unit) = text.split_at(digits.unwrap_or(text.len()));
    let unit = unit.trim_start();
    let upper = unit.to_ascii_uppercase();
    let factor = match upper.as_str() {
        "" | "B" => 1,
        unit => {
            let power = unit
                .chars()
                .next()
                .and_then(|letter| "KMGTP".find(letter))
                .and_then(|power| u32::try_from(power + 1).ok());
            let base: Option<u64> = match &unit[unit.chars().next().map_or(0, char::len_utf8)..] {
                "" | "IB" => Some(1024),
                "B" => Some(1000),
                _ => None,
            };
            base.zip(power)
                .map(|(base, power)| base.pow(power))
                .ok_or_else(|| {
                    "the unit must be K, M, G, T or P, or KiB, kB and so on".to_owned()
                })?
        }
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "write a whole number and a unit: K, M, G, T or P".to_owned())?;
    number
        .checked_mul(factor)
        .filter(|bytes| *bytes <= i64::MAX.unsigned_abs())
        .ok_or_else(|| "larger than a file can be".to_owned())
}

/// Ten years: a longer time is a typing error.
const DURATION_MAX: Duration = Duration::from_secs(10 * 365 * 86_400);

/// Parses a limit of time, at most ten years: `90`, `90s`, `45m`, `2h` or `1d`. A number alone is seconds.
pub fn parse_limit(text: &str) -> Result<Duration, String> {
    let time = match text.ends_with(|c: char| c.is_ascii_digit()) {
        true => parse_time(&format!("{text}s"), "smhd")?,
        false => parse_time(text, "smhd")?,
    };
    let is_possible = time <= DURATION_MAX;
    is_possible
        .then_some(time)
        .ok_or("that is too long".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_a_number_and_one_of_the_units() {
        for (text, seconds) in [
            ("90s", 90),
            ("45m", 2700),
            ("2h", 7200),
            ("1d", 86_400),
            ("2w", 14 * 86_400),
            ("45 min", 2700),
            ("14 days", 14 * 86_400),
            ("1 week", 7 * 86_400),
        ] {
            assert_eq!(parse_time(text, "smhdw"), Ok(Duration::from_secs(seconds)));
        }
        for bad in [
            "",
            "d",
            "14",
            "1y",
            "-1d",
            "1 month",
            "1.5 days",
            "1.5h",
            "é",
            "2é",
            "5s",
            "99999999999999999999w",
        ] {
            assert!(parse_time(bad, "hdw").is_err(), "{bad}");
        }
    }

    #[test]
    fn a_line_of_wide_characters_is_cut_by_columns() {
        assert_eq!(harmless_columns("letters", 7), "letters");
        assert_eq!(harmless_columns("letters!", 7), "letter…");
        assert_eq!(harmless_columns("写真写真", 8), "写真写真");
        assert_eq!(harmless_columns("写真写真x", 8), "写真写…");
        assert_eq!(
            harmless_columns("e\u{301}te\u{301}", 3),
            "e\u{301}te\u{301}"
        );
        // What is escaped takes more room than it was long.
        assert_eq!(harmless_columns("\x1b[2J and more", 9), "\\u{1b}[2…");
        for max in 1..30 {
            let line = harmless_columns("写 a\x07 真 b 🗄 c\u{202e} d", max);
            assert!(columns_of(&line) <= max, "{line:?} in {max}");
        }
        assert_eq!(
            table(
                &[vec!["写".into(), "x".into()], vec!["ab".into(), "y".into()]],
                &[]
            ),
            "写  x\nab  y\n"
        );
    }

    #[test]
    fn foreign_text_can_neither_steer_the_terminal_nor_flood_it() {
        assert_eq!(
            harmless("a\x1b[2Jb\nc\u{202e}d\u{7f}é"),
            r"a\u{1b}[2Jb\nc\u{202e}d\u{7f}é"
        );
        assert_eq!(
            harmless(&"x".repeat(5000)).chars().count(),
            LINE_CHARACTERS_MAX + 1
        );
    }

    #[test]
    fn sizes_are_printed_short_and_parsed_in_powers_of_1024() {
        let shown: Vec<String> = [0, 1023, 1024, 1536, 102_400, 5 << 40, u64::MAX]
            .map(bytes)
            .into();
        assert_eq!(
            shown,
            [
                "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "100 KiB", "5.0 TiB", "15.9 EiB"
            ]
        );
        assert_eq!(parse_size("5T"), Ok(5 << 40));
        assert_eq!(parse_size("64 MiB"), Ok(64 << 20));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("2 TB"), Ok(2_000_000_000_000));
        assert_eq!(parse_size("2kB"), Ok(2000));
        for wrong in ["", "T", "5X", "-1", "1.5G", "9999999P", "8192P", "5é"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn counts_and_durations_are_grouped() {
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(counted(1, "file", "files"), "1 file");
        let shown = [5, 65, 7_800, 100_000].map(|s| duration(Duration::from_secs(s)));
        assert_eq!(shown, ["5 s", "1 min 5 s", "2 h 10 min", "1 d 3 h"]);
    }

    #[test]
    fn paths_in_hints_are_quoted_where_a_shell_needs_it() {
        let shown = ["/mnt/a", "/mnt/my disk", "/mnt/a'b"].map(|path| quoted(path.as_ref()));
        assert_eq!(shown, ["/mnt/a", "'/mnt/my disk'", "\"/mnt/a'b\""]);
    }

    #[test]
    fn tables_are_aligned() {
        let rows = [
            vec!["job".to_owned(), "size".to_owned()],
            vec!["a".to_owned(), "5".to_owned()],
        ];
        assert_eq!(table(&rows, &[1]), "job  size\na       5\n");
    }

    #[test]
    fn a_time_without_a_unit_is_seconds_and_at_most_ten_years() {
        for (text, seconds) in [
            ("90", 90),
            ("90s", 90),
            ("45m", 2700),
            ("2h", 7200),
            ("1d", 86_400),
        ] {
            assert_eq!(parse_limit(text), Ok(Duration::from_secs(seconds)));
        }
        for text in [
            "h",
            "1w",
            "999999999999999999d",
            "200000000000000d",
            "3651d",
        ] {
            assert!(parse_limit(text).is_err(), "{text}");
        }
    }
}
