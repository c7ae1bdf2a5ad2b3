//! `sprat mount` and `sprat umount`.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::json;
use sprat_session as session;
use sprat_session::address::Location;
use sprat_session::{Access, text};

use super::context::{Context, Resolved};
use crate::args::{MountArgs, UmountArgs};
use crate::output::{Reporter, exit_json, path_json};
use crate::{Exit, Failure};

pub(super) fn run(context: &Context, args: &MountArgs) -> Result<Exit, Failure> {
    let resolved = context.resolve(&args.target)?;
    let dir = context.environment.absolute(&args.dir);
    if !dir.is_dir() {
        return Err(Failure::usage(format!("{} is not a folder", dir.display()))
            .with_hint("nothing was started. Make it with mkdir"));
    }
    refuse_own_places(context, &resolved, &dir)?;
    if !args.allow_other && others_can_enter(&dir) {
        return Err(Failure::usage(format!(
            "other users can enter {}: they would see the files in the backup as their old modes allow",
            dir.display()
        ))
        .with_hint(
            "nothing was started. Mount in a folder that only root can enter (`mkdir -m 700 \
             /mnt/private; mkdir /mnt/private/backup`), or let the others in with --allow-other",
        ));
    }
    let secret = context.secret(&resolved)?;
    let access = if args.rw {
        Access::ReadWrite
    } else {
        Access::ReadOnly
    };
    let options = context.session_options(&resolved, access)?;
    let (state_dir, policy) = (options.state_dir.clone(), options.pins.clone());
    let mut reporter = Reporter::new(context.output, "");
    let facts = session::mount(options, &secret, &dir, &mut reporter, &context.interrupt)
        .map_err(|failure| context.where_mounted(&resolved, failure))?;
    reporter.clear();
    context.remember(&state_dir, &resolved, &policy, &facts);
    let how = if args.rw {
        "read and write"
    } else {
        "read-only"
    };
    let shown = dir.display();
    let text = format!("mounted {} on {shown}, {how}\n", resolved.target);
    let json = json!({
        "command": "mount",
        "result": exit_json(context.exit(Exit::Done)),
        "target": resolved.target.to_string(),
        "dir": path_json(&dir),
        "read_write": args.rw,
        "uuid": facts.uuid,
    });
    context.output.result(&text, &json)?;
    context.output.note(&format!(
        "it stays mounted until `sprat umount {}`",
        text::quoted(&dir)
    ));
    Ok(Exit::Done)
}

/// Whether anybody but root and this user can walk to `dir`: what is mounted there has the modes of the
/// backup, and those of `dir` itself are covered by it.
fn others_can_enter(dir: &Path) -> bool {
    let me = rustix::process::geteuid().as_raw();
    let real = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    !real.ancestors().skip(1).any(|above| {
        above.metadata().is_ok_and(|about| {
            // With an ACL the bits of the group are its mask, the most that it gives.
            about.mode() & 0o011 == 0 && (about.uid() == 0 || about.uid() == me)
        })
    })
}

/// Refuses a mount point that would hide what the session and its `umount` need.
fn refuse_own_places(context: &Context, resolved: &Resolved, dir: &Path) -> Result<(), Failure> {
    let environment = &context.environment;
    let global = &context.global;
    let real = |path: &Path| canonical(&environment.absolute(path));
    let dir = real(dir);
    let mut places = vec![
        (real(&global.state_dir), "state folder"),
        (real(&global.cache_dir), "cache folder"),
        (real(&global.runtime_dir), "runtime folder"),
        (PathBuf::from("/proc"), "processes of this machine"),
        (PathBuf::from("/dev"), "devices of this machine"),
        (PathBuf::from("/sys"), "devices of this machine"),
    ];
    if let Some(config) = &environment.config_dir {
        places.push((real(config), "config folder"));
    }
    if let Location::Local { folder } = &resolved.target.place {
        places.push((real(folder), "container's folder"));
    }
    for (place, what) in places {
        if place.starts_with(&dir) {
            return Err(Failure::usage(format!(
                "can't mount at {}: that would hide the {what} ({})",
                dir.display(),
                place.display()
            ))
            .with_hint("nothing was started. Mount it at an empty folder"));
        }
    }
    Ok(())
}

/// As the kernel names it; of what doesn't exist yet, as much as does.
fn canonical(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => canonical(parent).join(name),
        _ => path.to_owned(),
    })
}

pub(super) fn run_umount(context: &Context, args: &UmountArgs) -> Result<Exit, Failure> {
    let dir = context.environment.absolute(&args.dir);
    let runtime_dir = context.environment.absolute(&context.global.runtime_dir);
    let mut reporter = Reporter::new(context.output, "");
    let closed = session::unmount(&runtime_dir, &dir, &mut reporter, &context.interrupt)?;
    reporter.clear();
    let sent = closed.volume.written_bytes;
    let mut text = format!("unmounted {}", dir.display());
    if sent > 0 {
        text.push_str(&format!("; {} sent", text::bytes(sent)));
        if closed.durable {
            text.push_str(", everything is on the server's disk");
        }
    }
    text.push('\n');
    let json = json!({
        "command": "umount",
        "result": exit_json(Exit::Done),
        "dir": path_json(&dir),
        "durable": closed.durable,
        "volume": closed.volume,
    });
    context.output.result(&text, &json)?;
    Ok(Exit::Done)
}
