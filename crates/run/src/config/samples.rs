//! The patterns of `exclude_sample`: those that are installed, else those in this program.

use std::io;
use std::path::Path;

/// Where packages install the samples.
pub const INSTALLED: &str = "/usr/share/sprat/exclude";

/// The lines of a sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lines {
    /// Its patterns.
    Patterns(Vec<String>),
    /// The installed file is there and can't be read. The run must name it.
    Unreadable(std::path::PathBuf),
}

/// The patterns of the sample `NAME.txt` in `folder`. If that file is not there, `built_in` counts.
#[must_use]
pub fn read(folder: &Path, name: &str, built_in: &str) -> Lines {
    let file = folder.join(format!("{name}.txt"));
    match std::fs::read_to_string(&file) {
        Ok(text) => Lines::Patterns(patterns(&text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Lines::Patterns(patterns(built_in))
        }
        Err(_) => Lines::Unreadable(file),
    }
}

/// The lines that are no comments, as rsync reads them.
fn patterns(text: &str) -> Vec<String> {
    let lines = text.split(['\n', '\r']);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with(['#', ';']));
    lines.map(str::to_owned).collect()
}

/// The sample for home folders, as it ships with this version.
pub const HOME: &str = include_str!("../../../../dist/exclude/home.txt");
/// The sample for a whole system, as it ships with this version.
pub const SYSTEM: &str = include_str!("../../../../dist/exclude/system.txt");

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failing test panics")]
mod tests {
    use super::*;

    #[test]
    fn samples_have_only_patterns_that_can_match() {
        for text in [HOME, SYSTEM] {
            let patterns = patterns(text);
            assert!(patterns.len() > 20);
            for pattern in patterns {
                assert_eq!(sprat_snapshot::pattern_mistake(&pattern), None, "{pattern}");
                assert_eq!(pattern.trim(), pattern);
            }
        }
    }

    #[test]
    fn an_installed_sample_replaces_the_one_in_the_program() {
        let folder = tempfile::tempdir().unwrap();
        let built_in = "# a\n.cache/\n\n; b\n*~\n";
        let read = |name| read(folder.path(), name, built_in);
        let patterns = |list: &[&str]| Lines::Patterns(list.iter().map(|p| (*p).into()).collect());
        assert_eq!(read("home"), patterns(&[".cache/", "*~"]));
        std::fs::write(folder.path().join("home.txt"), "mine\r\n#\n").unwrap();
        assert_eq!(read("home"), patterns(&["mine"]));
        let folder_instead = folder.path().join("system.txt");
        std::fs::create_dir(&folder_instead).unwrap();
        assert_eq!(read("system"), Lines::Unreadable(folder_instead));
    }
}
