//! What the tests of a hostile server run.

/// One command line. `@` stands for the container on the hostile server, `%` for its folder.
#[derive(Debug)]
pub struct Command {
    pub name: &'static str,
    pub words: &'static [&'static str],
    /// The folder of the newest snapshot changes to the content of `src`.
    pub backs_up: bool,
}

const fn command(name: &'static str, words: &'static [&'static str]) -> Command {
    Command {
        name,
        words,
        backs_up: false,
    }
}

/// Every command that asks a server for something.
pub const COMMANDS: [Command; 21] = [
    Command {
        name: "backup",
        words: &["backup", "@", "--name", "home", "src"],
        backs_up: true,
    },
    command(
        "restore",
        &["--no-cache", "restore", "@", "home", "--to", "out"],
    ),
    command(
        "restore with a cache",
        &["restore", "@", "home", "--to", "out"],
    ),
    command("snapshots", &["snapshots", "@"]),
    command("check", &["check", "@"]),
    command("check --read-data", &["check", "@", "--read-data"]),
    command(
        "prune",
        &["prune", "@", "--job", "home", "--keep-last", "1"],
    ),
    command("trim", &["trim", "@"]),
    command("trim --rewrite", &["trim", "@", "--rewrite"]),
    command("grow", &["grow", "@", "192M"]),
    command("copy from", &["copy", "@", "copied.luks"]),
    command("copy to", &["copy", "local/x.luks", "%/copied.luks"]),
    command("key list", &["key", "list", "@"]),
    command(
        "key add",
        &[
            "--key-file",
            "key",
            "key",
            "add",
            "@",
            "--new-passphrase-file",
            "pass",
        ],
    ),
    command(
        "key remove",
        &[
            "--key-file",
            "key",
            "key",
            "remove",
            "@",
            "1",
            "--allow-last",
        ],
    ),
    command("key header-backup", &["key", "header-backup", "@", "kept"]),
    command("unlock", &["unlock", "@", "--watch", "1"]),
    command("status", &["status", "@"]),
    command("doctor", &["doctor", "@"]),
    command(
        "init",
        &[
            "--key-file",
            "other.key",
            "init",
            "%/new.luks",
            "--size",
            "64M",
        ],
    ),
    command("mount", &["mount", "@", "mnt"]),
];
