//! A FUSE file system with a large file, `large`, and one with two names, `one` and `other`. Its requests may wait.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyEntry, ReplyOpen, Request,
};

const BYTES: u64 = 33 << 20;
const FILE: INodeNo = INodeNo(2);
const LINKED: INodeNo = INodeNo(3);
const LINKED_BYTES: u64 = 5;
const NAMES: [(&str, INodeNo); 3] = [("large", FILE), ("one", LINKED), ("other", LINKED)];
const TTL: Duration = Duration::ZERO;

/// What the file system and the test share.
#[derive(Clone, Default)]
pub struct SlowSource(Arc<(Mutex<State>, Condvar)>);

type Answer = Box<dyn FnOnce(&SlowSource) + Send>;

#[derive(Default)]
struct State {
    /// Each version has another time and other content.
    version: u8,
    silent: bool,
    /// How many requests of this process came before the first one of another.
    asked_first: Option<usize>,
    /// How many requests of this process have come.
    asked: usize,
    /// How many of them get an answer at once.
    answered_max: Option<usize>,
    /// What gives those that wait their answers.
    waiting: Vec<Answer>,
}

impl SlowSource {
    /// Mounts it at `at`, until the session is dropped.
    pub fn mount(at: &Path) -> (Self, BackgroundSession) {
        let shared = Self::default();
        let mut config = Config::default();
        config.mount_options = vec![MountOption::RO, MountOption::FSName("slow".to_owned())];
        let session = fuser::spawn_mount(shared.clone(), at, &config).unwrap();
        (shared, session)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap()
    }

    /// The file gets other content and a later time.
    pub fn change(&self) {
        self.state().version += 1;
    }

    /// Whether reads get answers. Those that wait get theirs, too.
    pub fn answer_reads(&self, answer: bool) {
        self.state().silent = !answer;
        self.answer_waiting();
    }

    /// Answers only so many requests of this process. `None`: all, also those that wait.
    pub fn answer_own(&self, most: Option<usize>) {
        let mut state = self.state();
        state.answered_max = most;
        state.asked = 0;
        state.asked_first = None;
        drop(state);
        self.answer_waiting();
    }

    /// How many requests of this process came before the first one of another.
    pub fn own_before_others(&self) -> usize {
        self.state().asked_first.unwrap()
    }

    fn answer_waiting(&self) {
        let waiting = std::mem::take(&mut self.state().waiting);
        for answer in waiting {
            answer(self);
        }
    }

    /// Calls `answer` now or later.
    fn answer(&self, request: &Request, answer: impl FnOnce(&Self) + Send + 'static) {
        // The kernel names the thread.
        let thread = format!("/proc/self/task/{}", request.pid());
        let mut state = self.state();
        if !Path::new(&thread).exists() {
            let asked = state.asked;
            state.asked_first.get_or_insert(asked);
        } else {
            state.asked += 1;
            if state.answered_max.is_some_and(|most| state.asked > most) {
                state.waiting.push(Box::new(answer));
                self.0.1.notify_all();
                return;
            }
        }
        drop(state);
        answer(self);
    }

    /// Returns when a request waits.
    pub fn wait_for_request(&self) {
        let waits = |state: &mut State| state.waiting.is_empty();
        drop(self.0.1.wait_while(self.state(), waits).unwrap());
    }

    fn attr(&self, inode: INodeNo) -> FileAttr {
        let folder = inode == INodeNo::ROOT;
        let time =
            UNIX_EPOCH + Duration::from_secs(1_500_000_000 + u64::from(self.state().version));
        FileAttr {
            nlink: if inode == FILE { 1 } else { 2 },
            ..super::attributes(inode, folder, bytes(inode), time)
        }
    }
}

fn bytes(inode: INodeNo) -> u64 {
    match inode {
        FILE => BYTES,
        LINKED => LINKED_BYTES,
        _ => 0,
    }
}

impl Filesystem for SlowSource {
    fn lookup(&self, request: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = NAMES.iter().find(|(known, _)| name == *known);
        let found = found.map(|(_, inode)| *inode);
        self.answer(request, move |this| match found {
            Some(inode) => reply.entry(&TTL, &this.attr(inode), Generation(0)),
            None => reply.error(Errno::ENOENT),
        });
    }

    fn getattr(&self, request: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.answer(request, move |this| reply.attr(&TTL, &this.attr(inode)));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Each read reaches the file system.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let left = u32::try_from(bytes(inode).saturating_sub(offset)).unwrap();
        let length = length.min(left) as usize;
        let answer = move |this: &Self| {
            let version = this.state().version;
            reply.data(&vec![version; length]);
        };
        let mut state = self.state();
        if state.silent {
            state.waiting.push(Box::new(answer));
            self.0.1.notify_all();
            return;
        }
        drop(state);
        answer(self);
    }

    fn readdir(
        &self,
        request: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        self.answer(request, move |_| {
            if offset == 0 {
                for (number, (name, inode)) in (1..).zip(NAMES) {
                    let _ = reply.add(inode, number, FileType::RegularFile, name);
                }
            }
            reply.ok();
        });
    }
}
