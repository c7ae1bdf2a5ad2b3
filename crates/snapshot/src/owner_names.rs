//! Owners by name: the users and groups of a snapshot, and those of this machine.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Read;
use std::path::Path;

use crate::error::SnapshotError;
use crate::long_path;
use crate::text::escape_path;

/// The longest file that is read.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// The file of names, and rsync's option for a map of numbers.
const FILES: [(&str, &str); 2] = [("etc/passwd", "--usermap="), ("etc/group", "--groupmap=")];

/// The options with which rsync gives files to the users and groups that have the same names here.
///
/// # Errors
/// The snapshot has no names, or a file can't be read.
pub(crate) fn arguments(snapshot: &Path) -> Result<Vec<OsString>, SnapshotError> {
    let mut arguments = Vec::new();
    for (file, option) in FILES {
        let theirs = read(&snapshot.join(file)).map_err(|source| SnapshotError::Volume {
            op: "read the names of owners in",
            object: escape_path(&Path::new("/").join(file)),
            source,
        })?;
        let ours = read(&Path::new("/").join(file)).map_err(|source| SnapshotError::System {
            op: "read the names of this machine's users and groups",
            source,
        })?;
        let map = map(&theirs, &ours);
        arguments.extend((!map.is_empty()).then(|| format!("{option}{map}").into()));
    }
    Ok(arguments)
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    let file = long_path::open_regular(path)?;
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// `1000:1001,1002:1000`: each number whose name has another number here.
fn map(theirs: &str, ours: &str) -> String {
    let mut here = BTreeMap::new();
    for (name, number) in names(ours) {
        here.entry(name).or_insert(number);
    }
    // The first name of a number counts, as it does for the C library.
    let mut numbers = BTreeMap::new();
    for (name, number) in names(theirs) {
        numbers.entry(number).or_insert(name);
    }
    let moved = numbers.into_iter().filter_map(|(number, name)| {
        let to = *here.get(name)?;
        (to != number).then(|| format!("{number}:{to}"))
    });
    moved.collect::<Vec<_>>().join(",")
}

/// Names and numbers. `passwd` and `group` have them in the same places.
fn names(text: &str) -> impl Iterator<Item = (&str, u32)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let number = fields.nth(1)?.parse().ok()?;
        Some((name, number))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_their_names() {
        let theirs = "root:x:0:0::/root:\nann:x:1000:1000::/home/ann:/bin/sh\n# no user\nbert:x:1001:1001:::\n\
                      cid:x:1002:1002:::\nalso:x:1000:1:::\nbad:x:-1:1:::\n+::::::\n";
        let ours = "root:x:0:0::/root:\nbert:x:1000:1000:::\nann:x:1001:1001:::\nalso:x:7:7:::\n";
        assert_eq!(map(theirs, ours), "1000:1001,1001:1000");
        assert_eq!(map("ann:x:1000:", "ann:x:1000:"), "");
    }
}
