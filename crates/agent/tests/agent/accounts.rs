//! The set-up as `adopt` prints it, with an account for each client: a real sshd with `Match User` and `ForceCommand`.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::PathBuf;
use std::process::{Command, Output};

use sprat_testkit::ssh_server::{OpenSshOptions, SshServer, openssh};
use sprat_testkit::{needs, requires};

use crate::client::{BLOCK, CREATE_NEW, Client, READ, READ_WRITE, agent, all_files, blocks};

/// Accounts of the test's own sshd.
const ACCOUNTS: [(&str, u32); 2] = [("sprat-laptop", 61_234), ("sprat-other", 61_235)];

/// Runs a command as this account, named by its number: only the test's sshd knows its name.
fn as_account(number: u32, command: &str) -> Output {
    let number = number.to_string();
    Command::new("setpriv")
        .args(["--reuid", &number, "--regid", &number, "--clear-groups"])
        .args(["--reset-env", "sh", "-c", command])
        .output()
        .unwrap()
}

/// The lines of a text from one on, up to an empty one.
fn paragraph(text: &str, begin: &str) -> String {
    let from = text.lines().skip_while(|line| !line.starts_with(begin));
    let lines: Vec<&str> = from.take_while(|line| !line.is_empty()).collect();
    assert!(!lines.is_empty(), "no {begin}: {text}");
    lines.join("\n")
}

struct Server {
    folder: tempfile::TempDir,
    sshd: Option<SshServer>,
    /// What `adopt` printed for each account.
    printed: Vec<String>,
}

impl Server {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut server = Self {
            folder,
            sshd: None,
            printed: Vec::new(),
        };
        fs::copy(agent(), server.path("sprat-agent")).unwrap();
        fs::create_dir(server.path("keys")).unwrap();
        let mut config = String::new();
        for (name, number) in ACCOUNTS {
            let root = server.path(name);
            fs::create_dir(&root).unwrap();
            fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).unwrap();
            fs::write(root.join("x.luks"), blocks(8, number.into())).unwrap();
            for path in [&root, &root.join("x.luks")] {
                chown(path, Some(number), Some(number)).unwrap();
            }
            let adopt = format!(
                "{} adopt --root {}",
                server.path("sprat-agent").display(),
                root.display()
            );
            let output = as_account(number, &adopt);
            assert!(output.status.success(), "{output:?}");
            let text = String::from_utf8(output.stdout).unwrap();
            let keys = server.path("keys").display().to_string();
            // The machine's own accounts do not have this one.
            config += &paragraph(&text, "Match User")
                .replace(&number.to_string(), name)
                .replace("/etc/sprat-agent", &keys);
            config += "\n";
            server.printed.push(text);
        }
        let sshd = SshServer::start_with(&OpenSshOptions {
            config_lines: vec![config, "Match all".to_owned()],
            accounts: ACCOUNTS
                .map(|(name, number)| (name.to_owned(), number))
                .into(),
            ..OpenSshOptions::default()
        });
        for (name, _) in ACCOUNTS {
            let key = server.path("keys").join(format!("{name}.keys"));
            fs::copy(sshd.path("authorized_keys"), key).unwrap();
        }
        server.sshd = Some(sshd);
        server
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn ssh(&self, account: &str) -> Command {
        let words = self.sshd.as_ref().unwrap().ssh_command();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(["-l", account]);
        command
    }

    fn connect(&self, account: &str) -> Client {
        let mut command = self.ssh(account);
        command.args(["any.host", "-s", "sftp"]);
        Client::start(command)
    }
}

#[test]
fn the_set_up_that_adopt_prints_gives_each_client_its_own_folder_and_nothing_else() {
    requires!(openssh::missing(), needs::program("setpriv"));
    let server = Server::new();
    let [laptop, other] = ACCOUNTS.map(|(name, _)| server.path(name));
    let mut client = server.connect("sprat-laptop");
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(client.write(&handle, 0, &[1; BLOCK]), 0);
    client
        .open("y.luks.new-0123456789abcdef", CREATE_NEW)
        .unwrap();
    assert_eq!(client.rename("y.luks.new-0123456789abcdef", "y.luks"), 0);
    // The other client's folder does not exist for this one.
    for path in [other.join("x.luks"), other.join(".sprat-agent/policy")] {
        client.open(path.to_str().unwrap(), READ).unwrap_err();
    }
    client.end();
    let own = ACCOUNTS[0].1;
    for path in all_files(&laptop) {
        let found = path.metadata().unwrap();
        assert!(
            (found.uid(), found.gid()) == (own, own),
            "{}",
            path.display()
        );
        let is_private = found.mode() & 0o077 == 0 || path == laptop.join("x.luks");
        assert!(is_private, "{}: {:o}", path.display(), found.mode());
    }
    // Nor for anything that its account runs on the server.
    for command in ["ls", "cat", "touch"] {
        let command = format!("{command} {}/x.luks", laptop.display());
        let output = as_account(ACCOUNTS[1].1, &command);
        assert!(!output.status.success(), "{command}: {output:?}");
    }
    let typed = server.path("typed");
    fs::write(&typed, "id; id; id\n").unwrap();
    for words in [
        &["any.host", "id"][..],
        &["any.host"],
        &["-W", "127.0.0.1:22", "any.host"],
        &["-tt", "any.host", "sh"],
    ] {
        let mut command = server.ssh("sprat-laptop");
        let output = command.args(words).stdin(fs::File::open(&typed).unwrap());
        let output = output.output().unwrap();
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            !output.status.success() && !printed.contains("uid"),
            "{words:?}: {output:?}"
        );
    }
    // cron runs the rest of its line as the account.
    let line = paragraph(&server.printed[0], "7 * * * * ");
    let output = as_account(own, line.strip_prefix("7 * * * * ").unwrap());
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("x.luks: 0 past states expired"));
    // A folder of root's is no folder of a client's.
    let root = server.path("of-root");
    fs::create_dir(&root).unwrap();
    let mut adopt = Command::new(agent());
    let output = adopt.args(["adopt", "--root"]).arg(root).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("belongs to root") && !text.contains("Match User"),
        "{text}"
    );
}
