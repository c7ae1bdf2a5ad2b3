//! What the benches of the codec and the plan repeat; both are private to their crates.
//!
//! Above: benches/. Below: the sources of the two modules, compiled in as they stand.
//! Always true: nothing here measures, and nothing of it ships.
//!
//! A library, because cargo compiles benches themselves as tests, and so the modules' own tests.

#[path = "../../crates/store/src/sftp/codec.rs"]
#[allow(dead_code, reason = "only the hot part is measured")]
mod codec;
#[path = "../../crates/volume/src/epoch.rs"]
#[allow(dead_code, reason = "only the hot part is measured")]
mod epoch;
#[path = "../../crates/volume/src/flush_window.rs"]
#[allow(dead_code, reason = "only the hot part is measured")]
mod flush_window;
#[path = "../../crates/volume/src/plan.rs"]
#[allow(dead_code, reason = "only the hot part is measured")]
mod plan;

pub mod packets;
pub mod write_back;
