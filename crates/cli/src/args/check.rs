//! The grammar of `sprat check`. Doc comments here are the help texts.

use std::time::Duration;

use clap::{ArgGroup, Args};

use super::TARGET_HELP;

/// Arguments of `check`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("files").args(["read_data", "against_source"])))]
pub struct CheckArgs {
    /// The container.
    #[arg(help = TARGET_HELP)]
    pub target: String,
    /// Also read every file in the volume, and compare it with its checksum of earlier checks
    #[arg(long)]
    pub read_data: bool,
    /// Also compare the latest snapshot of this job with the files that it was made from
    #[arg(long, value_name = "JOB")]
    pub against_source: Option<String>,
    /// Begin no more files after so long, such as 45m or 2h; the same command goes on there
    #[arg(long, value_name = "TIME", value_parser = parse_time, requires = "files")]
    pub max_duration: Option<Duration>,
}

pub(super) const CHECK_EXAMPLES: &str = "\
Nothing is written to the server. Exit code 13 tells of damage, which is named. Without an option
only the metadata is read, to the end: there is no limit to its time, and Ctrl-C harms nothing.

Examples:
  sprat check home
  sprat check home --read-data --max-duration 2h
  sprat check home --against-source www";

/// Ten years: a longer time is a typing error.
const TIME_S_MAX: u64 = 10 * 365 * 86400;

/// `90`, `90s`, `45m`, `2h` or `1d`.
fn parse_time(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.char_indices().next_back() {
        Some((at, last)) if last.is_ascii_alphabetic() => (&text[..at], last),
        _ => (text, 's'),
    };
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86400,
        _ => return Err("a number with s, m, h or d behind it is meant".to_owned()),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "a number with s, m, h or d behind it is meant".to_owned())?;
    match number.checked_mul(seconds) {
        Some(seconds @ 0..=TIME_S_MAX) => Ok(Duration::from_secs(seconds)),
        _ => Err("that is too long".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit_or_are_seconds() {
        for (text, seconds) in [
            ("90", 90),
            ("90s", 90),
            ("45m", 2700),
            ("2h", 7200),
            ("1d", 86400),
        ] {
            assert_eq!(parse_time(text), Ok(Duration::from_secs(seconds)));
        }
        for text in [
            "",
            "h",
            "2x",
            "-1",
            "1.5h",
            "2é",
            "99999999999999999999",
            "999999999999999999d",
            "200000000000000d",
            "3651d",
        ] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }
}
