//! Times as text, and text as durations and sizes.

/// A moment as the name of a past state: `2026-11-28T02-05-11Z`.
pub fn name(unix_s: i64) -> String {
    let (year, month, day) = civil(unix_s.div_euclid(86_400));
    let second = unix_s.rem_euclid(86_400);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}-{:02}-{:02}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

/// Year, month and day of a day since 1970-01-01.
/// (Howard Hinnant, "chrono-compatible low-level date algorithms", `civil_from_days`.)
pub fn civil(day: i64) -> (i64, i64, i64) {
    let day = day + 719_468;
    let era = day.div_euclid(146_097);
    let of_era = day.rem_euclid(146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    (
        year + era * 400 + i64::from(month <= 2),
        month,
        of_year - (153 * shifted + 2) / 5 + 1,
    )
}

/// `7d`, `12w`, `1h`, `10m`, `30s`, `12mo` in seconds; a month counts 31 days.
pub fn duration_s(text: &str) -> Option<i64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        "w" => 7 * 86_400,
        "mo" => 31 * 86_400,
        "y" => 366 * 86_400,
        _ => return None,
    };
    number.parse::<i64>().ok()?.checked_mul(unit)
}

/// `256M`, `2T`: powers of 1024.
pub fn bytes(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Bytes for people: `1.5 GiB`.
pub fn show_bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let step = (0..4)
        .take_while(|step| bytes >> (10 * (step + 1)) > 0)
        .count();
    if step == 0 {
        return format!("{bytes} B");
    }
    let tenths = (u128::from(bytes) * 10) >> (10 * step);
    format!("{}.{} {}", tenths / 10, tenths % 10, units[step])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_named_by_the_calendar() {
        assert_eq!(name(0), "1970-01-01T00-00-00Z");
        assert_eq!(name(951_782_399), "2000-02-28T23-59-59Z");
        assert_eq!(name(951_868_800), "2000-03-01T00-00-00Z");
        assert_eq!(name(1_795_831_511), "2026-11-28T02-05-11Z");
        assert_eq!(civil(-1), (1969, 12, 31));
    }

    #[test]
    fn durations_and_sizes_are_read() {
        assert_eq!(duration_s("7d"), Some(604_800));
        assert_eq!(duration_s("12mo"), Some(12 * 31 * 86_400));
        for wrong in ["", "7", "d", "7x", "-1d", "99999999999999999y"] {
            assert_eq!(duration_s(wrong), None, "{wrong}");
        }
        assert_eq!(bytes("2T"), Some(2 << 40));
        assert_eq!(bytes("2X"), None);
        assert_eq!(show_bytes(1536 << 20), "1.5 GiB");
        assert_eq!(show_bytes(4095), "3.9 KiB");
        assert_eq!(show_bytes(12), "12 B");
    }
}
