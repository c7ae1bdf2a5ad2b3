//! Requests beyond SFTP: sessions, holes, announced writes, past states.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use rustix::fs::OFlags;

use super::{Answered, Handle, Server};
use crate::holes::data_blocks;
use crate::keeper::By;
use crate::names::{Kind, Name, Node};
use crate::past;
use crate::ranges::{self, BLOCK};
use crate::wire::{self, Status};

/// The most ranges in an answer to `map@`.
const MAP_RANGES_MAX: usize = 8000;
/// The most past states in an answer to `generations@`: the newest.
const STATES_MAX: usize = 1500;

impl Server {
    fn container(&self, path: &[u8]) -> Result<(Name, File), Status> {
        match self.resolve(path)? {
            Node::File(name) if name.kind == Kind::Container && !self.read_only => {
                let file = self.root.open_file(&name, OFlags::RDWR)?;
                Ok((name, file))
            }
            _ => Err(Status::Denied),
        }
    }

    /// Answers the session's number, the number of past states, and the bytes that may be used.
    pub(super) fn session_begin(&mut self, id: u32, path: &[u8]) -> Answered {
        let (name, file) = self.container(path)?;
        let session = self
            .keeper(&name.container)?
            .begin_session(&file, By::Client)?;
        let states = match self.root.kept(&name.container)? {
            Some(folder) => past::list(&folder)?.len() as u64,
            None => 0,
        };
        let (available, _) = self.root.space.shown()?;
        Ok(wire::numbers(id, &[session, states, available]))
    }

    pub(super) fn session_join(&mut self, path: &[u8], session: u64) -> Result<(), Status> {
        let (name, file) = self.container(path)?;
        Ok(self.keeper(&name.container)?.join_session(&file, session)?)
    }

    /// What is still open may be written again: that is another session.
    pub(super) fn session_end(&mut self, path: &[u8], clean: bool) -> Result<(), Status> {
        let (name, file) = self.container(path)?;
        let keeper = self.keeper(&name.container)?;
        keeper.note_clean(clean);
        Ok(keeper.end(&file)?)
    }

    /// The file of a handle that may write a container, and what the ranges are in blocks.
    fn blocks(
        &self,
        handle: &[u8],
        ranges: &[(u64, u64)],
        whole: bool,
    ) -> Result<(Name, File, Vec<Range<u64>>), Status> {
        let (name, file) = self.writable(handle)?;
        if name.kind != Kind::Container {
            return Err(Status::Denied);
        }
        let length = file.metadata()?.size();
        let wrong = |(offset, len): &(u64, u64)| {
            offset + len > length || whole && (offset % BLOCK != 0 || len % BLOCK != 0)
        };
        if ranges.iter().any(wrong) {
            return Err(Status::Denied);
        }
        let blocks = ranges
            .iter()
            .map(|(offset, len)| ranges::touched(*offset, *len));
        let blocks = ranges::normal(blocks.collect());
        Ok((name, file, blocks))
    }

    /// Answers the offset up to which all was done.
    pub(super) fn will_write(&mut self, id: u32, handle: &[u8], ranges: &[(u64, u64)]) -> Answered {
        let (name, file, blocks) = self.blocks(handle, ranges, false)?;
        let done = self.keeper(&name.container)?.will_write(&file, &blocks);
        Ok(wire::numbers(id, &[done? * BLOCK]))
    }

    /// The same.
    pub(super) fn punch(&mut self, id: u32, handle: &[u8], ranges: &[(u64, u64)]) -> Answered {
        let (name, file, blocks) = self.blocks(handle, ranges, true)?;
        let done = self.keeper(&name.container)?.punch(&file, &blocks);
        Ok(wire::numbers(id, &[done? * BLOCK]))
    }

    /// Answers pairs of start and end, in bytes, of what is no hole, from an offset on.
    pub(super) fn map(&mut self, id: u32, handle: &[u8], from: u64) -> Answered {
        let data = match self.handle(handle)? {
            Handle::File { name, file, .. } if name.kind == Kind::Container => {
                let length = file.metadata()?.size();
                data_blocks(file, length)?
            }
            Handle::Past(past) => past.map.clone(),
            _ => return Err(Status::Denied),
        };
        let first = from / BLOCK;
        let later = data
            .iter()
            .filter(|range| range.end > first)
            .take(MAP_RANGES_MAX);
        let pairs: Vec<u64> = later
            .flat_map(|range| [range.start.max(first) * BLOCK, range.end * BLOCK])
            .collect();
        Ok(wire::numbers(id, &pairs))
    }

    /// Answers for each state: name, time of its last write, begin, how long it stood, length, and flags
    /// (1: the client left it in order; 2: pinned). At the end: after how many seconds no rule keeps a state.
    pub(super) fn generations(&mut self, id: u32, path: &[u8]) -> Answered {
        let Node::File(name) = self.resolve(path)? else {
            return Err(Status::Denied);
        };
        let longest_s = u64::try_from(self.root.policy.longest_s()).unwrap_or(0);
        let Some(folder) = self.root.kept(&name.container)? else {
            return Ok(wire::states(id, &[], longest_s));
        };
        let mut states = Vec::new();
        let live = self.root.live(&name.container)?;
        let all = past::shown(&folder, &live)?;
        for (number, name, head) in all.into_iter().rev().take(STATES_MAX) {
            let pinned = past::has_mark(&folder, number, "pinned")?;
            let seconds = |s: i64| u64::try_from(s).unwrap_or(0);
            let flags = u64::from(head.clean) | u64::from(pinned) << 1;
            let times = [
                seconds(head.state_s),
                seconds(head.begun_s),
                seconds(head.stood_s),
            ];
            states.push((name, [&times[..], &[head.length, flags]].concat()));
        }
        Ok(wire::states(id, &states, longest_s))
    }
}
