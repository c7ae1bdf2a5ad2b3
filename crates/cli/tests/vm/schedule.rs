//! A real systemd in the guest: `sprat schedule install`, and the timers make real backups over ssh.

use std::time::Duration;

use crate::qemu::guest;
use sprat_testkit::client_and_server::ClientAndServer;

#[test]
fn timer_of_systemd_makes_backups_until_it_is_removed() {
    sprat_testkit::requires!(crate::qemu::missing(), guest::systemd_missing());
    let pair = ClientAndServer::new();
    guest::give_keys(&pair);
    guest::give_sprat(&pair);
    guest::give_systemd(&pair);
    let limit = Duration::from_secs(900);
    guest::run_until_done(&pair, &guest::server(&pair), "guest-schedule", limit);
}

#[test]
fn overdue_alarm_comes_by_its_own_timer_after_the_server_died() {
    sprat_testkit::requires!(crate::qemu::missing(), guest::systemd_missing());
    let pair = ClientAndServer::new();
    guest::give_keys(&pair);
    guest::give_server(&pair);
    guest::give_sprat(&pair);
    guest::give_systemd(&pair);
    let port = format!("port={}\n", pair.sshd.port());
    let limit = Duration::from_secs(900);
    guest::leap_until_done(&pair, &port, "guest-overdue", limit);
}
