//! A hostile SFTP server with a script. It is honest until the nth request of a kind. Then it drops,
//! delays, reorders or changes the answer, lies, answers slowly, with another type, another length,
//! from an older file, or never.
//!
//! Each connection runs the system's own sftp-server, and its packets are changed on their way. A
//! program in place of ssh ([`Hostile::ssh_command`]) leads to it, so that sprat's own client and
//! everything above it run unchanged. A shell that sprat asks for is the system's own.

mod connection;
mod packet;

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use sprat_store::IgnorePoison;

use connection::Connection;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The first packet of a connection, answered by a greeting.
    Greeting,
    /// `OPEN` of a file.
    Open,
    /// `CLOSE` of a file or a folder.
    Close,
    /// `READ`.
    Read,
    /// `WRITE`.
    Write,
    /// `LSTAT`, `STAT` and `FSTAT`.
    Stat,
    /// `SETSTAT` and `FSETSTAT`: length, owner and mode.
    SetStat,
    /// `OPENDIR` and `READDIR`.
    Folder,
    /// `REMOVE`.
    Remove,
    /// `RENAME` and `posix-rename@openssh.com`.
    Rename,
    /// `fsync@openssh.com`.
    Fsync,
    /// `copy-data`.
    Copy,
    /// `statvfs`, `limits` and whatever else is extended.
    Other,
    /// A shell that is asked for. It stays away where the connection is to end or to stand still; whatever
    /// else is to be done with it, it runs.
    Shell,
}

/// What the server does with a request, or with its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Closes the connection, the request is not carried out.
    Drop,
    /// Carries it out, and closes the connection in place of an answer.
    DropAfter,
    /// Answers later, and what comes behind it, too.
    Delay(Duration),
    /// Answers behind the next answer.
    Reorder,
    /// Carries it out and never answers, but answers everything else.
    Never,
    /// This connection passes nothing any more, and stays open.
    Silence,
    /// No connection passes anything any more; new ones are accepted and get nothing.
    Stall,
    /// From here on one byte of the connection's answers in so much time.
    Slow(Duration),
    /// Reports success and does nothing. Requests for data are answered with a status.
    Lie,
    /// Answers with this status (2: no such file, 3: permission denied, 4: failure, 8: unsupported).
    Status(u32),
    /// Carries it out, and answers with another type of packet.
    WrongType,
    /// Carries it out, and answers with more or fewer bytes than there are.
    WrongLength,
    /// Carries it out, and changes bytes of the answer.
    Garble,
    /// Changes a byte of what is to be written.
    GarbleWrite,
    /// Answers a read from the older file.
    OldData,
    /// Before it is carried out, the file becomes the older file.
    Rollback,
    /// Answers with bytes that are no packet.
    Nonsense,
}

/// See [`Fault::times`].
pub const ALWAYS: usize = usize::MAX;

/// When the server does what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Requests of this kind are counted; `None`: all.
    pub on: Option<Kind>,
    /// Which of them, from 1.
    pub nth: usize,
    /// So many of them from there on; [`ALWAYS`]: all.
    pub times: usize,
    /// What it does.
    pub act: Act,
    /// Only requests that name an open handle of the server's file are counted.
    pub of_file: bool,
}

impl Fault {
    /// Once.
    #[must_use]
    pub fn once(on: Kind, nth: usize, act: Act) -> Self {
        let (on, times) = (Some(on), 1);
        Self {
            on,
            nth,
            times,
            act,
            of_file: false,
        }
    }

    /// Counts only requests to the open file of the server.
    #[must_use]
    pub fn of_file(self) -> Self {
        let of_file = true;
        Self { of_file, ..self }
    }

    /// So often.
    #[must_use]
    pub fn times(self, times: usize) -> Self {
        Self { times, ..self }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { act, nth, .. } = self;
        match self.on {
            Some(kind) => write!(f, "{act:?} at {kind:?} {nth}")?,
            None => write!(f, "{act:?} at request {nth}")?,
        }
        match self.times {
            1 => Ok(()),
            ALWAYS => write!(f, " and all behind it"),
            many => write!(f, ", {many} times"),
        }
    }
}

/// See the module. Dropping it ends every connection.
#[derive(Debug)]
pub struct Hostile {
    port: u16,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Where relative paths begin.
    folder: PathBuf,
    /// The file that [`Act::Rollback`] and [`Act::OldData`] are about, below `folder`.
    file: String,
    /// What it was once.
    older: PathBuf,
    script: Mutex<Script>,
    connections: Mutex<Vec<Arc<Connection>>>,
    ended: AtomicBool,
    stalled: AtomicBool,
}

#[derive(Debug, Default)]
struct Script {
    /// One behind the other: the next begins to count when the first has fallen as often as it shall.
    faults: VecDeque<Fault>,
    /// Requests of the kind that the first is about.
    counted: usize,
    /// How often the first fell.
    of_first: usize,
    struck: usize,
    seen: BTreeMap<Kind, usize>,
}

impl Hostile {
    /// Serves `folder`. `older` is what `file` in it was once; it need not exist before it is used.
    pub fn start(folder: &Path, file: &str, older: &Path) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            folder: folder.to_owned(),
            file: file.to_owned(),
            older: older.to_owned(),
            script: Mutex::new(Script::default()),
            connections: Mutex::new(Vec::new()),
            ended: AtomicBool::new(false),
            stalled: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        let acceptor = thread::spawn(move || {
            for socket in listener.incoming() {
                if accepting.ended.load(Ordering::SeqCst) {
                    return;
                }
                if let Ok(socket) = socket {
                    // A client without a server sees the end.
                    let _ = Connection::serve(&accepting, socket);
                }
            }
        });
        Ok(Self {
            port,
            shared,
            acceptor: Some(acceptor),
        })
    }

    /// What to run instead of ssh; the program is written into `folder`. Needs bash.
    pub fn ssh_command(&self, folder: &Path) -> io::Result<Vec<OsString>> {
        let program = folder.join("line-to-hostile");
        // Ends as ssh does: when either side ends. A shell runs here, once the server lets it.
        let script = format!(
            "#!/bin/bash\nexec 3<>/dev/tcp/127.0.0.1/{} 4<&0 || exit 255\n\
             if [ \"${{@: -1}}\" != sftp ]; then echo h >&3; read -r -u 3 go || exit 255; \
             cd {} && exec sh -s 3<&- <&4; fi\necho s >&3\n\
             ( cat <&4 >&3; kill $$ ) >/dev/null 2>&1 &\nexec cat <&3 4<&-\n",
            self.port,
            self.shared.folder.display()
        );
        std::fs::write(&program, script)?;
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
        Ok(vec![program.into()])
    }

    /// From now on the server does this, one fault behind the other, each counted from the end of the one
    /// before; without any it is honest. Whatever it counted is forgotten, and its connections end.
    pub fn set(&self, faults: impl IntoIterator<Item = Fault>) {
        self.shared.stalled.store(false, Ordering::SeqCst);
        for connection in self.shared.connections.lock().ignore_poison().drain(..) {
            connection.end();
        }
        *self.shared.script.lock().ignore_poison() = Script {
            faults: faults.into_iter().collect(),
            ..Script::default()
        };
    }

    /// How often the fault fell since [`Hostile::set`].
    #[must_use]
    pub fn struck(&self) -> usize {
        self.shared.script.lock().ignore_poison().struck
    }

    /// Requests since [`Hostile::set`], by kind.
    #[must_use]
    pub fn seen(&self) -> BTreeMap<Kind, usize> {
        self.shared.script.lock().ignore_poison().seen.clone()
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        for connection in self.shared.connections.lock().ignore_poison().drain(..) {
            connection.end();
        }
    }
}

impl Shared {
    /// Counts a request, and says what is to be done with it.
    /// `of_file`: it names an open handle of the server's file.
    fn due(&self, kind: Kind, of_file: bool) -> Option<Act> {
        let mut script = self.script.lock().ignore_poison();
        *script.seen.entry(kind).or_default() += 1;
        let fault = *script.faults.front()?;
        if fault.on.is_some_and(|on| on != kind) || (fault.of_file && !of_file) {
            return None;
        }
        script.counted += 1;
        if script.counted < fault.nth {
            return None;
        }
        script.struck += 1;
        script.of_first += 1;
        if script.of_first >= fault.times {
            script.faults.pop_front();
            (script.counted, script.of_first) = (0, 0);
        }
        if fault.act == Act::Stall {
            self.stalled.store(true, Ordering::SeqCst);
        }
        Some(fault.act)
    }

    fn stalled(&self) -> bool {
        self.stalled.load(Ordering::SeqCst)
    }

    /// Makes the file what it was once, in place: who has it open has it open still.
    fn roll_back(&self) -> io::Result<()> {
        use std::io::{Seek, SeekFrom};
        use std::os::unix::fs::FileExt;
        let mut older = std::fs::File::open(&self.older)?;
        let file = std::fs::File::options()
            .write(true)
            .open(self.folder.join(&self.file))?;
        let len = older.metadata()?.len();
        file.set_len(0)?;
        file.set_len(len)?;
        let mut at = 0;
        while let Ok(data) = rustix::fs::seek(&older, rustix::fs::SeekFrom::Data(at)) {
            let end = rustix::fs::seek(&older, rustix::fs::SeekFrom::Hole(data))?;
            older.seek(SeekFrom::Start(data))?;
            let mut bytes = vec![0; usize::try_from(end - data).unwrap_or(usize::MAX)];
            older.read_exact_at(&mut bytes, data)?;
            file.write_all_at(&bytes, data)?;
            at = end;
        }
        Ok(())
    }
}
