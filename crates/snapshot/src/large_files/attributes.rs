//! The attributes of a file that rsync does not copy, because it is up to date.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{
    Gid, Mode, Uid, XattrFlags, fchmod, fchown, fgetxattr, flistxattr, fremovexattr, fsetxattr,
};
use rustix::io::Errno;

use crate::walk::XATTR_BYTES_MAX;

const ACL: &[u8] = b"system.posix_acl_access";

/// Names and values of extended attributes.
type Attributes = Vec<(Vec<u8>, Vec<u8>)>;

/// Gives `to` the owner and mode of a file whose metadata is `about`, and `wanted`, its [`all`].
pub(super) fn copy(wanted: &Attributes, about: &Metadata, to: &File) -> io::Result<()> {
    let there = to.metadata()?;
    if (about.uid(), about.gid()) != (there.uid(), there.gid()) {
        let (owner, group) = (Uid::from_raw(about.uid()), Gid::from_raw(about.gid()));
        fchown(to, Some(owner), Some(group))?;
    }
    let present = all(to)?;
    for (name, _) in &present {
        if !wanted.iter().any(|(other, _)| other == name) {
            fremovexattr(to, name.as_slice())?;
        }
    }
    fchmod(to, Mode::from_raw_mode(about.mode() & 0o7777))?;
    for one in wanted.iter().filter(|one| !present.contains(one)) {
        fsetxattr(to, one.0.as_slice(), &one.1, XattrFlags::empty())?;
    }
    Ok(())
}

/// The extended attributes of a file, an ACL among them. As in [`mod@crate::take`], `btrfs.*` is not copied.
pub(super) fn all(file: &File) -> io::Result<Attributes> {
    let mut buffer = vec![0_u8; XATTR_BYTES_MAX];
    let length = match flistxattr(file, &mut buffer[..]) {
        Err(Errno::OPNOTSUPP) => 0,
        listed => listed?,
    };
    let is_copied =
        |name: &[u8]| name == ACL || !(name.starts_with(b"system.") || name.starts_with(b"btrfs."));
    let names: Vec<Vec<u8>> = buffer[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty() && is_copied(name))
        .map(<[u8]>::to_vec)
        .collect();
    let mut found = Vec::new();
    for name in names {
        let length = match fgetxattr(file, name.as_slice(), &mut buffer[..]) {
            Err(Errno::NODATA) => continue,
            got => got?,
        };
        found.push((name, buffer[..length].to_vec()));
    }
    Ok(found)
}
