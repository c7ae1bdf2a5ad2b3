//! The JSON that every command has in common.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::Value;

use super::exit_json;
use crate::Exit;

/// The result of `command`: `fields`, which is an object, and how the run ended.
pub(crate) fn result_json(command: &str, exit: Exit, mut fields: Value) -> Value {
    fields["schema"] = 1.into();
    fields["command"] = command.into();
    fields["result"] = exit_json(exit);
    fields
}

/// A path. JSON has no place for bytes that are not text: they are escaped as rsync does it.
pub(crate) fn path_json(path: &Path) -> String {
    sprat_snapshot::escape_name(path.as_os_str().as_bytes())
}
