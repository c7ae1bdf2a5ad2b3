//! Classifies each line that rsync writes to stderr: harmless, a source file that could not be read, a
//! failure, and so on. A message of an unknown form is a failure. An unknown error number is not:
//! `scope` decides what it concerns.
//!
//! The texts are those of rsync 3.1 to 3.5 (flist.c, sender.c, generator.c, receiver.c, xattrs.c,
//! acls.c, main.c). Since 3.2 a system error begins with `rsync: [ROLE] `, before that with `rsync: `.
//! File names are in double quotes, with control characters as `\#ooo`, so a message is one line. But a
//! name may contain any text, including quotes. So a line is classified only by its beginning, which no
//! name can affect, and by the error number at its end.

use super::scope::{Operation, Role, Scope, scope};
use crate::text::{escape_name, unescape_name};

/// The meaning of a line for the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message {
    /// It adds nothing, such as the last line, which repeats the exit code.
    Harmless,
    /// A source file was removed before rsync read it.
    Vanished(Vec<u8>),
    /// A source file or folder could not be read.
    Unread(Vec<u8>),
    /// The receiving side has no space left (or the quota is used up). The file it was for, if rsync
    /// names it.
    NoSpace(Option<Vec<u8>>),
    /// The receiving side had no space for an attribute of this file. Either the file system is full, or
    /// the attribute is too large for its type.
    NoSpaceForAttribute(Vec<u8>),
    /// The volume refused this file, or a part of it. By its path on the volume.
    Unwritten(Vec<u8>),
    /// The volume refused an attribute of this file. By its path on the volume.
    AttributeRefused(Vec<u8>),
    /// This file has more names than the volume allows, and rsync ends. Its first name, relative to the
    /// destination.
    TooManyLinks(Vec<u8>),
    /// The volume refused a hard link for another reason, and rsync ends.
    LinkRefused,
    /// Writing to this file failed, and rsync ends. By its path on the volume.
    WriteRefused(Vec<u8>),
    /// There is a folder that is not empty where a file should go.
    Conflict(Vec<u8>),
    /// The guard prevented the reading of an older snapshot's file.
    OlderNotRead,
    /// rsync did not follow a symbolic link of another user. Its exit code shows whether that matters.
    LinkNotFollowed,
    /// rsync did not get the default ACL of this path, relative to the destination. Only a folder has one.
    NoDefaultAcl(Vec<u8>),
    /// Anything else.
    Failure,
}

/// Classifies one line, given without its newline.
pub(crate) fn classify(line: &[u8]) -> Message {
    let text = String::from_utf8_lossy(line);
    let text = text.trim_end();
    if is_harmless(text) {
        return Message::Harmless;
    }
    if text.starts_with(LINK_NOT_FOLLOWED) {
        return Message::LinkNotFollowed;
    }
    for beginning in ["file has vanished: ", "directory has vanished: "] {
        if let Some(rest) = text.strip_prefix(beginning) {
            return Message::Vanished(quoted(rest));
        }
    }
    // The file changed each time while it was sent, and rsync gave up. The sender computes the checksum
    // from the source; the volume is not involved.
    if let Some(name) = text
        .strip_prefix("ERROR: ")
        .and_then(|rest| rest.strip_suffix(" failed verification -- update discarded."))
    {
        return Message::Unread(unescape_name(name));
    }
    // generator.c and delete.c print this without a prefix.
    for beginning in [
        "cannot delete non-empty directory: ",
        "could not make way for new ",
    ] {
        if let Some(rest) = text.strip_prefix(beginning) {
            let name = rest
                .strip_prefix("regular file: ")
                .or_else(|| rest.strip_prefix("symlink: "))
                .unwrap_or(rest);
            return Message::Conflict(unescape_name(name));
        }
    }
    let Some(rest) = text.strip_prefix("rsync: ") else {
        return too_long(text).map_or(Message::Failure, Message::Unread);
    };
    let (word, said) = split_role(rest);
    let Some(errno) = errno_at_end(said) else {
        return Message::Failure;
    };
    // About an older file whose content rsync wanted to copy (util1.c, `copy_file`). No other message
    // begins like this.
    if errno == EPERM && word.is_none_or(|word| word == "generator") && said.starts_with("open \"")
    {
        return Message::OlderNotRead;
    }
    // rsync replaced a folder by a hard link, and still takes it for a folder (generator.c, recv_generator).
    if errno == EACCES
        && word == Some("generator")
        && let Some(rest) = said.strip_prefix("get_acl: sys_acl_get_file(")
        && let Some((name, _)) = rest.rsplit_once(", ACL_TYPE_DEFAULT): ")
    {
        return Message::NoDefaultAcl(unescape_name(name));
    }
    let operation = Operation::of(said);
    let mut role = Role::named(word);
    // Both sides read attributes and ACLs. Without a role, volume and source can't be distinguished.
    let reads_attribute = said.starts_with("get_xattr") || said.starts_with("get_acl");
    if role == Role::Unnamed && (reads_attribute || word.is_some()) {
        role = Role::Receiver;
    }
    let name = name_in(said, operation);
    let scope = scope(role, operation, errno, name.is_some());
    match (scope, name) {
        (Scope::SourceFile, Some(name)) => Message::Unread(name),
        (Scope::VolumeFile, Some(name)) => match operation {
            Operation::SetAttribute => Message::AttributeRefused(name),
            Operation::Write => Message::WriteRefused(name),
            Operation::Create if errno == EMLINK => match link_target(said) {
                Some(first) => Message::TooManyLinks(first),
                None => Message::Unwritten(name),
            },
            Operation::Create if said.starts_with("link ") => Message::LinkRefused,
            _ => Message::Unwritten(name),
        },
        (Scope::NoSpace, Some(name)) if operation == Operation::SetAttribute => {
            Message::NoSpaceForAttribute(name)
        }
        (Scope::NoSpace, name) => Message::NoSpace(name),
        _ => Message::Failure,
    }
}

/// rsync 3.5 checks each folder of a path that it was given (syscall.c). A snapshot to link from may have a
/// link where the source has a folder now. Then the file counts as missing there and is copied, and rsync
/// ends with 0. What it can't do without the link is an error with a message and an exit code of its own.
const LINK_NOT_FOLLOWED: &str = "refusing to follow a symlink owned by an untrusted user;";

const EPERM: i32 = 1;
const EACCES: i32 = 13;
const EMLINK: i32 = 31;

/// Whether a restore's message says that the volume has a file or folder that can't be read as it was written.
/// `EIO` is btrfs's error for content with a wrong checksum. `EUCLEAN` and `EBADMSG` are those of ext4 for its
/// structures.
pub(crate) fn is_damage(message: &str) -> bool {
    const OF_DAMAGE: [i32; 3] = [5, 117, 74];
    // No file system makes such a link.
    if message.starts_with("skipping symlink with 0-length value: ") {
        return true;
    }
    let Some(rest) = message.strip_prefix("rsync: ") else {
        return false;
    };
    let (role, said) = split_role(rest);
    let reads = ["send_files failed to open ", "read errors mapping "];
    let is_sender = match role {
        Some(role) => role == "sender",
        None => reads.iter().any(|begin| said.starts_with(begin)),
    };
    is_sender && errno_at_end(said).is_some_and(|errno| OF_DAMAGE.contains(&errno))
}

/// The file that a message names. Old versions print some attribute calls without quotes.
fn name_in(said: &str, operation: Operation) -> Option<Vec<u8>> {
    if operation == Operation::SetAttribute {
        return Some(attribute_of(said));
    }
    if let Some(rest) = said.strip_prefix("get_acl: sys_acl_get_file(") {
        return Some(unescape_name(rest.split(", ").next().unwrap_or(rest)));
    }
    if !said.contains('"') {
        return None;
    }
    // Of two names (`rename "TEMPORARY" -> "NAME": …`, `symlink "NAME" -> "TARGET" failed: …`, `link
    // "NEW" => OLD failed: …`) the first one is that of the file.
    if matches!(operation, Operation::Create | Operation::Rename) {
        let first = ["\" -> \"", "\" => "]
            .iter()
            .find_map(|between| said.split_once(between));
        if let Some((first, _)) = first {
            let name = first.split_once('"').map_or(first, |(_, name)| name);
            return Some(unescape_name(name));
        }
    }
    Some(quoted(said))
}

/// The target in `link "NEW" => OLD failed: Too many links (31)` (hlink.c).
fn link_target(said: &str) -> Option<Vec<u8>> {
    let (_, rest) = said.strip_prefix("link ")?.rsplit_once("\" => ")?;
    let (old, _) = rest.rsplit_once(" failed: ")?;
    Some(unescape_name(old))
}

fn is_harmless(text: &str) -> bool {
    text.is_empty()
        || text == "IO error encountered -- skipping file deletion"
        // Repeats an earlier message about the folder.
        || text == "*** Skipping any contents from this failed directory ***"
        // The closing lines repeat the exit code, which is checked separately.
        || ["rsync error: ", "rsync warning: "]
            .iter()
            .any(|closing| {
                text.strip_prefix(closing).is_some_and(|rest| {
                    (rest.starts_with("some files/attrs were not transferred ")
                        && rest.contains("(code 23)"))
                        || (rest.starts_with("some files vanished ") && rest.contains("(code 24)"))
                })
            })
        // The file will be sent again. If that fails, too, the message is an ERROR.
        || (text.starts_with("WARNING: ")
            && text.ends_with(" failed verification -- update discarded (will try again)."))
}

/// `filename overflows max-path len by N: DIR/NAME`, `skipping overly long name: NAME`.
fn too_long(text: &str) -> Option<Vec<u8>> {
    if let Some(rest) = text.strip_prefix("skipping overly long name: ") {
        return Some(unescape_name(rest));
    }
    let rest = text.strip_prefix("filename overflows max-path len by ")?;
    Some(unescape_name(rest.split_once(": ")?.1))
}

/// Splits `[sender] opendir …` into role and rest.
fn split_role(text: &str) -> (Option<&str>, &str) {
    text.strip_prefix('[')
        .and_then(|rest| rest.split_once("] "))
        .filter(|(role, _)| role.chars().all(|c| c.is_ascii_alphabetic()))
        .map_or((None, text), |(role, rest)| (Some(role), rest))
}

/// The number in `…: Permission denied (13)`.
fn errno_at_end(text: &str) -> Option<i32> {
    let (_, number) = text.strip_suffix(')')?.rsplit_once(" (")?;
    number.parse().ok()
}

/// The text between the first double quote and the closing one that rsync printed.
fn quoted(text: &str) -> Vec<u8> {
    let Some((_, rest)) = text.split_once('"') else {
        return unescape_name(text);
    };
    // The name is followed by `"`, perhaps ` failed`, `,0)` or `)`, then `: reason (errno)` or nothing.
    let name = rest
        .rsplit_once("\": ")
        .or_else(|| rest.rsplit_once("\" failed: "))
        .or_else(|| rest.rsplit_once("\") failed: "))
        .or_else(|| rest.rsplit_once("\"): "))
        .or_else(|| rest.rsplit_once('"'))
        .map_or(rest, |(name, _)| name);
    unescape_name(name)
}

/// The file in `rsync_xal_set: lsetxattr("FILE","ATTRIBUTE") failed: …` and similar messages. Older
/// versions print no quotes.
fn attribute_of(said: &str) -> Vec<u8> {
    let rest = said.split_once('(').map_or(said, |(_, rest)| rest);
    let end = rest.rfind(",\"").or_else(|| rest.rfind(", "));
    let name = end.map_or(rest, |end| &rest[..end]);
    unescape_name(name.trim_matches('"'))
}

/// A line for the record: printable, and of limited length.
pub(crate) fn printable(line: &[u8]) -> String {
    const CHARS_MAX: usize = 500;
    let text = escape_name(&unescape_name(&String::from_utf8_lossy(line)));
    match text.char_indices().nth(CHARS_MAX) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn unread(name: &str) -> Message {
        Message::Unread(name.as_bytes().to_vec())
    }

    #[test]
    fn errors_of_the_sender_are_unread_files() {
        for line in [
            r#"rsync: [sender] send_files failed to open "/a": Permission denied (13)"#,
            r#"rsync: send_files failed to open "/a": Permission denied (13)"#,
            r#"rsync: [sender] readlink_stat("/a") failed: Permission denied (13)"#,
            r#"rsync: readlink_stat("/a") failed: Input/output error (5)"#,
            r#"rsync: [sender] opendir "/a" failed: Permission denied (13)"#,
            r#"rsync: [sender] readdir("/a"): Structure needs cleaning (117)"#,
            r#"rsync: [sender] read errors mapping "/a": Input/output error (5)"#,
            r#"rsync: [sender] read errors mapping "/a": No data available (61)"#,
            r#"rsync: [sender] get_xattr_names: llistxattr("/a",1024) failed: Input/output error (5)"#,
            r#"rsync: [sender] get_acl: sys_acl_get_file(/a, ACL_TYPE_ACCESS): Input/output error (5)"#,
            "ERROR: /a failed verification -- update discarded.",
            "filename overflows max-path len by 3: /a",
        ] {
            let got = classify(line.as_bytes());
            if line.contains("llistxattr") {
                assert!(matches!(got, Message::Unread(_)), "{line}");
            } else {
                assert_eq!(got, unread("/a"), "{line}");
            }
        }
    }

    #[test]
    fn damage_is_an_error_of_the_side_that_reads() {
        let mapped = r#"rsync: [sender] read errors mapping "/v/a": Input/output error (5)"#;
        for (message, is) in [
            (mapped.to_owned(), true),
            (mapped.replace("[sender] ", ""), true),
            (mapped.replace("sender", "receiver"), false),
            (mapped.replace("(5)", "(117)"), true),
            (mapped.replace("(5)", "(13)"), false),
            (
                r#"rsync: write failed on "/to/a": Input/output error (5)"#.to_owned(),
                false,
            ),
            (
                "rsync error: error in file IO (code 11) (5)".to_owned(),
                false,
            ),
        ] {
            assert_eq!(is_damage(&message), is, "{message}");
        }
    }

    #[test]
    fn an_older_file_that_was_not_opened_is_recognised() {
        let line = r#"rsync: [generator] open "/v/x.inflight/../y/a": Operation not permitted (1)"#;
        assert_eq!(classify(line.as_bytes()), Message::OlderNotRead);
        assert_eq!(
            classify(line.replace("[generator] ", "").as_bytes()),
            Message::OlderNotRead
        );
        for other in [
            line.replace("permitted (1)", "permitted (13)"),
            line.replace("generator", "receiver"),
            line.replace("] open", "] opendir"),
        ] {
            assert_ne!(classify(other.as_bytes()), Message::OlderNotRead, "{other}");
        }
    }

    #[test]
    fn unknown_messages_and_receiver_errors_are_failures() {
        for line in [
            r#"rsync: [receiver] mkstemp "/v/.a.X" failed: Read-only file system (30)"#,
            r#"rsync: [receiver] rename "/v/.a.X" -> "a": Input/output error (5)"#,
            r#"rsync: [generator] recv_generator: mkdir "/v/a" failed: Input/output error (5)"#,
            r#"rsync: [generator] chown "/v/a" failed: Structure needs cleaning (117)"#,
            r#"rsync: [receiver] rsync_xal_set: lsetxattr("a","user.x") failed: Input/output error (5)"#,
            r#"rsync: [receiver] mkstemp "/v/.a.X" failed: Too many open files (24)"#,
            r#"rsync: [generator] opendir "/v/a" failed: Input/output error (5)"#,
            r#"rsync: get_xattr_names: llistxattr("/a",1024) failed: Input/output error (5)"#,
            "rsync: [sender] fstat failed: Input/output error (5)",
            "rsync error: error in file IO (code 11) at receiver.c(380) [receiver=3.2.7]",
            "rsync error: received SIGINT, SIGTERM, or SIGHUP (code 20) at rsync.c(644)",
            "something new",
            // Names that look like another message.
            r#"rsync: [receiver] mkstemp "/x: [sender] opendir "/a" failed": Input/output error (5)"#,
            r#"x rsync: [sender] opendir "/a" failed: Permission denied (13)"#,
            r#"rsync: [sender]x opendir "/a" failed: Input/output error (5)"#,
        ] {
            assert_eq!(classify(line.as_bytes()), Message::Failure, "{line}");
        }
    }

    #[test]
    fn no_space_counts_only_from_the_receiver_and_at_the_end_of_a_line() {
        for line in [
            r#"rsync: [receiver] write failed on "/v/a": No space left on device (28)"#,
            r#"rsync: write failed on "/v/a": No space left on device (28)"#,
            r#"rsync: [receiver] mkstemp "/v/.a.X" failed: No space left on device (28)"#,
            r#"rsync: [generator] recv_generator: mkdir "/v/a" failed: Disk quota exceeded (122)"#,
        ] {
            let named = Message::NoSpace(Some(b"/v/a".to_vec()));
            let temporary = Message::NoSpace(Some(b"/v/.a.X".to_vec()));
            let judged = classify(line.as_bytes());
            assert!(judged == named || judged == temporary, "{line}");
        }
        for line in [
            r#"rsync: [receiver] rsync_xal_set: lsetxattr(/v/a,"user.x") failed: No space left on device (28)"#,
            r#"rsync: [receiver] rsync_xal_set: fsetxattr("/v/a","user.x") failed: No space left on device (28)"#,
            r#"rsync: [generator] set_acl: sys_acl_set_file(/v/a, ACL_TYPE_ACCESS): No space left on device (28)"#,
        ] {
            let expected = Message::NoSpaceForAttribute(b"/v/a".to_vec());
            assert_eq!(classify(line.as_bytes()), expected, "{line}");
        }
        let name = r#"rsync: [sender] opendir "/a: No space left on device (28)" failed: Permission denied (13)"#;
        assert_eq!(
            classify(name.as_bytes()),
            unread("/a: No space left on device (28)")
        );
        let sender = r#"rsync: [sender] opendir "/a" failed: No space left on device (28)"#;
        assert_eq!(classify(sender.as_bytes()), unread("/a"));
    }

    #[test]
    fn every_error_of_a_source_file_is_unread() {
        for errno in 1..=4095 {
            for said in [
                "send_files failed to open \"/a\"",
                "readlink_stat(\"/a\") failed",
                "link_stat \"/a\" failed",
                "opendir \"/a\" failed",
                "readdir(\"/a\")",
                "read errors mapping \"/a\"",
                "change_dir \"/a\" failed",
                "get_acl: sys_acl_get_file(/a, ACL_TYPE_ACCESS)",
                "some new operation \"/a\" failed",
            ] {
                let line = format!("rsync: [sender] {said}: Some reason ({errno})");
                assert_eq!(classify(line.as_bytes()), unread("/a"), "{line}");
            }
        }
    }

    #[test]
    fn errors_of_the_volume_for_one_file_concern_that_file() {
        let file = |name: &str| name.as_bytes().to_vec();
        for (line, expected) in [
            (
                r#"rsync: [receiver] mkstemp "/v/.a.X" failed: File name too long (36)"#,
                Message::Unwritten(file("/v/.a.X")),
            ),
            (
                r#"rsync: [generator] recv_generator: mkdir "/v/a" failed: Invalid argument (22)"#,
                Message::Unwritten(file("/v/a")),
            ),
            (
                r#"rsync: [generator] symlink "/v/a" -> "b" failed: File name too long (36)"#,
                Message::Unwritten(file("/v/a")),
            ),
            (
                r#"rsync: [receiver] rename "/v/.a.X" -> "a": Operation not permitted (1)"#,
                Message::Unwritten(file("/v/.a.X")),
            ),
            (
                r#"rsync: [generator] chown "/v/a" failed: Invalid argument (22)"#,
                Message::Unwritten(file("/v/a")),
            ),
            (
                r#"rsync: [receiver] failed to set times on "/v/.a.X": Invalid argument (22)"#,
                Message::Unwritten(file("/v/.a.X")),
            ),
            (
                r#"rsync: [receiver] write failed on "/v/a": File too large (27)"#,
                Message::WriteRefused(file("/v/a")),
            ),
            (
                r#"rsync: [receiver] rsync_xal_set: lsetxattr("/v/a","btrfs.compression") failed: Operation not supported (95)"#,
                Message::AttributeRefused(file("/v/a")),
            ),
            (
                r#"rsync: [generator] set_acl: sys_acl_set_file(a, ACL_TYPE_ACCESS): Operation not supported (95)"#,
                Message::AttributeRefused(file("a")),
            ),
            (
                r#"rsync: [generator] link "/v/s3/t/l/2" => t/f failed: Too many links (31)"#,
                Message::TooManyLinks(file("t/f")),
            ),
            (
                r#"rsync: [generator] link "/v/s3/t/l/2" => t/f failed: Operation not permitted (1)"#,
                Message::LinkRefused,
            ),
            (
                "*** Skipping any contents from this failed directory ***",
                Message::Harmless,
            ),
        ] {
            assert_eq!(classify(line.as_bytes()), expected, "{line}");
        }
    }

    #[test]
    fn missing_default_acl_of_the_destination_is_recognised() {
        let line = "rsync: [generator] get_acl: sys_acl_get_file(t/a, b, ACL_TYPE_DEFAULT): Permission denied (13)";
        let found = |line: &str| classify(line.as_bytes());
        assert_eq!(found(line), Message::NoDefaultAcl(b"t/a, b".to_vec()));
        for other in [
            line.replace("(13)", "(5)"),
            line.replace("DEFAULT", "ACCESS"),
            line.replace("[generator]", "[sender]"),
        ] {
            let is_it = matches!(found(&other), Message::NoDefaultAcl(_));
            assert!(!is_it, "{other}");
        }
    }

    #[test]
    fn a_conflicting_folder_is_recognised() {
        for line in [
            "cannot delete non-empty directory: t/a",
            "could not make way for new regular file: t/a",
            "could not make way for new symlink: t/a",
        ] {
            assert_eq!(
                classify(line.as_bytes()),
                Message::Conflict(b"t/a".to_vec()),
                "{line}"
            );
        }
    }

    #[test]
    fn vanished_files_and_closing_lines_are_recognised() {
        assert_eq!(
            classify(br#"file has vanished: "/a\#012b""#),
            Message::Vanished(b"/a\nb".to_vec())
        );
        for line in [
            "",
            "rsync warning: some files vanished before they could be transferred (code 24) at main.c(1338) [sender=3.2.7]",
            "rsync error: some files/attrs were not transferred (see previous errors) (code 23) at main.c(1394) [sender=3.5.0]",
            "IO error encountered -- skipping file deletion",
            "WARNING: a failed verification -- update discarded (will try again).",
        ] {
            assert_eq!(classify(line.as_bytes()), Message::Harmless, "{line}");
        }
    }

    #[test]
    fn names_are_extracted_completely() {
        let line = br#"rsync: [sender] send_files failed to open "/q"u": o\#012te": Permission denied (13)"#;
        assert_eq!(classify(line), unread("/q\"u\": o\nte"));
        let line = br#"rsync: [sender] opendir "/a" failed: b" failed: Permission denied (13)"#;
        assert_eq!(classify(line), unread("/a\" failed: b"));
    }

    proptest! {
        #[test]
        fn no_line_makes_classify_panic(line in prop::collection::vec(any::<u8>(), 0..80), head in 0usize..4) {
            let mut whole = [&b"rsync: [sender] opendir \""[..], b"rsync: ", b"file has vanished: ", b""][head].to_vec();
            whole.extend(line);
            let _ = classify(&whole);
            prop_assert!(!printable(&whole).chars().any(char::is_control));
        }
    }
}
