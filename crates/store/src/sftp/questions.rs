//! What a store asks ahead: see [`crate::Store::ask_ahead`].

use super::channel::Channel;
use super::codec::{OpenFor, Request};
use super::session::{SessionOptions, SftpSession};
use crate::FileName;
use crate::contract::Question;

impl SessionOptions {
    /// Asks what every connection asks, and its questions, before the server's greeting is there.
    /// Version 3 is the only one that sprat speaks, so nothing of it depends on the greeting. A
    /// server without an extension refuses it (draft-ietf-secsh-filexfer-02, 8), and then nobody
    /// takes that answer.
    pub(super) fn ask_with_init(&self, channel: &Channel) {
        let path = self.folder_path();
        channel.ask_ahead(&Request::Stat { path });
        channel.ask_ahead(&Request::Limits);
        for question in &self.questions {
            self.ask_ahead(channel, question);
        }
    }

    fn ask_ahead(&self, channel: &Channel, question: &Question) {
        let folder = self.folder_path();
        let lstat = |path: &str| channel.ask_ahead(&Request::Lstat { path });
        match question {
            Question::FreeSpace => channel.ask_ahead(&Request::Statvfs { path: folder }),
            Question::List => channel.ask_ahead(&Request::Opendir { path: folder }),
            Question::Stat(name) => lstat(&self.path(name)),
            Question::Open(name, access) => {
                let path = &self.path(name);
                lstat(path);
                let how = OpenFor::existing(*access);
                channel.ask_ahead(&Request::Open { path, how });
            }
        }
    }

    /// The folder's path in requests.
    pub(super) fn folder_path(&self) -> &str {
        match self.folder.as_str() {
            "" => ".",
            folder => folder,
        }
    }

    /// A file's path in requests.
    pub(super) fn path(&self, name: &FileName) -> String {
        format!("{}/{name}", self.folder_path().trim_end_matches('/'))
    }
}

impl SftpSession {
    /// See [`crate::Store::ask_ahead`].
    pub(crate) fn ask_ahead(&self, questions: &[Question]) {
        for question in questions {
            if !matches!(question, Question::FreeSpace) || self.extensions.statvfs {
                self.options.ask_ahead(&self.first, question);
            }
        }
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
