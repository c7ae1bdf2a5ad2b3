//! The folder of one client, opened: what is served, and the agent's own folder in it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::OFlags;

use crate::clock::Clock;
use crate::disk::{self, bad, field, number, open_in};
use crate::keeper::Keeper;
use crate::names::{Kind, Name};
use crate::policy::Policy;
use crate::space::Space;

/// The agent's own folder. The client does not see it.
pub const AGENT: &str = ".sprat-agent";
/// When `tidy` was done last, by the counted clock.
pub const TIDIED: &str = "tidied";
/// The last connection was confined by Landlock.
const CONFINED: &str = "confined";
/// The layout that this program writes. A higher one is served without changing anything.
const FORMAT: u32 = 1;

fn is_id(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

fn format_text(agent: &OwnedFd) -> io::Result<Option<String>> {
    disk::text_in(agent, "format", 4096)
}

/// Version and id. `None`: the file is damaged.
fn parse_format(text: &str) -> Option<(u32, String)> {
    let (text, crc) = text.rsplit_once("crc ")?;
    (crc == format!("{:08x}\n", crc32fast::hash(text.as_bytes()))).then_some(())?;
    let id = field(text, "id").filter(|id| is_id(id));
    number(text, "format").zip(id.map(ToOwned::to_owned))
}

fn damaged_format(path: &Path) -> io::Error {
    bad(format!(
        "the file format is damaged; run sprat-agent repair --root {}",
        path.display()
    ))
}

/// Returns the id: a new one if none is given.
fn write_format(agent: &OwnedFd, id: Option<&str>) -> io::Result<String> {
    let id = match id {
        Some(id) => id.to_owned(),
        None => format!("{:016x}", disk::random_u64()?),
    };
    let text = format!("format {FORMAT}\nid {id}\n");
    let crc = crc32fast::hash(text.as_bytes());
    disk::replace_in(agent, "format", format!("{text}crc {crc:08x}\n").as_bytes())?;
    Ok(id)
}

/// A root that was adopted.
#[derive(Debug)]
pub struct Root {
    pub path: PathBuf,
    pub folder: OwnedFd,
    pub agent: OwnedFd,
    pub clock: Rc<Clock>,
    pub policy: Rc<Policy>,
    pub space: Rc<Space>,
    /// A newer agent has written here.
    pub is_newer: bool,
    /// Made by `adopt`; a copy of the root elsewhere has the same.
    pub id: String,
    device: u64,
}

impl Root {
    /// Opens a root that `adopt` has prepared.
    pub fn open(path: &Path, policy: Option<&Path>) -> io::Result<Self> {
        let path = path.canonicalize()?;
        let folder = disk::open_folder(&path)?;
        let agent = disk::if_there(disk::folder_in(&folder, AGENT))?.ok_or_else(|| {
            let path = path.display();
            bad(format!(
                "{path} is not adopted: run sprat-agent adopt --root {path}"
            ))
        })?;
        let format = format_text(&agent)?.and_then(|text| parse_format(&text));
        let (version, id) = format.ok_or_else(|| damaged_format(&path))?;
        let policy = Rc::new(Policy::read(&agent, policy)?);
        Ok(Self {
            clock: Rc::new(Clock::open(&agent)?),
            space: Rc::new(Space::new(&folder, &policy)?),
            policy,
            is_newer: version > FORMAT,
            id,
            device: File::from(folder.try_clone()?).metadata()?.dev(),
            path,
            folder,
            agent,
        })
    }

    /// Prepares a root; what is there stays. Returns its id.
    pub fn adopt(path: &Path) -> io::Result<String> {
        let folder = disk::open_folder(path)?;
        let agent = disk::make_folder_in(&folder, AGENT)?;
        if let Some(text) = format_text(&agent)? {
            let (_, id) = parse_format(&text).ok_or_else(|| damaged_format(path))?;
            return Ok(id);
        }
        let id = write_format(&agent, None)?;
        Clock::open(&agent)?.now()?;
        Ok(id)
    }

    /// Writes the file `format` again where it is damaged or lost. False: it is whole. A new id, where the old one
    /// can't be read, only means that clients wait once more for sessions that died before. `surely`: no newer agent
    /// was used here. A damaged file can't say so.
    pub fn repair(path: &Path, surely: bool) -> io::Result<bool> {
        let agent = disk::folder_in(disk::open_folder(path)?, AGENT)?;
        let left = format_text(&agent)?.unwrap_or_default();
        if parse_format(&left).is_some() {
            return Ok(false);
        }
        if number(&left, "format").is_some_and(|version: u32| version > FORMAT) {
            return Err(bad("a newer sprat-agent wrote here: use that one"));
        }
        if !surely {
            return Err(bad(
                "nobody knows which version of the layout was in the damaged file; if no newer sprat-agent was used \
                 here, say --yes",
            ));
        }
        write_format(&agent, field(&left, "id").filter(|id| is_id(id)))?;
        Ok(true)
    }

    /// Opens a file of the client: a regular one of this file system, with one name.
    pub fn open_file(&self, name: &Name, flags: OFlags) -> io::Result<File> {
        let file = open_in(&self.folder, &name.text, flags)?;
        let found = file.metadata()?;
        if !found.is_file() || found.nlink() != 1 || found.dev() != self.device {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(file)
    }

    /// A container as it is now, for reading.
    pub fn live(&self, container: &str) -> io::Result<File> {
        self.container(container, OFlags::RDONLY)
    }

    /// The same for writing, through [`Root::keeper`] only.
    pub fn writable(&self, container: &str) -> io::Result<File> {
        self.container(container, OFlags::RDWR)
    }

    fn container(&self, container: &str, flags: OFlags) -> io::Result<File> {
        let name = Name::parse(container).filter(|name| name.kind == Kind::Container);
        let name = name.ok_or_else(|| bad(format!("{container} is not a container's name")))?;
        self.open_file(&name, flags)
    }

    /// Keeps the past states of a container for this process.
    pub fn keeper(&self, container: &str) -> io::Result<Keeper> {
        Keeper::open(
            &self.agent,
            container,
            &self.clock,
            &self.policy,
            &self.space,
        )
    }

    /// Whether the last connection was confined by Landlock.
    pub fn is_confined(&self) -> io::Result<bool> {
        disk::exists_in(&self.agent, CONFINED)
    }

    pub fn note_confined(&self, confined: bool) -> io::Result<()> {
        match (confined, self.is_confined()?) {
            (true, false) => disk::replace_in(&self.agent, CONFINED, b""),
            (false, true) => disk::remove_in(&self.agent, CONFINED),
            _ => Ok(()),
        }
    }

    /// The files that the client may see.
    pub fn files(&self) -> io::Result<Vec<Name>> {
        let names = disk::list_in(&self.folder)?;
        Ok(names.iter().filter_map(|name| Name::parse(name)).collect())
    }

    /// The containers, by name.
    pub fn containers(&self) -> io::Result<Vec<String>> {
        let files = self
            .files()?
            .into_iter()
            .filter(|name| name.kind == Kind::Container);
        let mut names: Vec<String> = files.map(|name| name.text).collect();
        names.sort();
        Ok(names)
    }

    /// The folder of a container's past states. `None`: nothing was ever kept.
    pub fn kept(&self, container: &str) -> io::Result<Option<OwnedFd>> {
        disk::if_there(disk::folder_in(&self.agent, container))
    }

    /// The numbers of a container's leases, ascending.
    pub fn leases(&self, container: &str) -> io::Result<Vec<u64>> {
        let files = self.files()?.into_iter();
        let mut numbers: Vec<u64> = files
            .filter(|name| name.container == container)
            .filter_map(|name| match name.kind {
                Kind::Lease(number) => Some(number),
                _ => None,
            })
            .collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    pub fn highest_lease(&self, container: &str) -> io::Result<Option<u64>> {
        Ok(self.leases(container)?.last().copied())
    }
}
