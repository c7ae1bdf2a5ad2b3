//! What a failed operation concerns: one file, a source, the volume, or the whole run.
//!
//! The table is total: every combination of side, operation and error number has an answer, so an
//! unexpected error number never ends a run. Only the errors of [`of_volume`] and [`of_machine`] on the
//! writing side do.

use rustix::io::Errno;

/// The rsync process that reports an error. rsync before 3.2 does not name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Reads the source.
    Sender,
    /// Compares, creates folders and links, and sets the attributes of unchanged files.
    Generator,
    /// Writes files.
    Receiver,
    /// Not named, or another one.
    Unnamed,
}

impl Role {
    /// By the word in `rsync: [WORD] …`.
    pub(crate) fn named(word: Option<&str>) -> Self {
        match word {
            Some("sender") => Self::Sender,
            Some("generator") => Self::Generator,
            // In lower case as in the man page. Old versions print `Receiver`.
            Some("receiver" | "Receiver") => Self::Receiver,
            _ => Self::Unnamed,
        }
    }
}

/// What rsync was doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Opens, reads, lists or examines a file, or reads its attributes or its ACL.
    Read,
    /// Makes a file, folder, symbolic link, device or hard link.
    Create,
    /// Writes content. rsync ends when this fails.
    Write,
    /// Sets owner, mode or times.
    SetMetadata,
    /// Sets an extended attribute or an ACL.
    SetAttribute,
    /// Gives a file its name.
    Rename,
    /// Removes a file.
    Remove,
    /// An operation that this table has no name for.
    Other,
}

/// The beginnings of the messages, and the operation that each one reports.
const OPERATIONS: [(&str, Operation); 32] = [
    // flist.c, sender.c, xattrs.c, acls.c
    ("send_files failed to open ", Operation::Read),
    ("readlink_stat(", Operation::Read),
    ("link_stat ", Operation::Read),
    ("opendir ", Operation::Read),
    ("readdir(", Operation::Read),
    ("read errors mapping ", Operation::Read),
    ("change_dir ", Operation::Read),
    ("get_xattr_names: llistxattr(", Operation::Read),
    ("get_xattr_data: lgetxattr(", Operation::Read),
    ("get_acl: sys_acl_get_file(", Operation::Read),
    ("failed to read xattr ", Operation::Read),
    // generator.c, receiver.c, hlink.c, util1.c
    ("recv_generator: mkdir ", Operation::Create),
    ("mkstemp ", Operation::Create),
    ("symlink ", Operation::Create),
    ("mknod ", Operation::Create),
    ("link ", Operation::Create),
    ("open ", Operation::Create),
    ("failed to create directory ", Operation::Create),
    ("write failed on ", Operation::Write),
    ("write ", Operation::Write),
    // rsync.c
    ("failed to set times on ", Operation::SetMetadata),
    ("failed to set permissions on ", Operation::SetMetadata),
    ("chown ", Operation::SetMetadata),
    ("chgrp ", Operation::SetMetadata),
    ("rename ", Operation::Rename),
    ("copy ", Operation::Rename),
    ("unlink ", Operation::Remove),
    ("delete_file: ", Operation::Remove),
    ("rsync_xal_", Operation::SetAttribute),
    ("set_xattr_acl: ", Operation::SetAttribute),
    ("copy_xattrs: ", Operation::SetAttribute),
    ("set_acl: ", Operation::SetAttribute),
];
const FAILED_TO_WRITE_ATTRIBUTE: &str = "failed to write xattr ";

impl Operation {
    /// The operation, by the beginning of a message without its role.
    pub(crate) fn of(said: &str) -> Self {
        if said.starts_with(FAILED_TO_WRITE_ATTRIBUTE) {
            return Self::SetAttribute;
        }
        OPERATIONS
            .iter()
            .find(|(beginning, _)| said.starts_with(beginning))
            .map_or(Self::Other, |(_, operation)| *operation)
    }
}

/// What a failure concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// One file or folder of the source. The snapshot lacks it, or a part of it.
    SourceFile,
    /// One file or folder on the volume, because of what it is. The snapshot lacks it, or a part of it.
    VolumeFile,
    /// The volume is full.
    NoSpace,
    /// The volume. Nothing that was written since can be trusted.
    Volume,
    /// The run: the machine, or rsync itself.
    Run,
}

/// What the failure of `operation` with `errno` concerns. `named`: whether the message names a file.
pub(crate) fn scope(role: Role, operation: Operation, errno: i32, named: bool) -> Scope {
    let reads_source = match role {
        Role::Sender => true,
        // Both sides read. Reads of the volume by the writing side are rare, except for attributes and
        // ACLs: for those `messages` calls this only if the message names no side.
        Role::Unnamed => operation == Operation::Read,
        Role::Generator | Role::Receiver => false,
    };
    if reads_source {
        // Any error of a source is about this file: a dead network mount, a locked folder, a damaged
        // disk. An out-of-memory error is treated in the same way.
        return if named { Scope::SourceFile } else { Scope::Run };
    }
    let Some(errno) = known(errno) else {
        return Scope::Run;
    };
    if matches!(errno, Errno::NOSPC | Errno::DQUOT) {
        return Scope::NoSpace;
    }
    if of_volume(errno) {
        return Scope::Volume;
    }
    if of_machine(errno) || !named {
        return Scope::Run;
    }
    Scope::VolumeFile
}

/// Whether an error of sprat's own calls on the volume concerns the volume or the machine, and not only
/// the object of the call.
pub(crate) fn ends_run(errno: i32) -> bool {
    known(errno).is_none_or(|errno| {
        of_volume(errno) || of_machine(errno) || matches!(errno, Errno::NOSPC | Errno::DQUOT)
    })
}

/// The highest error number of Linux (MAX_ERRNO, include/linux/err.h).
const ERRNO_MAX: i32 = 4095;

/// `None` for a number that is no error of Linux. rsync can print `(0)`.
fn known(errno: i32) -> Option<Errno> {
    (1..=ERRNO_MAX)
        .contains(&errno)
        .then(|| Errno::from_raw_os_error(errno))
}

/// Errors that report a failure of the file system or of its device, for any file.
fn of_volume(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::IO
            | Errno::ROFS
            | Errno::NXIO
            | Errno::NODEV
            | Errno::NOMEDIUM
            | Errno::REMOTEIO
            // ext4: a damaged structure, and a wrong checksum of one.
            | Errno::UCLEAN
            | Errno::BADMSG
            // The volume is gone: it was shut down, or its process died.
            | Errno::SHUTDOWN
            | Errno::NOTCONN
            | Errno::CONNABORTED
            | Errno::STALE
    )
}

/// Errors that say nothing about a file: the machine has no memory or no file descriptor left.
fn of_machine(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::NOMEM | Errno::MFILE | Errno::NFILE | Errno::INTR | Errno::AGAIN
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_of_a_source_concerns_only_its_file() {
        for errno in 1..=ERRNO_MAX {
            for operation in [Operation::Read, Operation::Other] {
                assert_eq!(
                    scope(Role::Sender, operation, errno, true),
                    Scope::SourceFile,
                    "{operation:?} {errno}"
                );
            }
        }
    }

    #[test]
    fn number_that_is_no_error_says_nothing_about_a_file() {
        for errno in [i32::MIN, -1, 0, ERRNO_MAX + 1, i32::MAX] {
            for role in [Role::Unnamed, Role::Generator, Role::Receiver] {
                let scope = scope(role, Operation::Write, errno, true);
                assert_eq!(scope, Scope::Run, "{role:?} {errno}");
            }
            assert!(ends_run(errno), "{errno}");
        }
    }

    #[test]
    fn only_errors_of_volume_and_machine_end_a_run_that_writes() {
        let volume = [5, 6, 19, 30, 74, 103, 107, 108, 116, 117, 121, 123];
        let machine = [4, 11, 12, 23, 24];
        for errno in 1..=ERRNO_MAX {
            let expected = match errno {
                28 | 122 => Scope::NoSpace,
                _ if volume.contains(&errno) => Scope::Volume,
                _ if machine.contains(&errno) => Scope::Run,
                _ => Scope::VolumeFile,
            };
            for (_, operation) in OPERATIONS {
                for role in [Role::Generator, Role::Receiver] {
                    assert_eq!(
                        scope(role, operation, errno, true),
                        expected,
                        "{role:?} {operation:?} {errno}"
                    );
                }
            }
        }
    }
}
