//! Faults, crashes, a slow wire and a real sshd for tests; never ships.
//!
//! Above: the tests of every other crate. Below: `store`, and the system's own programs.
//!
//! Always true:
//! - A missing need skips a test with a reason at a desk, and fails it where `CI` is set.
//! - What a helper starts or makes ends and goes with it.
#![forbid(unsafe_code)]

pub mod compare;
pub mod crash;
pub mod dice;
pub mod fault;
pub mod hostile;
pub mod leases;
pub mod leftovers;
pub mod memory;
pub mod needs;
pub mod power;
pub mod recorder;
pub mod ssh_server;
pub mod tree;
pub mod watchdog;
pub mod wire;
