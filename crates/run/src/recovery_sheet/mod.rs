//! The recovery sheet: all that is needed to get everything back without sprat, as text and as a page.

mod file;
mod page;
mod text;

pub use file::{create, write};
pub use page::page;
pub use text::{Sheet, SheetJob, SheetParts, Step, TITLE};
