//! Finds the time zone that the config names.
//!
//! The system's zone data is used where it is there. A machine without `/usr/share/zoneinfo` uses
//! the copy that the program has inside, which is as old as the program.

use jiff::tz::TimeZone;

/// The value of `time_zone` that stands for the zone of this machine.
pub const LOCAL: &str = "local";

/// No zone has this name.
#[derive(Debug, thiserror::Error)]
#[error("there is no time zone {name:?}")]
pub struct UnknownZone {
    /// As the config has it.
    pub name: String,
    source: jiff::Error,
}

/// The zone with this IANA name. [`LOCAL`] is the zone of this machine: that of the variable `TZ`,
/// else of `/etc/localtime`, else UTC.
pub fn time_zone(name: &str) -> Result<TimeZone, UnknownZone> {
    if name == LOCAL {
        return Ok(TimeZone::try_system().unwrap_or(TimeZone::UTC));
    }
    TimeZone::get(name).map_err(|source| UnknownZone {
        name: name.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_iana_names_and_local_is_always_there() {
        assert!(time_zone(LOCAL).is_ok());
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
