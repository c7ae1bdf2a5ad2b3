//! Finds the MAC address of the gateway, to tell networks apart.
//!
//! IPv4 only: the kernel shows its table of IPv6 neighbours only over netlink. On a machine with an
//! IPv6 default route alone the condition counts as met.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use super::Answer;

/// A gateway answers within this time, or it is not there.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// RTF_UP and RTF_GATEWAY (include/uapi/linux/route.h).
const UP_AND_GATEWAY: u32 = 0x1 | 0x2;
/// ATF_COM: the entry is complete (include/uapi/linux/if_arp.h).
const COMPLETE: u32 = 0x2;

/// Whether the gateway of a default route has one of these MAC addresses. A VPN may have a default
/// route, too, so all of them count.
pub(super) fn one_of(proc: &Path, macs: &[String], may_send: bool) -> Answer {
    let routes = match fs::read_to_string(proc.join("net/route")) {
        Err(error) => return Answer::Unknown(error.to_string()),
        Ok(routes) => routes,
    };
    let gateways = gateways(&routes);
    if gateways.is_empty() {
        return match has_ipv6_default_route(proc) {
            true => Answer::Unknown("the gateway is reached by IPv6 only".to_owned()),
            false => Answer::NotMet("there is no gateway".to_owned()),
        };
    }
    let found: Vec<String> = gateways
        .iter()
        .filter_map(|gateway| mac_of(proc, *gateway, may_send))
        .collect();
    let wanted = |mac: &String| macs.iter().any(|wanted| same(mac, wanted));
    if found.iter().any(wanted) {
        return Answer::Met;
    }
    match found.first() {
        Some(mac) => Answer::NotMet(format!("the gateway is another one ({mac})")),
        None => Answer::Unknown("the MAC address of the gateway is not known".to_owned()),
    }
}

/// `Iface Destination Gateway Flags RefCnt Use Metric Mask …`, addresses as hexadecimal numbers in
/// the byte order of the machine (net/ipv4/fib_trie.c).
fn gateways(routes: &str) -> Vec<Ipv4Addr> {
    let lines = routes.lines().skip(1);
    lines
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let number = |at: usize| u32::from_str_radix(fields.get(at)?, 16).ok();
            let is_default = number(1)? == 0 && number(7)? == 0;
            let is_gateway = number(3)? & UP_AND_GATEWAY == UP_AND_GATEWAY;
            let address = Ipv4Addr::from(number(2)?.to_ne_bytes());
            (is_default && is_gateway).then_some(address)
        })
        .collect()
}

/// The first field of a line is the destination, the second one the length of its prefix; the last
/// one is the device (net/ipv6/route.c). The kernel always has such a route on `lo`, to nowhere.
fn has_ipv6_default_route(proc: &Path) -> bool {
    let routes = fs::read_to_string(proc.join("net/ipv6_route")).unwrap_or_default();
    routes.lines().any(|line| {
        let mut fields = line.split_whitespace();
        fields
            .next()
            .is_some_and(|to| to.bytes().all(|byte| byte == b'0'))
            && fields.next() == Some("00")
            && fields.next_back() != Some("lo")
    })
}

/// From the kernel's table of neighbours. A gateway that is not in it yet is sent a packet, so that
/// the kernel asks for its address.
fn mac_of(proc: &Path, gateway: Ipv4Addr, may_send: bool) -> Option<String> {
    if let Some(mac) = in_table(proc, gateway) {
        return Some(mac);
    }
    if !may_send {
        return None;
    }
    // To the port `discard`; whether anybody answers does not matter.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.send_to(&[0], (gateway, 9)).ok()?;
    let end = Instant::now() + ANSWER_MAX;
    while Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
        if let Some(mac) = in_table(proc, gateway) {
            return Some(mac);
        }
    }
    None
}

/// `IP address, HW type, Flags, HW address, Mask, Device` (net/ipv4/arp.c).
fn in_table(proc: &Path, gateway: Ipv4Addr) -> Option<String> {
    let table = fs::read_to_string(proc.join("net/arp")).ok()?;
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let address: Ipv4Addr = fields.first()?.parse().ok()?;
        let flags = fields.get(2)?.trim_start_matches("0x");
        let complete = u32::from_str_radix(flags, 16).ok()? & COMPLETE != 0;
        (address == gateway && complete).then(|| fields.get(3).map(|mac| (*mac).to_owned()))?
    })
}

/// `AA-BB-…` is the same as `aa:bb:…`.
fn same(one: &str, other: &str) -> bool {
    let plain = |mac: &str| mac.to_ascii_lowercase().replace('-', ":");
    plain(one) == plain(other)
}
