//! sprat itself on a stock kernel with dm-crypt: both modes, kills, lost connections, other ciphers,
//! and a container that was made with cryptsetup.

use std::time::Duration;

use crate::qemu::guest;
use sprat_testkit::client_and_server::ClientAndServer;

#[test]
fn both_modes_work_on_a_stock_kernel_and_adopt_what_cryptsetup_made() {
    sprat_testkit::requires!(crate::qemu::missing());
    let pair = ClientAndServer::new();
    guest::give_keys(&pair);
    guest::give_sprat(&pair);
    let limit = Duration::from_secs(1800);
    guest::run_until_done(&pair, &guest::server(&pair), "guest-modes", limit);
}
