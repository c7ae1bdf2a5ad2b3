//! The time zone of a machine's days: `local`, or a name of the IANA database.
//!
//! The system's zone data is used where it is there. A machine without `/usr/share/zoneinfo` uses
//! the copy that the program has inside, which is as old as the program.

use jiff::tz::TimeZone;

/// The name that stands for the zone of this machine.
pub const LOCAL_ZONE: &str = "local";

/// No zone has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no time zone {name:?}")]
pub struct ZoneError {
    /// The name that was asked for.
    pub name: String,
}

/// The zone called `name`. [`LOCAL_ZONE`] is the one of `TZ`, or else of `/etc/localtime`, or else UTC.
///
/// # Errors
/// No zone has that name.
pub fn time_zone(name: &str) -> Result<TimeZone, ZoneError> {
    if name == LOCAL_ZONE {
        return Ok(TimeZone::try_system().unwrap_or(TimeZone::UTC));
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

    #[test]
    fn names_are_iana_names() {
        let berlin = time_zone("Europe/Berlin").unwrap();
        assert_eq!(berlin.iana_name(), Some("Europe/Berlin"));
        for wrong in ["Europe/Berlim", "", "../../etc/passwd", "/etc/localtime"] {
            assert!(time_zone(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn zones_are_known_without_zone_data_of_the_system() {
        let empty = tempfile::tempdir().unwrap();
        assert!(jiff::tz::TimeZoneDatabase::from_dir(empty.path()).is_err());
        let bundled = jiff::tz::TimeZoneDatabase::bundled();
        for zone in ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe"] {
            assert!(bundled.get(zone).is_ok(), "{zone}");
        }
    }
}
