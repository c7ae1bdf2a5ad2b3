//! The administrator's commands: they show, protect, remove and copy past states.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::alarm;
use crate::clock::Now;
use crate::disk::{self, bad};
use crate::generation::{self, Head};
use crate::holes;
use crate::keeper::{self, By, Keeper, mark};
use crate::lease;
use crate::log;
use crate::names::Kind;
use crate::past::{self, Past, has_mark};
use crate::policy::{Bucket, Policy};
use crate::ranges::{self, BLOCK};
use crate::root::{Root, TIDIED};
use crate::state::{changed_outside, whole_state};
use crate::status::is_overdue;
use crate::tidy;
use crate::time_text::show_bytes;

/// Bytes of a past state that are read at once.
const PIECE: usize = 1 << 20;

/// What `revert` needs at most besides old contents: a generation's own files.
const REVERT_BYTES: u64 = 8 << 20;

/// A past state, found by its container and name.
struct Found {
    container: OwnedFd,
    number: u32,
}

/// The folder of a container's past states.
fn kept(root: &Root, container: &str) -> io::Result<OwnedFd> {
    let folder = root.kept(container)?;
    folder.ok_or_else(|| bad(format!("nothing is kept of {container}")))
}

fn find(root: &Root, container: &str, time: &str) -> io::Result<Found> {
    let folder = kept(root, container)?;
    let wanted = |name: &str| name == time || name.trim_end_matches(".luks") == time;
    let shown = past::shown(&folder, &root.live(container)?)?;
    let number = shown
        .iter()
        .find(|(_, name, _)| wanted(name))
        .map(|(number, ..)| *number);
    let number = number.ok_or_else(|| {
        bad(format!(
            "{container} has no past state {time}; see sprat-agent list"
        ))
    })?;
    Ok(Found {
        container: folder,
        number,
    })
}

/// The past states of all containers, a line each.
pub fn list(root: &Root) -> io::Result<String> {
    let mut text = String::new();
    for container in root.containers()? {
        let Some(folder) = root.kept(&container)? else {
            text += &format!("{container}: nothing is kept yet\n");
            continue;
        };
        for (number, name, head) in past::shown(&folder, &root.live(&container)?)? {
            let saved = alarm::overwritten(&folder, &[number])? * BLOCK;
            let mut notes = vec![head.reason.clone()];
            for (is, what) in [(head.clean, "clean"), (head.clone, "clone")] {
                if is {
                    notes.push(what.to_owned());
                }
            }
            for what in ["pinned", "expire"] {
                if has_mark(&folder, number, what)? {
                    notes.push(what.to_owned());
                }
            }
            let (length, saved) = (show_bytes(head.length), show_bytes(saved));
            let stood_h = head.stood_s / 3600;
            text += &format!(
                "{container}  {name}  {length}  saved {saved}  stood {stood_h} h  {}\n",
                notes.join(", ")
            );
        }
    }
    Ok(text)
}

/// Puts or removes a mark on a past state.
pub fn set_mark(root: &Root, container: &str, time: &str, what: &str, on: bool) -> io::Result<()> {
    let found = find(root, container, time)?;
    if on {
        return mark(&found.container, found.number, what, "");
    }
    disk::remove_in(generation::folder(&found.container, found.number)?, what)
}

/// Whether anything of a container may expire.
pub fn hold(root: &Root, container: &str, on: bool) -> io::Result<()> {
    let folder = kept(root, container)?;
    if on {
        disk::replace_in(&folder, "hold", b"")
    } else {
        disk::remove_in(&folder, "hold")
    }
}

/// The administrator has seen the alarm.
pub fn ack(root: &Root, container: &str) -> io::Result<()> {
    let folder = kept(root, container)?;
    let file = root.writable(container)?;
    if changed_outside(&folder, &file)? {
        root.keeper(container)?.accept(&file)?;
    }
    alarm::confirm(&folder, root.clock.now()?)
}

/// The wall clock is right. No state may seem to be of the future.
pub fn accept_clock(root: &Root) -> io::Result<()> {
    let mut youngest_s = 0;
    for container in root.containers()? {
        if let Some(folder) = root.kept(&container)? {
            let heads = past::list(&folder)?.into_iter();
            let times = heads.filter_map(|(_, head)| Some(head?.counted_s));
            youngest_s = times.fold(youngest_s, i64::max);
        }
    }
    root.clock.accept(youngest_s).map(drop)
}

/// Lets clients write to the header for a while.
pub fn allow_header(root: &Root, container: &str, for_s: i64) -> io::Result<()> {
    // A new container has no past yet.
    root.live(container)?;
    let folder = disk::make_folder_in(&root.agent, container)?;
    let until_s = root.clock.now()?.counted_s.saturating_add(for_s);
    let text = format!("until {until_s}\n");
    disk::replace_in(&folder, keeper::HEADER_UNTIL, text.as_bytes())
}

/// Makes a new record of the state where it is damaged.
pub fn repair(root: &Root, container: &str) -> io::Result<String> {
    let folder = kept(root, container)?;
    let repaired = keeper::repair_state(&folder, root.clock.now()?, &root.policy)?;
    Ok(if repaired {
        format!("{container}: repaired; clients can write again\n")
    } else {
        format!("{container}: the record of the state is whole, nothing was changed\n")
    })
}

/// Marks a past state for removal, and removes it.
pub fn expire(root: &Root, container: &str, time: &str) -> io::Result<String> {
    let found = find(root, container, time)?;
    if has_mark(&found.container, found.number, "pinned")? {
        return Err(bad(
            "this past state is pinned; run sprat-agent unpin first",
        ));
    }
    let numbers = generation::numbers(&found.container)?;
    let older = numbers.iter().rfind(|number| **number < found.number);
    if tidy::needs(&found.container, older.copied(), found.number)? {
        return Err(bad(
            "this past state is a clone, and older ones that are none are read from it; remove those first",
        ));
    }
    if numbers.last() == Some(&found.number) {
        return Err(bad(
            "the newest past state can't be removed: what is overwritten now is saved for it",
        ));
    }
    mark(&found.container, found.number, "expire", "")?;
    tidy(root)
}

/// Removes what the policy does not keep any more. What fails for one container stops no other one.
pub fn tidy(root: &Root) -> io::Result<String> {
    let now = root.clock.now()?;
    let mut text = String::new();
    let mut all_done = true;
    for container in root.containers()? {
        match tidy_one(root, &container, now) {
            Ok(lines) => text += &lines,
            Err(error) => {
                text += &format!("{container}: failed: {error}\n");
                all_done = false;
            }
        }
    }
    if !all_done {
        return Err(bad(text));
    }
    lease::keep_spare(root)?;
    let tidied = format!("tidied {}\n", now.counted_s);
    disk::replace_in(&root.agent, TIDIED, tidied.as_bytes())?;
    Ok(text)
}

fn tidy_one(root: &Root, container: &str, now: Now) -> io::Result<String> {
    let Some(folder) = root.kept(container)? else {
        return Ok(String::new());
    };
    let overdue = is_overdue(root, container, now.wall_s)?;
    let done = tidy::run(&folder, &root.policy, now, overdue)?;
    let mut text = format!("{container}: {} past states expired\n", done.removed.len());
    if let Some(held) = done.held {
        text += &format!("{container}: nothing expires by the policy: {held}\n");
    }
    remove_old_leases(root, container, now.wall_s)?;
    Ok(text)
}

/// Leases below the highest that nobody can be using: unchanged for a day. An account can't be made to keep
/// all of them for ever.
fn remove_old_leases(root: &Root, container: &str, wall_s: i64) -> io::Result<()> {
    let highest = root.highest_lease(container)?;
    for name in root.files()? {
        let Kind::Lease(number) = name.kind else {
            continue;
        };
        if name.container != container || highest.is_none_or(|highest| number + 8 > highest) {
            continue;
        }
        let age_s = wall_s - root.open_file(&name, OFlags::RDONLY)?.metadata()?.mtime();
        if age_s > 86_400 {
            disk::remove_in(&root.folder, &name.text)?;
        }
    }
    Ok(())
}

fn open_past(root: &Root, container: &str, folder: &OwnedFd, number: u32) -> io::Result<Past> {
    Past::open(folder, root.live(container)?, number)
}

/// Copies a past state to a new file; what is zero becomes a hole.
pub fn export(root: &Root, container: &str, time: &str, to: &Path) -> io::Result<()> {
    let found = find(root, container, time)?;
    let mut past = open_past(root, container, &found.container, found.number)?;
    if to.try_exists()? {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    disk::write_file(to, 0o600, |file| {
        let length = past.head.length;
        file.set_len(length)?;
        let mut at = 0;
        while at < length {
            let piece = past.read(at, PIECE)?;
            if piece.iter().any(|b| *b != 0) {
                file.write_all_at(piece, at)?;
            }
            at += piece.len() as u64;
        }
        Ok(())
    })
}

/// Writes a past state back into the container: only the blocks that differ. The present becomes a past state
/// itself; if it is discarded, its blocks are saved only where another past state needs them. After a crash it can be
/// run again. Clients that are connected are refused. The length stays.
pub fn revert(root: &Root, container: &str, time: &str, discards: bool) -> io::Result<String> {
    let found = find(root, container, time)?;
    let file = root.writable(container)?;
    let mut keeper = root.keeper(container)?;
    let past = open_past(root, container, &found.container, found.number)?;
    if !discards {
        // Before anything is begun: the present would be a past state, and its blocks could not be discarded.
        let data = holes::data_blocks(&file, file.metadata()?.size())?;
        let most = ranges::count(&ranges::both(&past.changed()?, &data)) * BLOCK;
        let free = disk::free_bytes(&root.folder)?;
        if free < most + REVERT_BYTES {
            return Err(bad(format!(
                "the present needs up to {} and {} are free. Nothing was changed. Free space, or say \
                 --discard-present",
                show_bytes(most),
                show_bytes(free)
            )));
        }
    }
    keeper.begin_session(&file, By::Admin((!discards).then_some("revert")))?;
    // A client may have written until now.
    let mut past = open_past(root, container, &found.container, found.number)?;
    let changed = past.changed()?;
    // Holes first: they free space.
    for piece in pieces(&ranges::without(&changed, &past.map)) {
        keeper.punch(&file, std::slice::from_ref(&piece))?;
    }
    for piece in pieces(&ranges::both(&changed, &past.map)) {
        let len = usize::try_from((piece.end - piece.start) * BLOCK).unwrap_or(PIECE);
        let bytes = past.read(piece.start * BLOCK, len)?;
        write_back(&mut keeper, &file, piece.start, bytes)?;
    }
    file.sync_all()?;
    keeper.end(&file)?;
    Ok(format!(
        "{} written back\n",
        show_bytes(ranges::count(&changed) * BLOCK)
    ))
}

/// The same in ranges of at most [`PIECE`] bytes.
fn pieces(blocks: &[Range<u64>]) -> impl Iterator<Item = Range<u64>> {
    let step = PIECE / 4096;
    blocks.iter().flat_map(move |range| {
        let starts = range.clone().step_by(step);
        starts.map(move |at| at..range.end.min(at + step as u64))
    })
}

/// Writes blocks from the block `first` on; those that are all zeros become holes.
fn write_back(keeper: &mut Keeper, file: &File, first: u64, piece: &[u8]) -> io::Result<()> {
    let is_zero = |block: &[u8]| block.iter().all(|b| *b == 0);
    let mut at = first;
    for run in piece
        .chunks(4096)
        .collect::<Vec<_>>()
        .chunk_by(|a, b| is_zero(a) == is_zero(b))
    {
        let next = at + run.len() as u64;
        if is_zero(run[0]) {
            keeper.punch(file, std::slice::from_ref(&(at..next)))?;
        } else {
            keeper.write(file, &[(at * BLOCK, &run.concat())])?;
        }
        at = next;
    }
    Ok(())
}

/// Removes a container with everything that belongs to it, past states too.
pub fn remove(root: &Root, container: &str) -> io::Result<()> {
    match root.writable(container) {
        // It went already in a run that did not end.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound && root.kept(container)?.is_some() => {}
        file => {
            // Every client is refused from here on.
            root.keeper(container)?
                .begin_session(&file?, By::Admin(Some("remove")))?;
        }
    }
    for other in root
        .files()?
        .iter()
        .filter(|other| other.container == container)
    {
        disk::remove_in(&root.folder, &other.text)?;
    }
    disk::sync_folder(&root.folder)?;
    std::fs::remove_dir_all(root.path.join(crate::root::AGENT).join(container))
}

/// Checks that all past states can be read: heads, maps, indexes, with `read_data` every saved block.
/// Returns what is damaged, and how many states there are.
pub fn check(root: &Root, read_data: bool) -> io::Result<(Vec<String>, usize)> {
    let mut damaged = Vec::new();
    let mut states = 0;
    for container in root.containers()? {
        let Some(folder) = root.kept(&container)? else {
            continue;
        };
        if whole_state(&folder)?.is_none() {
            damaged.push(format!(
                "{container}: the record of the state is damaged; run sprat-agent repair {container}"
            ));
        }
        if changed_outside(&folder, &root.live(&container)?)? {
            damaged.push(format!(
                "{container}: changed by something else than sprat-agent since the last session; all past states \
                 that are no clones may have lost blocks"
            ));
        }
        for (number, head) in past::list(&folder)? {
            states += 1;
            let name = head.as_ref().map_or_else(
                || format!("generation {number}"),
                |head: &Head| head.name.clone(),
            );
            let mut note = |what: &str| damaged.push(format!("{container}: {name}: {what}"));
            if head.is_none() {
                note("its head is damaged");
                continue;
            }
            if let Err(error) = open_past(root, &container, &folder, number) {
                note(&error.to_string());
                continue;
            }
            if let Err(error) = check_entries(&folder, number, read_data) {
                note(&format!(
                    "{error}: this state and older ones may have blocks that can't be read"
                ));
            }
            if has_mark(&folder, number, "written-past")? {
                note(
                    "the container was changed by something else than sprat-agent after this state",
                );
            }
        }
    }
    Ok((damaged, states))
}

fn check_entries(folder: &OwnedFd, number: u32, read_data: bool) -> io::Result<()> {
    let index = generation::index_of(folder, number)?;
    if let Some(image) = generation::open_image(folder, number)? {
        let mut piece = vec![0; PIECE];
        let data = holes::data_blocks(&image, image.metadata()?.size())?;
        return pieces(if read_data { &data } else { &[] })
            .try_for_each(|blocks| disk::read_padded(&image, &mut piece, blocks.start * BLOCK));
    }
    let mut open: Option<(u32, File)> = None;
    for entry in index.iter() {
        let entry = entry?;
        if !read_data || entry.place == 0 {
            continue;
        }
        if open.as_ref().is_none_or(|(log, _)| *log != entry.log) {
            open = Some((entry.log, generation::open_log(folder, entry.log)?));
        }
        if let Some((_, log)) = &open {
            log::contents(log, &[entry], &mut |_, _| {})?;
        }
    }
    if index.damaged {
        Err(bad(format!("log {number} is damaged")))
    } else {
        Ok(())
    }
}

/// What a policy means: how many states at most, and how much space in the worst case.
pub fn policy_check(root: &Root) -> io::Result<String> {
    let policy: &Policy = &root.policy;
    let mut most = 0_u64;
    for rule in &policy.keep {
        let days = u64::try_from(rule.for_s).unwrap_or(0).div_ceil(86_400);
        most += match rule.bucket {
            // By tokens, by secret moments, and one a day.
            Bucket::All => {
                policy.burst
                    + days * 86_400 / policy.token_every_s.max(1)
                    + days * 86_400 / u64::try_from(policy.secret_s).unwrap_or(1).max(1)
                    + days
            }
            Bucket::Day => days * 3,
            Bucket::Week => days.div_ceil(7) * 3,
            Bucket::Month => days.div_ceil(31) * 3,
        };
    }
    let mut text = format!("at most about {most} past states of a container\n");
    for container in root.containers()? {
        let used = root.live(&container)?.metadata()?.blocks() * 512;
        let worst = show_bytes(used.saturating_mul(most));
        text += &format!(
            "{container}: {} used; if all of it is overwritten for each state: {worst}\n",
            show_bytes(used)
        );
    }
    text += match (policy.clones, disk::can_clone(&root.agent)?) {
        (true, true) => "keeper: clone\n",
        (true, false) => {
            return Err(bad(
                "keeper = clone, but this file system can't clone files: nobody can write. Say keeper = log",
            ));
        }
        (false, true) => "keeper: log; this file system can clone files, too\n",
        (false, false) => "keeper: log; this file system can't clone files\n",
    };
    if policy.quota.is_none() {
        text += "no quota: a client can fill the disk but for free_min\n";
    }
    Ok(text)
}
