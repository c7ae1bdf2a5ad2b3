//! Conditions, on a folder that stands in for /sys and /proc, and on a real message bus.

use jiff::civil::time;
use sprat_testkit::private_bus::PrivateBus;
use sprat_testkit::{needs, requires};
use std::time::Duration;

use super::*;
use sprat_snapshot::time_zone;

/// A machine whose files the test writes. It has no message bus.
struct Scene {
    folder: tempfile::TempDir,
    machine: Machine,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let machine = Machine {
            sys: folder.path().join("sys"),
            proc: folder.path().join("proc"),
            bus: Some(folder.path().join("bus")),
            may_send: false,
        };
        Self { folder, machine }
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn supply(&self, name: &str, attributes: &[(&str, &str)]) {
        for (attribute, value) in attributes {
            self.write(
                &format!("sys/class/power_supply/{name}/{attribute}"),
                &format!("{value}\n"),
            );
        }
    }

    fn interface(&self, name: &str, operstate: &str, flags: &str) {
        self.write(
            &format!("sys/class/net/{name}/operstate"),
            &format!("{operstate}\n"),
        );
        self.write(
            &format!("sys/class/net/{name}/flags"),
            &format!("{flags}\n"),
        );
    }
}

fn not_met(answer: &Answer) -> bool {
    matches!(answer, Answer::NotMet(_))
}

fn unknown(answer: &Answer) -> bool {
    matches!(answer, Answer::Unknown(_))
}

#[test]
fn what_can_not_be_found_out_counts_as_met() {
    let scene = Scene::new();
    let machine = &scene.machine;
    assert!(unknown(&machine.mains_power()) && unknown(&machine.enough_battery()));
    assert!(unknown(&machine.not_metered()));
    assert!(unknown(&machine.one_up(&["eth0".to_owned()])));
    assert!(unknown(&gateway::one_of(
        &machine.proc,
        &["aa:bb:cc:dd:ee:ff".to_owned()],
        false
    )));
    let all = Conditions {
        only_on_ac: true,
        skip_on_metered: true,
        interfaces: vec!["eth0".to_owned()],
        gateway_macs: vec!["aa:bb:cc:dd:ee:ff".to_owned()],
        window: None,
    };
    let now = Timestamp::UNIX_EPOCH;
    assert_eq!(all.stop_beginning(machine, &TimeZone::UTC, now), None);
    assert_eq!(all.stop_running(machine, &TimeZone::UTC, now), None);
}

#[test]
fn only_a_discharging_battery_without_mains_stops() {
    let scene = Scene::new();
    let machine = &scene.machine;
    // A server without batteries.
    fs::create_dir_all(machine.sys.join("class/power_supply")).unwrap();
    assert_eq!(machine.mains_power(), Answer::Met);
    // The mouse is not the machine.
    let mouse = [
        ("type", "Battery"),
        ("scope", "Device"),
        ("status", "Discharging"),
        ("capacity", "5"),
    ];
    scene.supply("hidpp_battery_0", &mouse);
    assert_eq!(machine.mains_power(), Answer::Met);
    assert_eq!(machine.enough_battery(), Answer::Met);
    let battery = |status, capacity| {
        scene.supply(
            "BAT0",
            &[
                ("type", "Battery"),
                ("status", status),
                ("capacity", capacity),
            ],
        );
    };
    battery("Discharging", "80");
    assert!(not_met(&machine.mains_power()));
    assert_eq!(machine.enough_battery(), Answer::Met);
    battery("Discharging", "15");
    assert_eq!(machine.enough_battery(), Answer::Met);
    battery("Discharging", "14");
    assert!(not_met(&machine.enough_battery()));
    scene.supply(
        "BAT1",
        &[
            ("type", "Battery"),
            ("status", "Discharging"),
            ("capacity", "60"),
        ],
    );
    assert_eq!(machine.enough_battery(), Answer::Met);
    scene.supply("AC", &[("type", "Mains"), ("online", "0")]);
    assert!(not_met(&machine.mains_power()));
    scene.supply("ucsi", &[("type", "USB"), ("online", "1")]);
    assert_eq!(machine.mains_power(), Answer::Met);
    assert_eq!(machine.enough_battery(), Answer::Met);
    let other = Scene::new();
    other.supply(
        "BAT0",
        &[("type", "Battery"), ("status", "Full"), ("capacity", "100")],
    );
    assert_eq!(other.machine.mains_power(), Answer::Met);
}

#[test]
fn a_copy_begins_on_mains_only_and_ends_on_an_empty_battery() {
    let scene = Scene::new();
    let conditions = Conditions {
        only_on_ac: true,
        ..Conditions::default()
    };
    let now = Timestamp::UNIX_EPOCH;
    for (percent, begins, goes_on) in [("80", false, true), ("10", false, false)] {
        scene.supply(
            "BAT0",
            &[
                ("type", "Battery"),
                ("status", "Discharging"),
                ("capacity", percent),
            ],
        );
        let found = (
            conditions
                .stop_beginning(&scene.machine, &TimeZone::UTC, now)
                .is_none(),
            conditions
                .stop_running(&scene.machine, &TimeZone::UTC, now)
                .is_none(),
        );
        assert_eq!(found, (begins, goes_on), "{percent}");
        let none = Conditions::default();
        assert_eq!(
            none.stop_beginning(&scene.machine, &TimeZone::UTC, now),
            None
        );
        assert_eq!(none.stop_running(&scene.machine, &TimeZone::UTC, now), None);
    }
}

#[test]
fn one_of_the_interfaces_must_be_up() {
    let scene = Scene::new();
    let up = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        scene.machine.one_up(&names)
    };
    scene.interface("lo", "unknown", "0x9");
    scene.interface("eth0", "down", "0x1003");
    scene.interface("wlan0", "up", "0x1003");
    scene.interface("wg0", "unknown", "0x91");
    scene.interface("tun0", "unknown", "0x1090");
    assert!(not_met(&up(&["eth0"])) && not_met(&up(&["tun0", "eth1"])));
    assert_eq!(up(&["eth0", "wlan0"]), Answer::Met);
    assert_eq!(up(&["wg0"]), Answer::Met);
    for no_name in ["", ".", "..", "../net/wlan0"] {
        assert!(not_met(&up(&[no_name])), "{no_name:?}");
    }
}

const ROUTES: &str =
    "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";
const ARP: &str =
    "IP address       HW type     Flags       HW address            Mask     Device\n";

fn route(destination: [u8; 4], gateway: [u8; 4], mask: [u8; 4], flags: u32) -> String {
    let number = |bytes| format!("{:08X}", u32::from_ne_bytes(bytes));
    let (destination, gateway, mask) = (number(destination), number(gateway), number(mask));
    format!("eth0\t{destination}\t{gateway}\t{flags:04X}\t0\t0\t100\t{mask}\t0\t0\t0\n")
}

#[test]
fn gateway_of_a_default_route_has_one_of_the_addresses() {
    let scene = Scene::new();
    let ask = |mac: &str| {
        gateway::one_of(
            &scene.machine.proc,
            &["00:00:00:00:00:01".to_owned(), mac.to_owned()],
            false,
        )
    };
    let net = route([192, 168, 7, 0], [0; 4], [255, 255, 255, 0], 1);
    let wrong = route([10, 0, 0, 0], [192, 168, 7, 9], [255, 0, 0, 0], 3);
    let tunnel = route([0; 4], [0; 4], [0; 4], 1);
    let default = route([0; 4], [192, 168, 7, 1], [0; 4], 3);
    scene.write("proc/net/route", &format!("{ROUTES}{net}{wrong}{tunnel}"));
    assert!(not_met(&ask("aa:bb:cc:dd:ee:ff")));
    scene.write(
        "proc/net/route",
        &format!("{ROUTES}{tunnel}{net}{wrong}{default}"),
    );
    // The kernel has not asked for the address yet.
    assert!(unknown(&ask("aa:bb:cc:dd:ee:ff")));
    let entry = |address, flags, mac| {
        format!("{address:<16} 0x1         {flags}         {mac}     *        eth0\n")
    };
    let other = entry("192.168.7.9", "0x2", "aa:bb:cc:dd:ee:99");
    let incomplete = entry("192.168.7.1", "0x0", "00:00:00:00:00:00");
    scene.write("proc/net/arp", &format!("{ARP}{other}{incomplete}"));
    assert!(unknown(&ask("aa:bb:cc:dd:ee:99")));
    let gateway = entry("192.168.7.1", "0x2", "aa:bb:cc:dd:ee:ff");
    scene.write("proc/net/arp", &format!("{ARP}{other}{gateway}"));
    assert_eq!(ask("aa:bb:cc:dd:ee:ff"), Answer::Met);
    assert_eq!(ask("AA-BB-CC-DD-EE-FF"), Answer::Met);
    assert!(not_met(&ask("aa:bb:cc:dd:ee:99")));
    let conditions = Conditions {
        gateway_macs: vec!["aa:bb:cc:dd:ee:99".to_owned()],
        ..Conditions::default()
    };
    let now = Timestamp::UNIX_EPOCH;
    let reason = "the gateway is another one (aa:bb:cc:dd:ee:ff)".to_owned();
    assert_eq!(
        conditions.stop_beginning(&scene.machine, &TimeZone::UTC, now),
        Some(reason.clone())
    );
    assert_eq!(
        conditions.stop_running(&scene.machine, &TimeZone::UTC, now),
        Some(reason)
    );
}

#[test]
fn a_gateway_that_is_reached_by_ipv6_only_is_not_known() {
    let scene = Scene::new();
    scene.write("proc/net/route", ROUTES);
    let ask = || {
        gateway::one_of(
            &scene.machine.proc,
            &["aa:bb:cc:dd:ee:ff".to_owned()],
            false,
        )
    };
    let zeros = "0".repeat(32);
    let nowhere =
        format!("{zeros} 00 {zeros} 00 {zeros} ffffffff 00000001 00000000 00200200       lo\n");
    scene.write("proc/net/ipv6_route", &nowhere);
    assert!(not_met(&ask()));
    let router = "fe800000000000000000000000000001";
    let default =
        format!("{zeros} 00 {zeros} 00 {router} 00000400 00000001 00000000 00000003     eth0\n");
    scene.write("proc/net/ipv6_route", &format!("{default}{nowhere}"));
    assert!(unknown(&ask()));
}

#[test]
fn windows_go_over_midnight_and_follow_the_zone() {
    let night = DayPart {
        from: time(22, 0, 0, 0),
        to: time(6, 30, 0, 0),
    };
    let day = DayPart {
        from: time(8, 0, 0, 0),
        to: time(18, 0, 0, 0),
    };
    for (hour, minute, in_night, in_day) in [
        (21, 59, false, false),
        (22, 0, true, false),
        (0, 0, true, false),
        (6, 29, true, false),
        (6, 30, false, false),
        (8, 0, false, true),
        (17, 59, false, true),
        (18, 0, false, false),
    ] {
        let at = time(hour, minute, 0, 0);
        assert_eq!(
            (night.contains(at), day.contains(at)),
            (in_night, in_day),
            "{at}"
        );
    }
    let conditions = Conditions {
        window: Some(night),
        ..Conditions::default()
    };
    let berlin = time_zone("Europe/Berlin").unwrap();
    let machine = Scene::new().machine;
    for (now, stops) in [
        ("2026-11-28T21:00Z", false),
        ("2026-11-28T20:59Z", true),
        ("2026-06-28T20:00Z", false),
    ] {
        let now = now.parse().unwrap();
        assert_eq!(
            conditions.stop_beginning(&machine, &berlin, now).is_some(),
            stops,
            "{now}"
        );
        assert_eq!(
            conditions.stop_running(&machine, &berlin, now).is_some(),
            stops,
            "{now}"
        );
    }
}

#[test]
fn network_manager_says_whether_the_connection_is_metered() {
    requires!(needs::program("dbus-daemon"));
    let daemon = PrivateBus::start();
    let mut machine = Scene::new().machine;
    machine.bus = Some(daemon.socket());
    // There is a bus, but no NetworkManager on it.
    assert!(unknown(&machine.not_metered()));
    let mut service = Bus::at(&daemon.socket()).unwrap();
    service
        .request_name("org.freedesktop.NetworkManager")
        .unwrap();
    let conditions = Conditions {
        skip_on_metered: true,
        ..Conditions::default()
    };
    for (metered, stops) in [
        (0, false),
        (1, true),
        (2, false),
        (3, true),
        (4, false),
        (99, false),
    ] {
        let found = std::thread::scope(|scope| {
            let asked = scope
                .spawn(|| conditions.stop_running(&machine, &TimeZone::UTC, Timestamp::UNIX_EPOCH));
            let call = loop {
                let call = service
                    .next(Duration::from_secs(10))
                    .unwrap()
                    .expect("nobody asks");
                if call.member == "Get" {
                    break call;
                }
            };
            assert_eq!(call.path, "/org/freedesktop/NetworkManager");
            assert_eq!(
                call.text().as_deref(),
                Some("org.freedesktop.NetworkManager")
            );
            let mut values = Values::default();
            values.signature("u");
            values.number(metered);
            service.answer(&call, ("v", values), None).unwrap();
            asked.join().unwrap()
        });
        assert_eq!(found.is_some(), stops, "{metered}: {found:?}");
    }
}
