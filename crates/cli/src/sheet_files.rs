//! Writes a recovery sheet to standard output, to a file, and to a page to print.

use std::fs::File;
use std::path::PathBuf;

use sprat_run::recovery_sheet::{Sheet, create, page, write};
use zeroize::Zeroizing;

use crate::Failure;
use crate::environment::Environment;
use crate::output::{Output, path_json};

/// The files of a sheet. They are created before the secret exists.
#[derive(Debug, Default)]
pub(crate) struct SheetFiles {
    /// The text; `None`: standard output.
    sheet: Option<(File, PathBuf)>,
    /// The page.
    page: Option<(File, PathBuf)>,
}

impl SheetFiles {
    /// Creates the files, and checks standard output if the sheet is printed there. If it fails, it removes
    /// the files. `stdout`: the text or JSON on standard output contains the secret.
    pub(crate) fn create(
        output: Output,
        environment: &Environment,
        sheet: Option<&PathBuf>,
        page: Option<&PathBuf>,
        stdout: bool,
    ) -> Result<Self, Failure> {
        if stdout {
            output.ready_for_secret()?;
        }
        let make = |path: &PathBuf| -> Result<(File, PathBuf), Failure> {
            let path = environment.absolute(path);
            Ok((create(&path)?, path))
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

    /// Removes the files: a secret in them opens nothing.
    pub(crate) fn remove(&self) {
        for (_, path) in self.sheet.iter().chain(&self.page) {
            let _ = std::fs::remove_file(path);
        }
    }

    /// Whether the text goes to a file instead of standard output.
    pub(crate) fn text_in_file(&self) -> bool {
        self.sheet.is_some()
    }

    pub(crate) fn has_page(&self) -> bool {
        self.page.is_some()
    }

    /// Writes the files. A file that can't be written is removed: half of it may contain the whole secret.
    pub(crate) fn write(
        &self,
        output: Output,
        sheet: &Sheet<'_>,
        secret: Option<&str>,
    ) -> Result<(), Failure> {
        if let Some((file, path)) = &self.sheet {
            let text = Zeroizing::new(sheet.text());
            write(file, path, &text)?;
            output.note(&format!(
                "the recovery sheet is in {}: SECRET. Print it or put it into a password manager, keep \
                 it off this machine, and delete the file",
                path.display()
            ));
        }
        if let Some((file, path)) = &self.page {
            let page = page(sheet, secret)?;
            write(file, path, &page)?;
            output.note(&format!(
                "{} is SECRET: print it, keep the paper off this machine, and delete the file",
                path.display()
            ));
        }
        Ok(())
    }

    /// Writes the files, and prints the text if it has no file. JSON is printed by the command itself.
    pub(crate) fn show(
        &self,
        output: Output,
        sheet: &Sheet<'_>,
        secret: &str,
    ) -> Result<(), Failure> {
        self.write(output, sheet, Some(secret))?;
        if output.json || self.text_in_file() {
            return Ok(());
        }
        let text = Zeroizing::new(sheet.text());
        output.result(&text, &())
    }

    /// Prints `json`, or the text if `text` and if it has no file; then writes the files. One of the two is
    /// enough, so a failure to print keeps no file back.
    pub(crate) fn show_result(
        &self,
        output: Output,
        sheet: &Sheet<'_>,
        secret: Option<&str>,
        text: bool,
        json: &serde_json::Value,
    ) -> Result<(), Failure> {
        let text = Zeroizing::new(match text && !self.text_in_file() {
            true => sheet.text(),
            false => String::new(),
        });
        let printed = output.result(&text, json);
        self.write(output, sheet, secret)?;
        printed
    }

    /// The path of the text, as in JSON.
    pub(crate) fn text_path(&self) -> Option<String> {
        let (_, path) = self.sheet.as_ref()?;
        Some(path_json(path))
    }
}
