//! `sprat backup --dry-run`: what would be copied and excluded. Opens no container.

use serde_json::json;
use sprat_run::runner::{ContainerWork, file_list};
use sprat_run::sources::preview_text;
use sprat_session::state::paths::StatePaths;
use sprat_session::{Access, IdentityPolicy};
use sprat_snapshot::CensusSpec;

use super::context::{Context, Resolved};
use crate::output::result_json;
use crate::{Exit, Failure};

/// Shows what a backup of these copies would do.
pub(super) fn show(
    context: &Context,
    resolved: &[Resolved],
    groups: &[ContainerWork<'_>],
    all: bool,
) -> Result<Exit, Failure> {
    let (mut text, mut jobs, mut exits) = (String::new(), Vec::new(), Vec::new());
    for (resolved, group) in resolved.iter().zip(groups) {
        let settings = context.session_options(resolved, Access::ReadOnly)?;
        for copy in &group.copies {
            let mut spec = copy.spec.clone();
            if let IdentityPolicy::Known(pins) = &settings.pins {
                let paths = StatePaths::new(&settings.state_dir, &pins.uuid, &resolved.target);
                spec.census = Some(CensusSpec {
                    list: file_list(&paths, &copy.name.job),
                    stop_over_bytes: None,
                });
            }
            let preview = sprat_session::preview(&settings, spec, all, &context.interrupt)?;
            exits.push(match preview.unread.is_empty() {
                true => Exit::Done,
                false => Exit::Unread,
            });
            text.push_str(&preview_text(&copy.shown, copy.job, &preview));
            let name = &copy.name;
            jobs.push(json!({
                "job": name.job,
                "container": name.container,
                "preview": preview,
            }));
        }
    }
    let exit = Exit::worst(exits.into_iter());
    let json = result_json("backup", exit, json!({ "dry_run": true, "jobs": jobs }));
    context.output.result(&text, &json)?;
    Ok(exit)
}
