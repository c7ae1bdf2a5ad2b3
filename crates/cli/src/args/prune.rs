//! The grammar of `sprat prune`. Doc comments here are the help texts.

use std::time::Duration;

use clap::Args;
use sprat_snapshot::KeepRules;

use super::TARGET_HELP;

/// Arguments of `prune`.
#[derive(Debug, Args)]
pub struct PruneArgs {
    /// The container.
    #[arg(help = TARGET_HELP)]
    pub target: String,
    /// The job whose snapshots are looked at
    #[arg(long)]
    pub job: String,
    /// Keep the newest N
    #[arg(long, value_name = "N", default_value = "0")]
    pub keep_last: u32,
    /// Keep one of each of the newest N days that have any
    #[arg(long, value_name = "N", default_value = "0")]
    pub keep_daily: u32,
    /// The same for weeks, Monday to Sunday
    #[arg(long, value_name = "N", default_value = "0")]
    pub keep_weekly: u32,
    /// The same for months
    #[arg(long, value_name = "N", default_value = "0")]
    pub keep_monthly: u32,
    /// The same for years
    #[arg(long, value_name = "N", default_value = "0")]
    pub keep_yearly: u32,
    /// Keep all that are at most so much older than the newest, such as 36h, 14d, 6w
    #[arg(long, value_name = "TIME", value_parser = within)]
    pub keep_within: Option<Duration>,
    /// Also remove what interrupted runs of the job copied, from which the next run would go on
    #[arg(long)]
    pub drop_interrupted: bool,
    /// Only tell what would be removed, and why the rest is kept
    #[arg(long)]
    pub dry_run: bool,
}

impl PruneArgs {
    /// What they say to keep.
    #[must_use]
    pub fn rules(&self) -> KeepRules {
        KeepRules {
            last: self.keep_last,
            daily: self.keep_daily,
            weekly: self.keep_weekly,
            monthly: self.keep_monthly,
            yearly: self.keep_yearly,
            within_s: self.keep_within.map_or(0, |time| time.as_secs()),
        }
    }
}

pub(super) const EXAMPLES: &str = "\
Each rule keeps what it says; what none keeps is removed. Days begin at midnight UTC, as the names
do. The newest snapshot without unread files always stays. With --drop-interrupted no rule is needed.

Examples:
  sprat prune home --job www --keep-last 3 --keep-daily 14 --keep-monthly 12 --dry-run
  sprat prune home --job www --keep-within 30d
  sprat prune home --job www --drop-interrupted";

/// A number and a unit: h, d or w. Months and years have no fixed length.
fn within(text: &str) -> Result<Duration, String> {
    let (number, unit) =
        text.split_at(text.len() - text.chars().next_back().map_or(0, char::len_utf8));
    let hours = match unit {
        "h" => 1,
        "d" => 24,
        "w" => 24 * 7,
        _ => return Err("a number and h, d or w is needed, such as 36h, 14d, 6w".to_owned()),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{number:?} is not a number"))?;
    number
        .checked_mul(hours * 3600)
        .filter(|seconds| *seconds > 0)
        .map(Duration::from_secs)
        .ok_or_else(|| "too long, or nothing".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_a_number_and_a_unit() {
        assert_eq!(within("36h").unwrap(), Duration::from_secs(36 * 3600));
        assert_eq!(within("2w").unwrap(), Duration::from_secs(14 * 86_400));
        for bad in [
            "",
            "d",
            "14",
            "1y",
            "-1d",
            "0d",
            "14 d",
            "é",
            "99999999999999999999w",
        ] {
            assert!(within(bad).is_err(), "{bad}");
        }
    }
}
