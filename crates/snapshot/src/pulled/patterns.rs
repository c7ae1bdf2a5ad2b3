//! A job's patterns as they are for one host: an anchored pattern is a path of the snapshot, where the host
//! is below `@HOST`.

use super::Host;
use crate::error::SnapshotError;
use crate::patterns::lines_of;
use crate::spec::SnapshotSpec;

/// The kernel's own file systems. Their files have no content.
pub(crate) const KERNEL: [&str; 2] = ["/proc/*", "/sys/*"];

impl Host {
    /// rsync's rules for this host, one in each line, for `--exclude-from`.
    ///
    /// # Errors
    /// A file of patterns can't be read.
    pub(crate) fn rules(&self, spec: &SnapshotSpec) -> Result<Vec<u8>, SnapshotError> {
        let mut lines = Vec::new();
        let mut add = |line: &[u8]| {
            lines.extend_from_slice(line);
            lines.push(b'\n');
        };
        KERNEL.iter().for_each(|pattern| add(pattern.as_bytes()));
        lines.extend_from_slice(&self.found.lines);
        let mut add = |pattern: &[u8]| {
            for rule in for_host(pattern, &self.name) {
                lines.extend_from_slice(&rule);
                lines.push(b'\n');
            }
        };
        for pattern in &spec.excludes {
            add(pattern.as_bytes());
        }
        for file in &spec.exclude_from {
            for line in lines_of(file)? {
                add(&line);
            }
        }
        Ok(lines)
    }
}

/// The rules that a pattern means for a host, each with its prefix.
fn for_host(pattern: &[u8], host: &str) -> Vec<Vec<u8>> {
    let (prefix, pattern): (&[u8], _) = match pattern {
        [b'+', b' ', rest @ ..] => (b"+ ", rest),
        [b'-', b' ', rest @ ..] => (b"- ", rest),
        whole => (b"- ", whole),
    };
    let rule = |pattern: &[u8]| [prefix, pattern].concat();
    let Some(path) = pattern.strip_prefix(b"/") else {
        return vec![rule(pattern)];
    };
    let slash = path.iter().position(|byte| *byte == b'/');
    let (first, below) = match slash {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (path, &b""[..]),
    };
    let is_host = first.strip_prefix(b"@") == Some(host.as_bytes());
    if first == b"***" {
        return vec![rule(b"/***")];
    }
    if !is_host && !matches!(first, b"*" | b"@*" | b"**") {
        return Vec::new();
    }
    let below = match below {
        // The folder of the host itself.
        b"" if prefix == b"+ " => return Vec::new(),
        b"" => b"*",
        below => below,
    };
    let mut rules = vec![rule(&[b"/", below].concat())];
    if first == b"**" {
        rules.push(rule(&[b"/**/", below].concat()));
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchored_patterns_are_paths_of_the_snapshot() {
        for (pattern, expected) in [
            (".cache/", &["- .cache/"][..]),
            ("a/b", &["- a/b"]),
            ("+ *.txt", &["+ *.txt"]),
            ("#x", &["- #x"]),
            ("/@web/srv/www/tmp/*", &["- /srv/www/tmp/*"]),
            ("- /@web/srv", &["- /srv"]),
            ("+ /@web/srv/***", &["+ /srv/***"]),
            ("/@web", &["- /*"]),
            ("/@web/", &["- /*"]),
            ("+ /@web/", &[]),
            ("/@web/***", &["- /***"]),
            ("/srv/www", &[]),
            ("/@other/srv", &[]),
            ("/@webs/srv", &[]),
            ("/*/srv", &["- /srv"]),
            ("/@*/srv", &["- /srv"]),
            ("/**/tmp/", &["- /tmp/", "- /**/tmp/"]),
            ("/***", &["- /***"]),
        ] {
            let rules = for_host(pattern.as_bytes(), "web");
            let rules: Vec<String> = rules
                .into_iter()
                .map(|rule| String::from_utf8(rule).unwrap())
                .collect();
            assert_eq!(rules, expected, "{pattern}");
        }
    }
}
