//! Growing, killed and cut off at its remote changes in turn, in a guest whose kernel lets it: each time stock
//! tools find every snapshot, and the same command again finishes.
//!
//! `make test`: some blows. `SPRAT_STRIKES` (`make torture`): a kill and a cut at every change.

use std::time::Duration;

use crate::qemu::guest;
use sprat_testkit::client_and_server::ClientAndServer;
use sprat_testkit::needs;

/// Blows, and how long they may take in a guest on a busy machine without KVM: in `make test`, and in
/// `make torture`.
const SHORT: (&str, Duration) = ("2", Duration::from_secs(1800));
const LONG: (&str, Duration) = ("all", Duration::from_secs(7000));

#[test]
fn interrupted_grow_keeps_snapshots_and_the_next_grow_finishes() {
    sprat_testkit::requires!(crate::qemu::missing(), needs::sftp_server_missing());
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let seed = sprat_testkit::dice::seed();
    let pair = ClientAndServer::new();
    guest::give_keys(&pair);
    guest::give_sprat(&pair);
    let striker = sprat_testkit::machine::strikes::STRIKER;
    guest::give(&pair, "usr/bin/striker.py", striker, 0o644);
    guest::give_python(&pair, striker);
    let server = needs::plain_sftp_server().unwrap();
    guest::give_program(&pair, &server);
    let (blows, limit) = number("SPRAT_STRIKES").map_or(SHORT, |_| LONG);
    let settings = format!("seed={seed}\nblows={blows}\nserver={}\n", server.display());
    guest::run_until_done(&pair, &settings, "guest-grow", limit);
}
