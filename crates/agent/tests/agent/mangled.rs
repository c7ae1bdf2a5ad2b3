//! Files of the agent's own that are damaged in any way: what is read is an error or right, and nothing panics. And the
//! system calls that a client can bring the agent to.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Instant, SystemTime};

use sprat_testkit::dice::{self, Dice};
use sprat_testkit::{needs, requires};

use crate::client::{BLOCK, EAGER, READ, READ_WRITE, Served, all_files, blocks};
use crate::hostile::{REFUSED, Target, request};
use crate::limits::peak_kib;
use crate::sessions::begin;
use crate::storm::about;
use crate::watched::{Watch, cpu_time, fuzz_until};

const BLOCKS: usize = 48;

fn block(number: usize) -> u64 {
    (number * BLOCK) as u64
}

/// Makes a container with holes, and generations with each of these policies in turn. Then one of them is merged into
/// another. Returns their states.
fn history(served: &Served, policies: &[&str]) -> BTreeMap<u32, Vec<u8>> {
    let file = fs::File::create(served.path("x.luks")).unwrap();
    file.set_len(block(BLOCKS)).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &blocks(30, 1), 0).unwrap();
    let mut states = BTreeMap::new();
    let mut dice = Dice::new(3);
    for (number, policy) in (1..=6).zip(policies.iter().cycle()) {
        served.set_policy(policy);
        states.insert(number, served.live());
        let writes: Vec<_> = (0..5)
            .map(|_| {
                let at = usize::try_from(dice.below(BLOCKS as u64 - 2)).unwrap();
                (block(at), blocks(2, dice.any()))
            })
            .collect();
        served.overwrite(&writes);
    }
    served.run(&["expire", "x.luks", &served.head(3, "name"), "--yes"]);
    states.remove(&3);
    states
}

/// Other bytes, fewer, more, or none.
fn mangle(bytes: &[u8], dice: &mut Dice) -> Vec<u8> {
    let mut new = bytes.to_vec();
    let mut place = |len: usize| usize::try_from(dice.below(len.max(1) as u64)).unwrap();
    match place(6) {
        0 | 1 if !new.is_empty() => {
            let at = place(new.len());
            new[at] ^= 1 << place(8);
        }
        2 => new.truncate(place(bytes.len())),
        3 if !new.is_empty() => {
            let (from, to) = (place(new.len()), place(new.len()));
            new[from.min(to)..from.max(to)].fill(0);
        }
        4 => new.extend(vec![7; place(9000)]),
        _ => {
            let from = place(bytes.len());
            let end = bytes.len().min(from + place(700));
            new[from..end].fill_with(|| u8::try_from(place(256)).unwrap());
        }
    }
    new
}

/// A root with everything in it.
struct Whole {
    files: BTreeMap<PathBuf, Vec<u8>>,
    folders: Vec<PathBuf>,
    modified: SystemTime,
}

impl Whole {
    fn of(served: &Served) -> Self {
        let all = all_files(&served.path(".sprat-agent"));
        let (folders, mut files): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|path| path.is_dir());
        let container = served.path("x.luks");
        let modified = fs::metadata(&container).unwrap().modified().unwrap();
        files.push(container);
        let read = |path: PathBuf| (path.clone(), fs::read(path).unwrap());
        Self {
            files: files.into_iter().map(read).collect(),
            folders,
            modified,
        }
    }

    /// Everything is as it was. The container stays the same file.
    fn put_back(&self, served: &Served) {
        for path in all_files(&served.path(".sprat-agent")).iter().rev() {
            if path.is_dir() && !self.folders.contains(path) {
                fs::remove_dir(path).unwrap();
            } else if path.is_file() && !self.files.contains_key(path) {
                fs::remove_file(path).unwrap();
            }
        }
        for folder in &self.folders {
            fs::create_dir_all(folder).unwrap();
        }
        for (path, bytes) in &self.files {
            if fs::read(path).ok().as_ref() != Some(bytes) {
                fs::write(path, bytes).unwrap();
            }
        }
        let container = fs::File::options().write(true).open(served.path("x.luks"));
        container.unwrap().set_modified(self.modified).unwrap();
    }
}

/// A client writes. It may be refused.
fn write(watch: &mut Watch, served: &Served, dice: &mut Dice, what: &str) -> bool {
    let mut client = watch.connect(served);
    let Ok(handle) = client.open("x.luks", READ_WRITE) else {
        assert_eq!(client.end_code(), Some(0), "{what}");
        return false;
    };
    let writes: Vec<_> = (0..4)
        .map(|_| {
            let at = usize::try_from(dice.below(BLOCKS as u64 - 2)).unwrap();
            (block(at), blocks(2, dice.any()))
        })
        .collect();
    let is_written = client.write_all(&handle, &writes) == writes.len();
    let peak = peak_kib(&client);
    assert!(peak <= 32 * 1024, "{what}: {peak} KiB");
    assert_eq!(client.end_code(), Some(0), "{what}");
    is_written
}

/// What a client reads of all states. Returns how many reads were refused.
fn read_all(
    watch: &mut Watch,
    served: &Served,
    states: &BTreeMap<u32, Vec<u8>>,
    names: &[String],
    what: &str,
) -> u32 {
    let mut client = watch.connect(served);
    let mut refused = 0;
    for (name, state) in names.iter().zip(states.values()) {
        let Ok(handle) = client.open(name, READ) else {
            refused += 1;
            continue;
        };
        for number in (0..BLOCKS).step_by(4) {
            let at = number * BLOCK;
            match client.read(&handle, block(number), 4 * 4096) {
                Ok(found) => assert!(
                    found == state[at..at + 4 * BLOCK],
                    "{what}: block {number} of {name}\n{}",
                    about(served)
                ),
                Err(_) => refused += 1,
            }
        }
        client.close(&handle);
    }
    let peak = peak_kib(&client);
    assert!(peak <= 32 * 1024, "{what}: {peak} KiB");
    assert_eq!(client.end_code(), Some(0), "{what}");
    refused
}

#[test]
fn mangled_files_of_the_agent_are_an_error_and_never_other_content() {
    requires!(needs::program("strace"));
    never_other_content(&Served::new(EAGER), &[EAGER], fuzz_until());
}

/// Each connection is watched, and so is its memory. Each file once at least.
pub fn never_other_content(served: &Served, policies: &[&str], until: Instant) {
    let mut dice = Dice::new(dice::new_seed());
    let states = history(served, policies);
    let names: Vec<String> = states.keys().map(|n| served.past_path(*n)).collect();
    let mut all = all_files(&served.path(".sprat-agent"));
    all.retain(|path| path.is_file());
    all.sort();
    assert!(all.len() > 28, "{all:?}");
    let mut watch = Watch::new();
    assert_eq!(read_all(&mut watch, served, &states, &names, "nothing"), 0);
    let whole_root = Whole::of(served);
    let (mut refused, mut count, mut written) = (0, 0, 0);
    while Instant::now() < until || count < all.len() {
        let path = &all[count % all.len()];
        count += 1;
        let whole = &whole_root.files[path];
        let mangled = match path.ends_with("image") {
            // Nothing shows a flipped bit of a clone.
            true => whole[..usize::try_from(dice.below(whole.len() as u64)).unwrap()].to_vec(),
            false => mangle(whole, &mut dice),
        };
        fs::write(path, &mangled).unwrap();
        let what = format!("{count}, {}", path.display());
        // A root whose format or policy can't be read is not served.
        if path.ends_with("format") || path.ends_with("policy") {
            drop(served.command(&["list"]).output().unwrap());
        } else {
            // The bits have no checksum: they are of this boot, and never read from a disk after it.
            if !path.ends_with("bits") && dice.percent(50) {
                written += u32::from(write(&mut watch, served, &mut dice, &what));
            }
            refused += read_all(&mut watch, served, &states, &names, &what);
        }
        let commands: [&[&str]; 4] = [&["status"], &["list"], &["check"], &["policy", "check"]];
        let command = commands[usize::try_from(dice.below(4)).unwrap()];
        let output = served.command(command).output().unwrap();
        let code = output.status.code();
        assert!(
            code.is_some_and(|code| code <= 5),
            "{what}: {command:?}: {output:?}"
        );
        whole_root.put_back(served);
    }
    assert!(refused > 0 && written > 0, "{refused} {written}");
    assert_eq!(
        read_all(&mut watch, served, &states, &names, "everything is back"),
        0
    );
    watch.check();
    println!(
        "{count} files, {written} sessions wrote, {refused} reads refused; {}",
        cpu_time()
    );
}

/// Requests of every kind, and the list of attacks.
#[test]
fn a_client_brings_the_agent_to_no_other_system_calls_than_these() {
    requires!(needs::program("strace"));
    let target = Target::untouched("free_min = 0%\nsize_max = 1G\n");
    target.served.overwrite(&[(block(40), vec![1; BLOCK])]);
    let mut watch = Watch::new();
    let mut dice = Dice::new(dice::seed());
    for part in 0..3 {
        let mut client = watch.connect(&target.served);
        begin(&mut client);
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        assert_eq!(client.write(&handle, block(part), &[9; BLOCK]), 0);
        let past = target.served.past_path(1);
        client.content(&past).unwrap();
        for (_, attack) in REFUSED.iter().skip(part * 16).take(16) {
            attack(&mut client, &target);
        }
        for _ in 0..200 {
            let (kind, body) = request(&mut dice);
            if kind != 1 && client.ask(kind, &body).is_none() {
                break;
            }
        }
        client.end_anyhow();
    }
    watch.check();
}
