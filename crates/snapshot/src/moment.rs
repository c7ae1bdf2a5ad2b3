//! Reads the time in `--at TIME`, as a person writes it.

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

/// The text is no time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?}: {why}; write a time as 2026-11-28 14:00, 2026-11-28, 14:00, yesterday, or 3d for 3 days \
     ago (min, h, d, w)"
)]
pub struct MomentError {
    text: String,
    why: &'static str,
}

/// The moment that `text` means in `zone`, when it is `now`:
///
/// | text | means |
/// | --- | --- |
/// | `2026-11-28 14:00`, also with seconds, or with `T` between | that local time |
/// | `14:00` | that time today |
/// | `2026-11-28`, `yesterday`, `today` | the end of that day |
/// | `3d`, `36h`, `90min`, `2w` | so long ago |
///
/// A time that the clocks skip is later by the gap. Of a time that comes twice the first is meant.
///
/// # Errors
/// The text is none of these, or a time of today that is still to come.
pub fn parse_moment(text: &str, now: Timestamp, zone: &TimeZone) -> Result<Timestamp, MomentError> {
    let wrong = |why| MomentError {
        text: text.chars().take(100).collect(),
        why,
    };
    let too_far = |_| wrong("too far away");
    let local = |at: DateTime| zone.to_timestamp(at).map_err(too_far);
    let end_of = |day: Date| -> Result<Timestamp, MomentError> {
        let next = local(
            day.tomorrow()
                .map_err(too_far)?
                .to_datetime(Time::midnight()),
        )?;
        Ok(next - SignedDuration::from_nanos(1))
    };
    let text = text.trim();
    let today = zone.to_datetime(now).date();
    if let Some(ago) = ago(text) {
        let ago = ago.ok_or_else(|| wrong("too long"))?;
        return now.checked_sub(ago).map_err(too_far);
    }
    match text {
        "yesterday" => return end_of(today.yesterday().map_err(too_far)?),
        "today" => return end_of(today),
        _ => {}
    }
    if let Some(time) = time(text) {
        let at = local(today.to_datetime(time))?;
        if at > now {
            return Err(wrong("that time is still to come today; name the day, too"));
        }
        return Ok(at);
    }
    let (day, rest) = text.split_at_checked(10).unwrap_or((text, ""));
    let day = date(day).ok_or_else(|| wrong("this is not a time"))?;
    match rest.strip_prefix([' ', 'T']) {
        None if rest.is_empty() => end_of(day),
        Some(rest) => {
            let time = time(rest).ok_or_else(|| wrong("this is not a time of the day"))?;
            local(day.to_datetime(time))
        }
        None => Err(wrong("this is not a time")),
    }
}

/// `3d` and such. `Some(None)`: it is one, but too long.
fn ago(text: &str) -> Option<Option<SignedDuration>> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let seconds = match &text[digits..] {
        "s" => 1,
        "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        "w" => 7 * 86_400,
        _ => return None,
    };
    (digits > 0).then(|| {
        let number: i64 = text[..digits].parse().ok()?;
        number.checked_mul(seconds).map(SignedDuration::from_secs)
    })
}

fn numbers<const N: usize>(text: &str, separator: char, digits: [usize; N]) -> Option<[i16; N]> {
    let mut found = [0; N];
    let mut parts = text.split(separator);
    for (number, digits) in found.iter_mut().zip(digits) {
        let part = parts.next()?;
        let is_number = part.len() == digits && part.bytes().all(|b| b.is_ascii_digit());
        *number = is_number.then(|| part.parse().ok()).flatten()?;
    }
    parts.next().is_none().then_some(found)
}

fn small(number: i16) -> Option<i8> {
    i8::try_from(number).ok()
}

fn date(text: &str) -> Option<Date> {
    let [year, month, day] = numbers(text, '-', [4, 2, 2])?;
    Date::new(year, small(month)?, small(day)?).ok()
}

fn time(text: &str) -> Option<Time> {
    let [hour, minute, second] = numbers(text, ':', [2, 2, 2]).or_else(|| {
        let [hour, minute] = numbers(text, ':', [2, 2])?;
        Some([hour, minute, 0])
    })?;
    Time::new(small(hour)?, small(minute)?, small(second)?, 0).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn berlin() -> TimeZone {
        TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
    }

    fn moment(text: &str, now: &str, zone: &TimeZone) -> Result<String, MomentError> {
        let moment = parse_moment(text, now.parse().unwrap(), zone)?;
        Ok(Timestamp::from_second(moment.as_second())
            .unwrap()
            .to_string())
    }

    #[test]
    fn times_are_local_and_days_mean_their_end() {
        let winter = "2026-11-28T09:00:00Z";
        let new_york = TimeZone::posix("EST5EDT,M3.2.0,M11.1.0").unwrap();
        for (zone, text, now, expected) in [
            (berlin(), "2026-11-28 14:00", winter, "2026-11-28T13:00:00Z"),
            (berlin(), "2026-11-28T14:00", winter, "2026-11-28T13:00:00Z"),
            (
                berlin(),
                " 2026-07-01 14:00:30 ",
                winter,
                "2026-07-01T12:00:30Z",
            ),
            (berlin(), "2026-11-27", winter, "2026-11-27T22:59:59Z"),
            (berlin(), "yesterday", winter, "2026-11-27T22:59:59Z"),
            (berlin(), "today", winter, "2026-11-28T22:59:59Z"),
            (berlin(), "09:59", winter, "2026-11-28T08:59:00Z"),
            (berlin(), "10:00", winter, "2026-11-28T09:00:00Z"),
            // In Berlin it is the 28th, in New York still the 27th.
            (
                berlin(),
                "yesterday",
                "2026-11-28T01:00:00Z",
                "2026-11-27T22:59:59Z",
            ),
            (
                new_york.clone(),
                "yesterday",
                "2026-11-28T01:00:00Z",
                "2026-11-27T04:59:59Z",
            ),
            (
                new_york,
                "19:00",
                "2026-11-28T01:00:00Z",
                "2026-11-28T00:00:00Z",
            ),
            (TimeZone::UTC, "yesterday", winter, "2026-11-27T23:59:59Z"),
            (TimeZone::UTC, "3d", winter, "2026-11-25T09:00:00Z"),
            (TimeZone::UTC, "36h", winter, "2026-11-26T21:00:00Z"),
            (TimeZone::UTC, "90min", winter, "2026-11-28T07:30:00Z"),
            (TimeZone::UTC, "2w", winter, "2026-11-14T09:00:00Z"),
        ] {
            assert_eq!(
                moment(text, now, &zone).as_deref(),
                Ok(expected),
                "{text:?} {now}"
            );
        }
    }

    #[test]
    fn times_are_read_on_the_nights_when_the_clocks_change() {
        for (text, now, expected) in [
            // Forward: 02:30 does not exist, and is an hour later.
            (
                "2026-03-29 02:30",
                "2026-04-01T00:00:00Z",
                "2026-03-29T01:30:00Z",
            ),
            ("2026-03-29", "2026-04-01T00:00:00Z", "2026-03-29T21:59:59Z"),
            ("yesterday", "2026-03-29T22:30:00Z", "2026-03-29T21:59:59Z"),
            ("yesterday", "2026-03-29T08:00:00Z", "2026-03-28T22:59:59Z"),
            // Back: 02:30 comes twice.
            (
                "2026-10-25 02:30",
                "2026-11-01T00:00:00Z",
                "2026-10-25T00:30:00Z",
            ),
            (
                "2026-10-25 03:00",
                "2026-11-01T00:00:00Z",
                "2026-10-25T02:00:00Z",
            ),
            ("02:30", "2026-10-25T01:15:00Z", "2026-10-25T00:30:00Z"),
            ("2026-10-25", "2026-11-01T00:00:00Z", "2026-10-25T22:59:59Z"),
            // So many hours, whatever the clocks do.
            ("1d", "2026-10-25T12:00:00Z", "2026-10-24T12:00:00Z"),
        ] {
            assert_eq!(
                moment(text, now, &berlin()).as_deref(),
                Ok(expected),
                "{text:?} {now}"
            );
        }
    }

    #[test]
    fn other_texts_are_refused_and_the_forms_are_named() {
        let now = "2026-11-28T09:00:00Z";
        for (text, why) in [
            ("", "this is not a time"),
            ("latest", "this is not a time"),
            ("tomorrow", "this is not a time"),
            ("3m", "this is not a time"),
            ("3 d", "this is not a time"),
            ("d", "this is not a time"),
            ("-3d", "this is not a time"),
            ("2026-02-30", "this is not a time"),
            ("2026-11-28 24:00", "this is not a time of the day"),
            ("2026-11-28 9:00", "this is not a time of the day"),
            ("2026-11-28Z", "this is not a time"),
            ("2026-11-28T09-00-00Z", "this is not a time of the day"),
            (
                "10:01",
                "that time is still to come today; name the day, too",
            ),
            ("99999999999999999999d", "too long"),
            ("9999999999d", "too far away"),
            ("ä026-11-28", "this is not a time"),
        ] {
            let error = moment(text, now, &berlin()).unwrap_err();
            assert_eq!(error.why, why, "{text:?}");
            assert!(error.to_string().contains("2026-11-28 14:00"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_moment_parser_panic(text in ".{0,24}", digits in "[0-9: TdhZ-]{0,20}") {
            for text in [text, digits] {
                let _ = parse_moment(&text, Timestamp::UNIX_EPOCH, &berlin());
                let _ = parse_moment(&text, Timestamp::MAX, &berlin());
            }
        }
    }
}
