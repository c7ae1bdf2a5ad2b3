//! The time zone of a machine's days: `local`, or a name of the IANA database.

use jiff::tz::TimeZone;

/// The name that stands for the zone of this machine.
pub const LOCAL_ZONE: &str = "local";

/// The system's database has no such zone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no time zone {name:?}: use \"local\", or a name such as Europe/Berlin that is in \
     /usr/share/zoneinfo"
)]
pub struct ZoneError {
    /// The name that was asked for.
    pub name: String,
}

/// The zone called `name`. [`LOCAL_ZONE`] is the one of `TZ`, or else of `/etc/localtime`, or else UTC.
///
/// # Errors
/// The system's database has no zone of that name.
pub fn time_zone(name: &str) -> Result<TimeZone, ZoneError> {
    if name == LOCAL_ZONE {
        return Ok(TimeZone::try_system().unwrap_or(TimeZone::UTC));
    }
    // A container image may have no database, but this one needs none.
    if name == "UTC" {
        return Ok(TimeZone::UTC);
    }
    TimeZone::get(name).map_err(|_| ZoneError {
        name: name.chars().take(100).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_and_utc_are_always_there_and_a_wrong_name_is_reported() {
        assert!(time_zone("local").is_ok());
        assert_eq!(time_zone("UTC"), Ok(TimeZone::UTC));
        let error = time_zone("Europe/Bärlin").unwrap_err();
        assert!(error.to_string().contains("\"Europe/Bärlin\""), "{error}");
    }
}
