//! Patterns of names and paths.

use std::path::{Path, PathBuf};

use globset::{GlobBuilder, GlobMatcher};

/// The text is no pattern.
#[derive(Debug)]
pub enum PatternError {
    /// A bracket or a brace is not closed.
    Syntax(globset::Error),
    /// It can match no path.
    NeverMatches(&'static str),
}

impl std::fmt::Display for PatternError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Syntax(error) => write!(f, "{error}"),
            Self::NeverMatches(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for PatternError {}

/// What a name or a path must look like.
#[derive(Debug)]
pub struct Pattern {
    glob: GlobMatcher,
    /// It has a slash, and is compared with the whole path.
    is_path: bool,
    /// All matches lie in this folder.
    begins: PathBuf,
}

impl Pattern {
    /// Reads a pattern. `*` and `?` match no slash, `**` also matches slashes. Without a slash it is compared
    /// with the last name of a path. With one it is compared with the whole path, and may begin at any folder
    /// unless the slash is its first character.
    ///
    /// # Errors
    /// A bracket or a brace is not closed, or no path can match.
    pub fn parse(text: &str, ignore_case: bool) -> Result<Self, PatternError> {
        if let Some(why) = never_matches(text) {
            return Err(PatternError::NeverMatches(why));
        }
        let is_path = text.contains('/');
        let whole = match is_path && !text.starts_with('/') {
            true => format!("**/{text}"),
            false => text.to_owned(),
        };
        let glob = GlobBuilder::new(&whole)
            .literal_separator(true)
            .backslash_escape(true)
            .case_insensitive(ignore_case)
            .build()
            .map_err(PatternError::Syntax)?;
        let is_literal = |name: &&str| !ignore_case && !name.contains(['*', '?', '[', '{', '\\']);
        let mut names: Vec<&str> = whole.split('/').take_while(is_literal).collect();
        // The last name is what is searched for.
        if names.len() == whole.split('/').count() {
            names.pop();
        }
        let begins = match whole.starts_with('/') {
            true => names.iter().skip(1).collect(),
            false => PathBuf::new(),
        };
        Ok(Self {
            glob: glob.compile_matcher(),
            is_path,
            begins,
        })
    }

    /// Whether it matches the path, which begins with a slash.
    #[must_use]
    pub fn matches(&self, path: &Path) -> bool {
        match (self.is_path, path.file_name()) {
            (false, Some(name)) => self.glob.is_match(Path::new(name)),
            _ => self.glob.is_match(path),
        }
    }

    /// The folder in which all matches lie.
    pub(crate) fn begins(&self) -> &Path {
        &self.begins
    }
}

/// Why a pattern can match no path.
fn never_matches(text: &str) -> Option<&'static str> {
    let mut names = text.strip_prefix('/').unwrap_or(text).split('/');
    let is_no_name = |name: &str| matches!(name, "" | "." | "..");
    match text {
        "" => Some("it is empty"),
        _ if names.any(is_no_name) => Some(
            "no file is named '.' or '..', and no path has two slashes in a row or a slash at its end; \
             omit that part",
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_names_and_paths() {
        for (pattern, path, wanted) in [
            ("fstab", "/etc/fstab", true),
            ("fstab", "/etc/fstab/x", false),
            ("*.conf", "/etc/a.conf", true),
            ("*.conf", "/etc/a.confx", false),
            ("etc/*.conf", "/etc/a.conf", true),
            ("etc/*.conf", "/usr/etc/a.conf", true),
            ("etc/*.conf", "/etc/x/a.conf", false),
            ("/etc/*.conf", "/usr/etc/a.conf", false),
            ("/etc/**", "/etc/x/a.conf", true),
            ("/etc/**/a.conf", "/etc/a.conf", true),
            ("[ab]", "/b", true),
            ("\\*", "/*", true),
            ("\\*", "/a", false),
            ("?", "/b", true),
            ("FSTAB", "/etc/fstab", false),
        ] {
            let found = Pattern::parse(pattern, false)
                .unwrap()
                .matches(path.as_ref());
            assert_eq!(found, wanted, "{pattern} {path}");
        }
        let any_case = Pattern::parse("FSTAB", true).unwrap();
        assert!(any_case.matches("/etc/fstab".as_ref()));
        for wrong in ["[a", "", "/", ".", "/etc/", "//etc", "/a/../b", "./a"] {
            assert!(Pattern::parse(wrong, false).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_that_are_no_text_match() {
        use std::os::unix::ffi::OsStrExt;
        let path = Path::new(std::ffi::OsStr::from_bytes(b"/a/caf\xe9\n"));
        assert!(Pattern::parse("caf*", false).unwrap().matches(path));
        assert!(Pattern::parse("caf??", false).unwrap().matches(path));
    }

    #[test]
    fn search_begins_where_all_matches_lie() {
        for (pattern, begins) in [
            ("/etc/ssh/*.conf", "etc/ssh"),
            ("/etc/fstab", "etc"),
            ("/etc/*/x", "etc"),
            ("/*", ""),
            ("etc/x", ""),
            ("fstab", ""),
        ] {
            let found = Pattern::parse(pattern, false).unwrap();
            assert_eq!(found.begins(), Path::new(begins), "{pattern}");
        }
        assert_eq!(
            Pattern::parse("/etc/x", true).unwrap().begins(),
            Path::new("")
        );
    }
}
