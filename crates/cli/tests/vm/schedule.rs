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
    let script = format!(
        "port={}\nfolder={}\n{}",
        pair.sshd.port(),
        pair.server().display(),
        guest::script("guest-schedule"),
    );
    let said = guest::run(&pair, &script, Duration::from_secs(900));
    for line in said.lines().filter(|line| line.starts_with('=')) {
        println!("{line}");
    }
    assert!(said.trim_end().ends_with("done"), "{said}");
}
