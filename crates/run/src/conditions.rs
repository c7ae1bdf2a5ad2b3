//! Checks the conditions under which a copy is made: power, metered connection, network, window.
//!
//! What can't be found out counts as met: a machine without a battery, without NetworkManager or
//! with an error on the bus still makes its backups.

mod gateway;

use std::fs;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use sprat_session::message_bus::{Bus, Values};

use crate::day_part::DayPart;

/// Below this, a battery that is discharging ends a copy that wants mains power.
const BATTERY_PERCENT_MIN: u8 = 15;

/// The conditions of one copy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conditions {
    /// Not while a battery is discharging and there is no mains.
    pub only_on_ac: bool,
    /// Not on a metered connection. The caller leaves it out where a copy needs no network.
    pub skip_on_metered: bool,
    /// One of these network interfaces is up. Empty: no condition.
    pub interfaces: Vec<String>,
    /// The gateway of a default route has one of these MAC addresses. Empty: no condition.
    pub gateway_macs: Vec<String>,
    /// Only at these times of the day.
    pub window: Option<DayPart>,
}

/// Whether a condition is met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Yes.
    Met,
    /// No, for this reason.
    NotMet(String),
    /// It can't be found out, which counts as met.
    Unknown(String),
}

impl Answer {
    /// Why it is not met.
    #[must_use]
    pub fn reason(self) -> Option<String> {
        match self {
            Self::NotMet(reason) => Some(reason),
            Self::Met | Self::Unknown(_) => None,
        }
    }
}

/// Where the answers come from.
#[derive(Debug, Clone)]
pub struct Machine {
    /// `/sys`.
    pub sys: PathBuf,
    /// `/proc`.
    pub proc: PathBuf,
    /// The socket of the system's message bus; `None`: the usual one.
    pub bus: Option<PathBuf>,
    /// A gateway that is not in the kernel's table of neighbours is sent a packet.
    pub may_send: bool,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            sys: "/sys".into(),
            proc: "/proc".into(),
            bus: None,
            may_send: true,
        }
    }
}

impl Conditions {
    /// Why a copy can't begin now; `None`: it can.
    #[must_use]
    pub fn stop_beginning(
        &self,
        machine: &Machine,
        zone: &TimeZone,
        now: Timestamp,
    ) -> Option<String> {
        let power = || self.only_on_ac.then(|| machine.mains_power());
        let interface = || (!self.interfaces.is_empty()).then(|| machine.one_up(&self.interfaces));
        self.in_window(zone, now)
            .or_else(|| power()?.reason())
            .or_else(|| interface()?.reason())
            .or_else(|| self.network(machine))
    }

    /// Why a copy that is under way ends in order now; `None`: it goes on. Checked each minute.
    #[must_use]
    pub fn stop_running(
        &self,
        machine: &Machine,
        zone: &TimeZone,
        now: Timestamp,
    ) -> Option<String> {
        let battery = || self.only_on_ac.then(|| machine.enough_battery());
        self.in_window(zone, now)
            .or_else(|| battery()?.reason())
            .or_else(|| self.network(machine))
    }

    fn in_window(&self, zone: &TimeZone, now: Timestamp) -> Option<String> {
        let time = zone.to_datetime(now).time();
        let window = self.window.filter(|window| !window.contains(time))?;
        let (from, to) = (window.from.strftime("%H:%M"), window.to.strftime("%H:%M"));
        Some(format!("it is not between {from} and {to}"))
    }

    fn network(&self, machine: &Machine) -> Option<String> {
        let gateway = || {
            let macs = &self.gateway_macs;
            (!macs.is_empty()).then(|| gateway::one_of(&machine.proc, macs, machine.may_send))
        };
        let metered = || self.skip_on_metered.then(|| machine.not_metered());
        gateway()
            .and_then(Answer::reason)
            .or_else(|| metered()?.reason())
    }
}

/// A battery of the machine itself.
struct Battery {
    discharging: bool,
    percent: Option<u8>,
}

/// What /sys/class/power_supply shows.
#[derive(Default)]
struct Power {
    mains: bool,
    batteries: Vec<Battery>,
}

impl Machine {
    /// Whether the machine has mains power, or no battery.
    #[must_use]
    pub fn mains_power(&self) -> Answer {
        match self.power() {
            Err(error) => Answer::Unknown(error.to_string()),
            Ok(power) if power.mains => Answer::Met,
            Ok(power) if power.batteries.iter().any(|battery| battery.discharging) => {
                Answer::NotMet("the machine runs on battery".to_owned())
            }
            Ok(_) => Answer::Met,
        }
    }

    /// Whether no battery that is discharging is below 15 %.
    #[must_use]
    pub fn enough_battery(&self) -> Answer {
        let power = match self.power() {
            Err(error) => return Answer::Unknown(error.to_string()),
            Ok(power) if power.mains => return Answer::Met,
            Ok(power) => power,
        };
        // One of several batteries may be empty while the other one supplies the machine.
        let discharging = power.batteries.iter().filter(|battery| battery.discharging);
        let best = discharging.filter_map(|battery| battery.percent).max();
        match best {
            Some(percent) if percent < BATTERY_PERCENT_MIN => {
                Answer::NotMet(format!("the battery is at {percent} %"))
            }
            _ => Answer::Met,
        }
    }

    fn power(&self) -> std::io::Result<Power> {
        let mut power = Power::default();
        for entry in fs::read_dir(self.sys.join("class/power_supply"))? {
            let supply = entry?.path();
            let attribute = |name: &str| {
                let text = fs::read_to_string(supply.join(name)).unwrap_or_default();
                text.trim().to_owned()
            };
            match attribute("type").as_str() {
                // The battery of a mouse has the scope `Device` (power_supply_sysfs.c).
                "Battery" if attribute("scope") != "Device" => power.batteries.push(Battery {
                    discharging: attribute("status") == "Discharging",
                    percent: attribute("capacity").parse().ok(),
                }),
                "Battery" => {}
                _ => power.mains |= attribute("online") == "1" && attribute("scope") != "Device",
            }
        }
        Ok(power)
    }

    /// Whether one of these network interfaces is up.
    #[must_use]
    pub fn one_up(&self, interfaces: &[String]) -> Answer {
        let all = self.sys.join("class/net");
        if let Err(error) = fs::read_dir(&all) {
            return Answer::Unknown(error.to_string());
        }
        match interfaces.iter().any(|name| is_up(&all, name)) {
            true => Answer::Met,
            false => Answer::NotMet(format!("no interface of {} is up", interfaces.join(", "))),
        }
    }

    /// Whether NetworkManager does not call the connection metered.
    #[must_use]
    pub fn not_metered(&self) -> Answer {
        match self.metered() {
            Err(error) => Answer::Unknown(error.to_string()),
            // NMMetered: 1 is yes, 3 is guess-yes.
            Ok(Some(1)) => Answer::NotMet("the connection is metered".to_owned()),
            Ok(Some(3)) => Answer::NotMet("the connection is probably metered".to_owned()),
            Ok(Some(_)) => Answer::Met,
            Ok(None) => Answer::Unknown("an answer that is not a number".to_owned()),
        }
    }

    fn metered(&self) -> std::io::Result<Option<u32>> {
        const NAME: &str = "org.freedesktop.NetworkManager";
        let mut bus = match &self.bus {
            Some(socket) => Bus::at(socket)?,
            None => Bus::system()?,
        };
        let mut values = Values::default();
        values.text(NAME);
        values.text("Metered");
        let answer = bus.call_with(
            NAME,
            "/org/freedesktop/NetworkManager",
            "org.freedesktop.DBus.Properties",
            "Get",
            ("ss", values),
        )?;
        Ok(answer.number())
    }
}

/// Names from the config: no path.
fn is_up(all: &Path, name: &str) -> bool {
    if name.is_empty() || name.contains('/') || name.starts_with('.') {
        return false;
    }
    let attribute = |what: &str| fs::read_to_string(all.join(name).join(what)).unwrap_or_default();
    match attribute("operstate").trim() {
        "up" => true,
        // Tunnels do not know their state (RFC 2863, Documentation/networking/operstates.rst); they
        // are up if somebody brought them up: IFF_UP.
        "unknown" => {
            let flags = attribute("flags");
            let flags = flags.trim().trim_start_matches("0x");
            u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & 1 != 0)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests;
