//! `sprat browse` in tmux: what a person sees, types and gets.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use sprat_testkit::client_and_server::{self, ClientAndServer, FileSystem};
use sprat_testkit::machine::{CONTAINER, TestMachine};
use sprat_testkit::wire::{Door, Loss, WireOptions};
use sprat_testkit::{needs, requires};

/// Far longer than any step takes, on a busy machine too: after it, a step hangs.
const LIMIT: Duration = Duration::from_secs(90);

fn missing() -> Option<String> {
    needs::root().or_else(|| needs::program("tmux"))
}

/// A terminal of 80 columns and 24 rows.
struct Tmux<'m> {
    machine: &'m TestMachine,
    socket: PathBuf,
}

impl<'m> Tmux<'m> {
    /// Runs a program in it; when that has ended, its exit code and the terminal's settings are shown.
    fn run(machine: &'m TestMachine, program: &mut Command) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let socket = machine.path(format!("tmux{number}"));
        let tmux = Self { machine, socket };
        let words = [program.get_program()]
            .into_iter()
            .chain(program.get_args());
        let words: Vec<String> = words.map(|word| quoted(&word.to_string_lossy())).collect();
        let after = "code=$?; echo; echo ended with $code; stty -a; exec sleep 1000";
        let line = format!("{}; {after}", words.join(" "));
        let mut command = tmux.command(&["-f", "/dev/null", "new-session", "-d", "-x", "80"]);
        for (name, value) in program.get_envs() {
            value.map(|value| command.env(name, value));
        }
        command.args(["-y", "24", "sh", "-c", &line]);
        machine.run(&mut command).succeeded();
        tmux
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.machine.command_of("tmux");
        command.env("LANG", "C.UTF-8").env("TERM", "xterm-256color");
        command.args(["-u", "-S"]).arg(&self.socket).args(arguments);
        command
    }

    fn ask(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn shown(&self) -> String {
        self.ask(&["capture-pane", "-p"])
    }

    /// Waits until all these words are shown.
    #[track_caller]
    fn until(&self, words: &[&str]) -> String {
        self.until_it(&words.join(", "), |shown| {
            words.iter().all(|word| shown.contains(word))
        })
    }

    #[track_caller]
    fn until_it(&self, what: &str, is_so: impl Fn(&str) -> bool) -> String {
        let begun = Instant::now();
        loop {
            let shown = self.shown();
            if is_so(&shown) {
                return shown;
            }
            assert!(begun.elapsed() < LIMIT, "no {what} in:\n{shown}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn press(&self, keys: &[&str]) {
        self.ask(&[&["send-keys"], keys].concat());
    }

    fn type_in(&self, text: &str) {
        self.ask(&["send-keys", "-l", text]);
    }

    fn resize(&self, columns: &str, rows: &str) {
        self.ask(&["resize-window", "-x", columns, "-y", rows]);
    }

    /// Opens the only entry of each folder, down to this path of the newest snapshot.
    fn open_down_to(&self, path: &Path) {
        self.press(&["Enter"]);
        for above in path.ancestors().collect::<Vec<_>>().iter().rev() {
            let end = format!(":{}", above.display());
            self.until_it(&end, |shown| {
                let title = shown.lines().next().unwrap_or_default();
                title.trim_end().ends_with(&end)
            });
            if *above != path {
                self.press(&["Enter"]);
            }
        }
    }

    /// The browser ended with this code, and the terminal is as it was.
    #[track_caller]
    fn ended_with(&self, code: i32) -> String {
        let shown = self.until(&[&format!("ended with {code}\n"), " echo "]);
        for word in ["\nisig icanon iexten echo ", " icrnl ixon", "\nopost"] {
            assert!(shown.contains(word), "{shown}");
        }
        let state = "#{alternate_on} #{cursor_flag}";
        assert_eq!(self.ask(&["display-message", "-p", state]).trim(), "0 1");
        shown
    }
}

impl Drop for Tmux<'_> {
    fn drop(&mut self) {
        let mut end = self.command(&["kill-server"]);
        let _ = end.stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The name of a file that would set the title, clear the screen, and turn the text around.
const HOSTILE: &[u8] = b"evil\x1b]0;pwned\x07\x1b[2J\xe2\x80\xae\xff";

/// Two snapshots of `src`.
fn with_two_snapshots(file_system: FileSystem) -> TestMachine {
    let machine = TestMachine::new();
    let name = file_system.name();
    machine.init(&[CONTAINER, "--size", "256M", "--file-system", name]);
    machine.write_old("src/letter", "first\n");
    machine.write_old("src/big/one", vec![b'x'; 30_000]);
    machine.write_old("src/big/below/two", vec![b'y'; 20_000]);
    machine.write_old("src/small/three", "123");
    fs::write(machine.path("src").join(OsStr::from_bytes(HOSTILE)), "x").unwrap();
    machine.backup(&["-q"]).succeeded();
    machine.write("src/letter", "\x1b[31msecond\x1b]0;pwned\x07\tversion\n");
    machine.backup(&["-q"]).succeeded();
    machine
}

fn browse<'m>(machine: &'m TestMachine, more: &[&str]) -> Tmux<'m> {
    let mut command = machine.command();
    command.args(["browse", CONTAINER]).args(more);
    let tmux = Tmux::run(machine, &mut command);
    tmux.until(&["latest", "q quit"]);
    tmux
}

fn a_visit(file_system: FileSystem) {
    let machine = with_two_snapshots(file_system);
    let tmux = browse(&machine, &[]);
    assert_eq!(tmux.shown().matches("complete").count(), 2);

    // Folders, by name and by size.
    let source = machine.path("src");
    tmux.open_down_to(&source);
    let shown = tmux.until(&["big/", "letter", "s sort"]);
    let evil = r"evil\#033]0;pwned\#007\#033[2J\u{202e}";
    assert!(shown.contains(evil), "{shown}");
    assert!(!shown.contains("KiB"), "{shown}");
    tmux.press(&["s"]);
    let shown = tmux.until(&["48.8 KiB", "3 B"]);
    let place = |name: &str| shown.find(name).unwrap();
    assert!(place("big/") < place("letter") && place("letter") < place("small/"));
    tmux.press(&["s"]);
    tmux.until_it("order by name", |shown| {
        shown.find(evil) < shown.find("letter")
    });

    // The file: preview and versions.
    tmux.press(&["Home", "Down", "Down", "Enter"]);
    let shown = tmux.until(&[r"\u{1b}[31msecond\u{1b}]0;pwned\u{7}", "version"]);
    assert!(
        !tmux
            .ask(&["display-message", "-p", "#{pane_title}"])
            .contains("pwned")
    );
    assert!(shown.lines().next().unwrap().contains("; text"), "{shown}");
    tmux.press(&["v"]);
    let shown = tmux.until(&["new: file", "changed"]);
    assert!(shown.find("changed") < shown.find("new: file"), "{shown}");
    tmux.press(&["Down", "p"]);
    tmux.until(&["6 B; text", "first"]);

    // Restore the older version, over a newer file only when asked.
    tmux.press(&["r"]);
    tmux.until(&["To the folder:", "under its own name"]);
    let to = machine.path("home/back");
    clear_and_type(&tmux, &to);
    tmux.press(&["Enter"]);
    tmux.until(&["1 new, 0 replaced", "y restore"]);
    assert!(!to.exists());
    tmux.press(&["y"]);
    tmux.until(&["Restored", "1 file (6 B) copied"]);
    assert_eq!(fs::read(to.join("letter")).unwrap(), b"first\n");
    fs::write(to.join("letter"), "mine, and longer\n").unwrap();
    let plan = || {
        tmux.press(&["Escape"]);
        tmux.until(&["versions", "Left back"]);
        tmux.press(&["r"]);
        clear_and_type(&tmux, &to);
        tmux.press(&["Enter"]);
        tmux.until(&["0 new, 1 replaced", "o overwrite", "k keep"]);
    };
    plan();
    tmux.press(&["y"]);
    tmux.press(&["Escape"]);
    tmux.until(&["nothing was restored"]);
    tmux.press(&["?"]);
    tmux.until(&["Keys"]);
    plan();
    tmux.press(&["k"]);
    tmux.until(&["Restored", "0 files (0 B) copied"]);
    let now = || fs::read_to_string(to.join("letter")).unwrap();
    assert_eq!(now(), "mine, and longer\n");
    plan();
    tmux.press(&["o"]);
    tmux.until(&["Restored", "1 file (6 B) copied"]);
    assert_eq!(now(), "first\n");

    // Several marked paths keep their places.
    tmux.press(&["Escape"]);
    tmux.until(&["Left back"]);
    tmux.press(&["Left", "Left", "Left"]);
    tmux.until(&["small/", "s sort"]);
    tmux.press(&["Home", "Space", "Space"]);
    tmux.until(&["2 marked"]);
    tmux.press(&["r"]);
    tmux.until(&["2 paths", "full path"]);
    let to = machine.path("home/many");
    clear_and_type(&tmux, &to);
    tmux.press(&["Enter"]);
    tmux.until(&["0 replaced", "y restore"]);
    tmux.press(&["y"]);
    tmux.until(&["Restored"]);
    let back = to.join(source.strip_prefix("/").unwrap());
    assert_eq!(fs::read(back.join("big/below/two")).unwrap().len(), 20_000);
    assert!(back.join(OsStr::from_bytes(HOSTILE)).exists());
    assert!(!back.join("letter").exists());

    // What a removal frees.
    tmux.press(&["Escape"]);
    tmux.until(&["s sort"]);
    for _ in source.ancestors() {
        tmux.press(&["Left"]);
    }
    tmux.until(&["f frees"]);
    tmux.press(&["Home", "Space", "Space", "f"]);
    tmux.until(&["removing 2 snapshots frees", "Nothing was removed"]);
    tmux.press(&["q"]);
    tmux.until(&["2 marked", "q quit"]);

    // Other sizes of the terminal.
    tmux.resize("40", "10");
    tmux.until(&["too small: 40x10", "60x16"]);
    tmux.resize("120", "40");
    tmux.until(&["complete, latest", "q quit"]);
    tmux.resize("80", "24");
    tmux.until(&["complete, latest", "q quit"]);
    tmux.press(&["q"]);
    tmux.ended_with(0);
    drop(tmux);
    machine.nothing_is_left();
}

/// Replaces the text that the question offers.
fn clear_and_type(tmux: &Tmux<'_>, path: &Path) {
    let shown = tmux.until(&["To the folder:", "> /"]);
    let line = shown.lines().find(|line| line.contains("> /")).unwrap();
    for _ in 0..line.chars().count() {
        tmux.press(&["BSpace"]);
    }
    tmux.until(&["> _"]);
    tmux.type_in(&path.display().to_string());
    tmux.until(&["_ "]);
}

#[test]
fn visit_of_a_container_with_ext4() {
    requires!(missing());
    a_visit(FileSystem::Ext4);
}

#[test]
fn visit_of_a_container_with_btrfs() {
    requires!(missing(), FileSystem::Btrfs.missing());
    a_visit(FileSystem::Btrfs);
}

#[test]
fn signals_and_a_panic_give_the_terminal_back() {
    requires!(missing());
    let machine = with_two_snapshots(FileSystem::Ext4);
    let tmux = browse(&machine, &[]);
    tmux.press(&["C-c"]);
    tmux.ended_with(130);
    drop(tmux);

    let tmux = browse(&machine, &[]);
    let process = machine.processes();
    let process = process.iter().find(|one| one.line().contains(" browse "));
    let pid = rustix::process::Pid::from_raw(process.unwrap().pid).unwrap();
    // A stop gives it back for a while.
    let signal = |signal| rustix::process::kill_process(pid, signal).unwrap();
    signal(rustix::process::Signal::TSTP);
    tmux.until_it("the shell's screen", |shown| !shown.contains("q quit"));
    signal(rustix::process::Signal::CONT);
    tmux.until(&["complete, latest", "q quit"]);
    signal(rustix::process::Signal::TERM);
    tmux.ended_with(130);
    drop(tmux);
    machine.nothing_is_left();

    let this = std::env::current_exe().unwrap();
    let mut command = Command::new(this);
    command.args(["--exact", "browse::panic_on_the_screen", "--nocapture"]);
    command.env(PANICS, "1");
    let tmux = Tmux::run(&machine, &mut command);
    tmux.ended_with(101);
    // What has scrolled away, too. A screen of its own has no history.
    let shown = tmux.ask(&["capture-pane", "-p", "-S", "-100"]);
    assert!(shown.contains("a panic for a test"), "{shown}");
}

const PANICS: &str = "SPRAT_TEST_PANICS";

/// Panics where the test above runs it.
#[test]
fn panic_on_the_screen() {
    if std::env::var_os(PANICS).is_some() {
        let _ = sprat_browse::on_screen(|_| panic!("a panic for a test"));
    }
}

#[test]
fn it_ends_when_its_terminal_is_gone() {
    requires!(missing());
    let machine = with_two_snapshots(FileSystem::Ext4);
    // In a session of its own: the end of the terminal sends it no signal.
    let program = machine.command();
    let mut command = machine.command_of("setsid");
    command.arg("--wait").arg(program.get_program());
    command.args(["browse", CONTAINER]);
    let tmux = Tmux::run(&machine, &mut command);
    tmux.until(&["complete, latest"]);
    let browses = || {
        machine
            .processes()
            .iter()
            .any(|one| one.line().contains(" browse "))
    };
    assert!(browses());
    tmux.ask(&["kill-server"]);
    let begun = Instant::now();
    while browses() {
        assert!(begun.elapsed() < LIMIT, "it goes on without a terminal");
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(tmux);
    machine.nothing_is_left();
}

#[test]
fn colours_only_where_they_are_welcome() {
    requires!(missing());
    let machine = with_two_snapshots(FileSystem::Ext4);
    for (no_colour, is_coloured) in [("", true), ("1", false)] {
        let mut command = machine.command();
        command
            .args(["browse", CONTAINER])
            .env("NO_COLOR", no_colour);
        let tmux = Tmux::run(&machine, &mut command);
        tmux.until(&["latest"]);
        tmux.open_down_to(&machine.path("src"));
        tmux.until(&["big/"]);
        let shown = tmux.ask(&["capture-pane", "-p", "-e"]);
        assert_eq!(shown.contains("38;5;4m"), is_coloured, "{shown}");
        tmux.press(&["q"]);
        tmux.ended_with(0);
    }
    machine.nothing_is_left();
}

#[test]
fn backup_runs_while_nobody_asks_and_is_seen_then() {
    requires!(missing());
    let machine = with_two_snapshots(FileSystem::Ext4);
    let tmux = browse(&machine, &["--close-after", "1s"]);
    let begun = Instant::now();
    // As long as the browser has the container open, a backup is refused.
    while machine.backup(&["-q"]).code != 0 {
        assert!(begun.elapsed() < LIMIT, "the browser keeps the container");
        std::thread::sleep(Duration::from_millis(200));
    }
    tmux.press(&["F5"]);
    let three = |shown: &str| shown.matches("complete").count() == 3;
    tmux.until_it("three snapshots", three);
    tmux.open_down_to(&machine.path("src"));
    tmux.until(&["letter"]);
    tmux.press(&["q"]);
    tmux.ended_with(0);
    drop(tmux);
    machine.nothing_is_left();
}

#[test]
fn without_a_terminal_it_ends_with_words() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    let whole = machine.sprat(&["browse", CONTAINER]).failed_with(2);
    assert!(whole.contains("no terminal to browse on"), "{whole}");
    machine
        .sprat(&["browse", CONTAINER, "--json"])
        .failed_with(2);
    machine.nothing_is_left();
}

const SLOW: WireOptions = WireOptions {
    round_trip: Duration::from_millis(200),
    bytes_per_s: Some(3_000_000),
};

#[test]
fn slow_or_lost_server_never_keeps_a_key_waiting() {
    requires!(client_and_server::missing(), missing());
    let mut pair = ClientAndServer::new();
    pair.init(1);
    let source = pair.path("source");
    for number in 0..200 {
        let folder = source.join(format!("d{}", number % 20));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("f{number}")), vec![7; 3000]).unwrap();
    }
    pair.backup("slow", &source);
    let pair = pair.behind_wire(SLOW);
    let mut command = pair.sprat();
    command.args(["--no-cache", "--reconnect-max", "3"]);
    command.args(["browse", pair.target()]);
    let tmux = Tmux::run(&pair.machine, &mut command);
    tmux.until(&["latest", "q quit"]);
    tmux.open_down_to(&source);
    tmux.until(&["d0/", "d19/"]);

    // Nothing arrives, and every key does what it does.
    pair.connection().hold(true);
    tmux.press(&["z"]);
    tmux.until(&["sizes: ", "of 20 folders, Esc stops"]);
    tmux.press(&["?"]);
    tmux.until(&["Ctrl-C ends at once"]);
    tmux.press(&["Escape"]);
    tmux.until_it("no dialog", |shown| !shown.contains("Ctrl-C ends at once"));
    tmux.press(&["End"]);
    tmux.press(&["Escape"]);
    tmux.until(&["stopped"]);
    tmux.press(&["Enter"]);
    tmux.until(&["reading the folder"]);
    tmux.press(&["Escape"]);
    tmux.until(&["stopped"]);
    pair.connection().hold(false);
    tmux.press(&["Home", "Enter"]);
    tmux.until(&[":", "f0", "f180"]);
    tmux.press(&["Left", "z"]);
    tmux.until_it("all sizes", |shown| shown.matches("29.2 KiB").count() == 20);

    // Lost for good.
    pair.connection().door(Door::Refusing);
    pair.connection().lose(Loss::Reset);
    tmux.press(&["Home", "Enter"]);
    tmux.until(&["f0", "f180"]);
    tmux.press(&["Enter"]);
    let shown = tmux.ended_with(14);
    assert!(shown.contains("Caused by:"), "{shown}");
    drop(tmux);
    pair.machine.nothing_is_left();
}
