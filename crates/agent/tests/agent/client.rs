//! A folder served by the agent, and a client that sends any request.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use tempfile::TempDir;

pub const BLOCK: usize = 4096;
pub const READ: u32 = 1;
pub const READ_WRITE: u32 = 3;
pub const CREATE_NEW: u32 = 0x2b;

/// Every session begins a generation.
pub const EAGER: &str =
    "new = burst 1000000, then 1 per 1s\nsecret = 6h\nfree_min = 0%\nheader = free\n";
/// So does about every second.
pub const RESTLESS: &str =
    "new = burst 1000000, then 1 per 1s\nsecret = 1s\nfree_min = 0%\nheader = free\n";

pub fn agent() -> PathBuf {
    env!("CARGO_BIN_EXE_sprat-agent").into()
}

/// An adopted root.
pub struct Served {
    folder: TempDir,
}

impl Served {
    pub fn new(policy: &str) -> Self {
        Self::in_folder(&std::env::temp_dir(), policy)
    }

    /// In a new folder below another one.
    pub fn in_folder(folder: &Path, policy: &str) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("sprat-agent-")
            .tempdir_in(folder)
            .unwrap();
        let served = Self { folder };
        served.run(&["adopt"]);
        served.set_policy(policy);
        served
    }

    /// For connections that begin later.
    pub fn set_policy(&self, policy: &str) {
        let new = self.path(".sprat-agent/policy.new");
        fs::write(&new, policy).unwrap();
        fs::rename(new, self.path(".sprat-agent/policy")).unwrap();
    }

    /// With a container `x.luks` of these bytes.
    pub fn with_container(policy: &str, content: &[u8]) -> Self {
        let served = Self::new(policy);
        fs::write(served.path("x.luks"), content).unwrap();
        served
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn live(&self) -> Vec<u8> {
        fs::read(self.path("x.luks")).unwrap()
    }

    /// A command of the agent for this root.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(agent());
        command.args(words).arg("--root").arg(self.folder.path());
        command
    }

    /// Runs a command that succeeds.
    #[track_caller]
    pub fn run(&self, words: &[&str]) -> String {
        let output = self.command(words).output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn connect(&self) -> Client {
        Client::start(self.command(&["serve"]))
    }

    /// Overwrites blocks in a session of its own.
    pub fn overwrite(&self, writes: &[(u64, Vec<u8>)]) {
        let mut client = self.connect();
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        for (offset, data) in writes {
            assert_eq!(client.write(&handle, *offset, data), 0);
        }
        client.end();
    }

    /// The numbers of the generations on the disk.
    pub fn numbers(&self) -> Vec<u32> {
        let entries = fs::read_dir(self.path(".sprat-agent/x.luks"));
        let mut numbers: Vec<u32> = entries
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                entry
                    .unwrap()
                    .file_name()
                    .to_str()?
                    .strip_prefix("g.")?
                    .parse()
                    .ok()
            })
            .collect();
        numbers.sort_unstable();
        numbers
    }

    /// A value in a generation's head.
    pub fn head(&self, number: u32, key: &str) -> String {
        let text =
            fs::read_to_string(self.path(&format!(".sprat-agent/x.luks/g.{number}/head"))).unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        line.unwrap().to_owned()
    }

    /// Where the client finds the state that a generation began with.
    pub fn past_path(&self, number: u32) -> String {
        format!(".generations/x.luks/{}", self.head(number, "name"))
    }

    /// The whole past state, as a client reads it.
    #[track_caller]
    pub fn past(&self, number: u32) -> Vec<u8> {
        let mut client = self.connect();
        let content = client.content(&self.past_path(number));
        client.end();
        content.unwrap_or_else(|status| panic!("generation {number}: status {status}"))
    }

    /// A file of the agent's own, open for damage.
    pub fn own_file(&self, name: &str) -> fs::File {
        let path = self.path(&format!(".sprat-agent/x.luks/{name}"));
        fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .unwrap()
    }

    pub fn flip(&self, name: &str, at: u64) {
        let file = self.own_file(name);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }
}

pub type Status = u32;

/// A connection to an agent.
pub struct Client {
    pub child: Child,
    input: Option<ChildStdin>,
    output: ChildStdout,
    next_id: u32,
}

pub fn string(bytes: &[u8]) -> Vec<u8> {
    let mut out = u32::try_from(bytes.len()).unwrap().to_be_bytes().to_vec();
    out.extend(bytes);
    out
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

impl Client {
    pub fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take(), child.stdout.take().unwrap());
        let mut client = Self {
            child,
            input,
            output,
            next_id: 1,
        };
        // A killed agent does not greet.
        if client.send_raw(&[0, 0, 0, 5, 1, 0, 0, 0, 3]) {
            client.receive();
        }
        client
    }

    /// Sends bytes. False: the agent is gone.
    pub fn send_raw(&mut self, bytes: &[u8]) -> bool {
        self.input.as_mut().unwrap().write_all(bytes).is_ok()
    }

    fn packet(&mut self, kind: u8, body: &[u8]) -> Vec<u8> {
        let mut packet = u32::try_from(body.len() + 5)
            .unwrap()
            .to_be_bytes()
            .to_vec();
        packet.push(kind);
        packet.extend(self.next_id.to_be_bytes());
        self.next_id += 1;
        packet.extend(body);
        packet
    }

    /// The next answer without its length; `None`: the agent is gone.
    pub fn receive(&mut self) -> Option<Vec<u8>> {
        let mut len = [0; 4];
        self.output.read_exact(&mut len).ok()?;
        let mut body = vec![0; u32::from_be_bytes(len) as usize];
        self.output.read_exact(&mut body).ok()?;
        Some(body)
    }

    /// Sends a request and returns type and fields of the answer.
    pub fn ask(&mut self, kind: u8, body: &[u8]) -> Option<(u8, Vec<u8>)> {
        let packet = self.packet(kind, body);
        if !self.send_raw(&packet) {
            return None;
        }
        let answer = self.receive()?;
        Some((answer[0], answer[5..].to_vec()))
    }

    /// The status that answers a request; 0 for an answer that is no status.
    #[track_caller]
    pub fn status(&mut self, kind: u8, body: &[u8]) -> Status {
        let (kind, answer) = self.ask(kind, body).expect("the agent answers");
        if kind == 101 { word(&answer, 0) } else { 0 }
    }

    pub fn path_request(&mut self, kind: u8, path: &str) -> Status {
        self.status(kind, &string(path.as_bytes()))
    }

    pub fn extended(&mut self, name: &str, rest: &[&[u8]]) -> Status {
        let mut body = string(name.as_bytes());
        rest.iter().for_each(|field| body.extend(string(field)));
        self.status(200, &body)
    }

    pub fn open(&mut self, path: &str, flags: u32) -> Result<Vec<u8>, Status> {
        let mut body = string(path.as_bytes());
        body.extend(flags.to_be_bytes());
        body.extend([0; 4]);
        let (kind, answer) = self.ask(3, &body).ok_or(u32::MAX)?;
        if kind == 102 {
            Ok(answer[4..].to_vec())
        } else {
            Err(word(&answer, 0))
        }
    }

    pub fn close(&mut self, handle: &[u8]) -> Status {
        self.status(4, &string(handle))
    }

    fn write_body(handle: &[u8], offset: u64, data: &[u8]) -> Vec<u8> {
        let mut body = string(handle);
        body.extend(offset.to_be_bytes());
        body.extend(string(data));
        body
    }

    pub fn write(&mut self, handle: &[u8], offset: u64, data: &[u8]) -> Status {
        let body = Self::write_body(handle, offset, data);
        self.ask(6, &body)
            .map_or(u32::MAX, |(_, answer)| word(&answer, 0))
    }

    /// Sends several writes at once; how many were answered with success, in order.
    pub fn write_all(&mut self, handle: &[u8], writes: &[(u64, Vec<u8>)]) -> usize {
        let mut packets = Vec::new();
        for (offset, data) in writes {
            let body = Self::write_body(handle, *offset, data);
            packets.extend(self.packet(6, &body));
        }
        if !self.send_raw(&packets) {
            return 0;
        }
        let mut good = 0;
        for _ in writes {
            match self.receive() {
                Some(answer) if word(&answer, 5) == 0 => good += 1,
                _ => break,
            }
        }
        good
    }

    pub fn read(&mut self, handle: &[u8], offset: u64, len: u32) -> Result<Vec<u8>, Status> {
        let mut body = string(handle);
        body.extend(offset.to_be_bytes());
        body.extend(len.to_be_bytes());
        let (kind, answer) = self.ask(5, &body).ok_or(u32::MAX)?;
        if kind == 103 {
            Ok(answer[4..].to_vec())
        } else {
            Err(word(&answer, 0))
        }
    }

    pub fn content(&mut self, path: &str) -> Result<Vec<u8>, Status> {
        let handle = self.open(path, READ)?;
        let mut content = Vec::new();
        loop {
            match self.read(&handle, content.len() as u64, 200_000) {
                Ok(more) => content.extend(more),
                Err(1) => break,
                Err(status) => return Err(status),
            }
        }
        self.close(&handle);
        Ok(content)
    }

    pub fn set_len(&mut self, handle: &[u8], len: u64) -> Status {
        let mut body = string(handle);
        body.extend([0, 0, 0, 1]);
        body.extend(len.to_be_bytes());
        self.status(10, &body)
    }

    /// The fields of an answer of the agent's own requests.
    pub fn own(&mut self, name: &str, fields: &[u8]) -> Result<Vec<u8>, Status> {
        let body = [string(name.as_bytes()), fields.to_vec()].concat();
        let (kind, answer) = self.ask(200, &body).ok_or(u32::MAX)?;
        match kind {
            201 => Ok(answer),
            _ if word(&answer, 0) == 0 => Ok(Vec::new()),
            _ => Err(word(&answer, 0)),
        }
    }

    pub fn rename(&mut self, from: &str, to: &str) -> Status {
        let body = [string(from.as_bytes()), string(to.as_bytes())].concat();
        let plain = self.status(18, &body);
        let posix = self.extended(
            "posix-rename@openssh.com",
            &[from.as_bytes(), to.as_bytes()],
        );
        if plain == 0 { 0 } else { posix }
    }

    pub fn list(&mut self, path: &str) -> Vec<String> {
        let (kind, answer) = self.ask(11, &string(path.as_bytes())).unwrap();
        assert_eq!(kind, 102, "{path}");
        let handle = answer[4..].to_vec();
        let mut names = Vec::new();
        while let Some((104, answer)) = self.ask(12, &string(&handle)) {
            let mut at = 4;
            for _ in 0..word(&answer, 0) {
                let mut next = || {
                    let len = word(&answer, at) as usize;
                    at += 4 + len;
                    String::from_utf8(answer[at - len..at].to_vec()).unwrap()
                };
                names.push(next());
                next();
                at += 32;
            }
        }
        self.close(&handle);
        names.sort();
        names
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends in order.
    #[track_caller]
    pub fn end(mut self) {
        self.input = None;
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }

    /// Ends, however the agent ended.
    pub fn end_anyhow(self) {
        let _ = self.end_code();
    }

    /// Ends, and says with which code. `None`: by a signal.
    pub fn end_code(mut self) -> Option<i32> {
        self.input = None;
        self.child.wait().unwrap().code()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.input = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder, and everything below it.
pub fn all_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![folder.to_owned()];
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(all_files(&entry.path())),
            false => found.push(entry.path()),
        }
    }
    found
}

/// `count` blocks that differ from all others with another `seed`.
pub fn blocks(count: usize, seed: u64) -> Vec<u8> {
    sprat_testkit::machine::noise(count * BLOCK, seed)
}
