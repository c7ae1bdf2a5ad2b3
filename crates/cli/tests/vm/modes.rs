//! sprat itself on a stock kernel with dm-crypt: both modes, kills, lost lines, other ciphers, and a
//! container that a person made by hand.

use std::time::Duration;

use crate::qemu::guest;
use crate::stage::Stage;

#[test]
fn both_modes_work_on_a_stock_kernel_and_adopt_what_cryptsetup_made() {
    sprat_testkit::requires!(crate::qemu::missing());
    let stage = Stage::new();
    guest::give_keys(&stage);
    guest::give_sprat(&stage);
    let script = format!(
        "port={}\nfolder={}\n{}",
        stage.sshd.port(),
        stage.server().display(),
        guest::script("guest-modes"),
    );
    let said = guest::run(&stage, &script, Duration::from_secs(1800));
    for line in said.lines().filter(|line| line.starts_with('=')) {
        println!("{line}");
    }
    assert!(said.trim_end().ends_with("done"), "{said}");
}
