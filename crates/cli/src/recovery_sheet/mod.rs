//! The recovery sheet: all that is needed to get everything back without sprat, as text and as a page.

mod files;
mod page;
mod text;

pub(crate) use files::SheetFiles;
pub use page::page;
pub(crate) use text::SheetParts;
pub use text::{Sheet, SheetJob, Step};
