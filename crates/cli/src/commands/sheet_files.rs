//! Where a recovery sheet goes: standard output, a file, a page to print.

use std::fs::File;
use std::path::PathBuf;

use zeroize::Zeroizing;

use super::context::Context;
use crate::Failure;
use crate::sheet::Sheet;
use crate::sheet_page;

/// The files that a sheet is to be written to, made before there is a secret to put into them.
#[derive(Debug, Default)]
pub(super) struct SheetFiles {
    /// The text; `None`: standard output.
    sheet: Option<(File, PathBuf)>,
    /// The page.
    page: Option<(File, PathBuf)>,
}

impl SheetFiles {
    /// Makes the files, and checks standard output where the sheet goes there. Where it fails none is
    /// left. `stdout`: the text or JSON on standard output has the secret.
    pub(super) fn create(
        context: &Context,
        sheet: Option<&PathBuf>,
        page: Option<&PathBuf>,
        stdout: bool,
    ) -> Result<Self, Failure> {
        if stdout {
            context.output.ready_for_secret()?;
        }
        let make = |path: &PathBuf| -> Result<(File, PathBuf), Failure> {
            let path = context.environment.absolute(path);
            Ok((sheet_page::create(&path)?, path))
        };
        let mut files = Self {
            sheet: sheet.map(make).transpose()?,
            page: None,
        };
        match page.map(make).transpose() {
            Ok(page) => files.page = page,
            Err(failure) => {
                files.remove();
                return Err(failure);
            }
        }
        Ok(files)
    }

    /// Removes them: the secret in them, if any, opens nothing.
    pub(super) fn remove(&self) {
        for (_, path) in self.sheet.iter().chain(&self.page) {
            let _ = std::fs::remove_file(path);
        }
    }

    /// Whether the text goes to a file instead of standard output.
    pub(super) fn text_in_file(&self) -> bool {
        self.sheet.is_some()
    }

    pub(super) fn has_page(&self) -> bool {
        self.page.is_some()
    }

    /// Writes the files. One that can't be written is removed: half of it may hold the whole secret.
    pub(super) fn write(
        &self,
        context: &Context,
        sheet: &Sheet<'_>,
        made_at: &str,
        secret: Option<&str>,
    ) -> Result<(), Failure> {
        if let Some((file, path)) = &self.sheet {
            let text = Zeroizing::new(sheet.text(made_at));
            sheet_page::write(file, path, &text)?;
            context.output.note(&format!(
                "the recovery sheet is in {}: SECRET. Print it or put it into a password manager, keep \
                 it off this machine, and delete the file",
                path.display()
            ));
        }
        if let Some((file, path)) = &self.page {
            let page = sheet_page::page(sheet, made_at, secret)?;
            sheet_page::write(file, path, &page)?;
            context.output.note(&format!(
                "{} is SECRET: print it, keep the paper off this machine, and delete the file",
                path.display()
            ));
        }
        Ok(())
    }

    /// Where the text lies, as in JSON.
    pub(super) fn text_path(&self) -> Option<String> {
        let (_, path) = self.sheet.as_ref()?;
        Some(crate::output::path_json(path))
    }
}
