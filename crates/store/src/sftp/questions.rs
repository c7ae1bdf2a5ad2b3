//! What a store asks ahead: see [`crate::Store::ask_ahead`].

use super::codec::{OpenFor, Request};
use super::session::SftpSession;
use crate::FileName;
use crate::contract::Question;

impl SftpSession {
    /// See [`crate::Store::ask_ahead`].
    pub(crate) fn ask_ahead(&self, questions: &[Question]) {
        for question in questions {
            match question {
                Question::FreeSpace if self.extensions.statvfs => {
                    let path = self.folder_path();
                    self.first.ask_ahead(&Request::Statvfs { path });
                }
                Question::FreeSpace => {}
                Question::List => {
                    let path = self.folder_path();
                    self.first.ask_ahead(&Request::Opendir { path });
                }
                Question::Stat(name) => self.ask_stat_ahead(name),
                Question::Open(name, access) => {
                    self.ask_stat_ahead(name);
                    let (path, how) = (self.path(name), OpenFor::existing(*access));
                    self.first.ask_ahead(&Request::Open { path: &path, how });
                }
            }
        }
    }

    fn ask_stat_ahead(&self, name: &FileName) {
        let path = self.path(name);
        self.first.ask_ahead(&Request::Lstat { path: &path });
    }

    /// Ends what was asked ahead behind the request whose answer was the channel's `number`th, if
    /// the server did not keep the order.
    pub(super) fn forget_overtaken(&self, number: u64) {
        if !self.first.ahead.all_behind(number) {
            self.note_overtaking();
            self.first.ahead.forget();
        }
    }
}
