//! Faults, crashes, a slow wire, real SSH servers, and whole machines for tests; never ships.
//!
//! Above: the tests of every other crate. Below: `store`, and the system's own programs.
//!
//! Always true:
//! - A missing need skips a test with a reason at a desk, and fails it where `CI` is set.
//! - What a helper starts or makes ends with it.
#![forbid(unsafe_code)]

pub mod agent_server;
pub mod client_and_server;
pub mod compare;
pub mod crash;
pub mod dice;
pub mod fake_clock;
pub mod fault;
pub mod hostile;
pub mod leases;
pub mod leftovers;
pub mod machine;
pub mod manifest;
pub mod memory;
pub mod needs;
pub mod notice_servers;
pub mod power;
pub mod private_bus;
pub mod program;
pub mod recorder;
pub mod running;
pub mod source_tree;
pub mod ssh_server;
pub mod test_folder;
pub mod tmpfs;
pub mod tree;
pub mod watchdog;
pub mod wire;
pub mod wrapped;
