//! The channels: each sends one message, within a limit, and says exactly whether it was delivered.
//!
//! Always true:
//! - A failure is words for a person that hold no secret.
//! - A success is what the page of notices calls so, and nothing less.

mod desktop;
pub mod http;
mod mail;
mod message;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

pub use desktop::desktop_is_used;
pub use http::{Ping, check_url, ping};
use jiff::Timestamp;
pub use mail::{Mail, MailRoute, SmtpServer, SmtpUrlError};

use crate::notify::events::{Report, State};
use crate::notify::kinds::{Channel, Kind};
use crate::notify::private_text::PrivateText;
use crate::notify::words::Sender;
use crate::program;

/// How long a channel may take.
pub const LIMIT: Duration = Duration::from_secs(30);

/// Where sendmail lies, besides the folders of `PATH`.
const SENDMAIL_FOLDERS: [&str; 2] = ["/usr/sbin", "/usr/lib"];

/// How messages leave this machine.
#[derive(Debug, Clone)]
pub struct Network {
    /// The whole time that one message may take.
    pub limit: Duration,
    /// Where to find the program `sendmail`.
    pub sendmail_folders: Vec<PathBuf>,
    /// PEM of the only certificate that is trusted, instead of the system's. For tests.
    pub only_root: Option<Vec<u8>>,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            limit: LIMIT,
            sendmail_folders: SENDMAIL_FOLDERS.map(PathBuf::from).to_vec(),
            only_root: None,
        }
    }
}

impl Network {
    /// Finds sendmail in the folders of `PATH`, too.
    #[must_use]
    pub fn with_path(path: &std::ffi::OsStr) -> Self {
        let of_path = std::env::split_paths(path).filter(|folder| folder.is_absolute());
        let mut network = Self::default();
        network.sendmail_folders.splice(0..0, of_path);
        network
    }
}

/// The channels of the config.
#[derive(Debug, Clone, Default)]
pub struct Channels {
    /// Mail.
    pub mail: Option<Mail>,
    /// A notice on the screen of who works at this machine.
    pub desktop: bool,
    /// A program and its arguments. It gets one notice as JSON on its standard input.
    pub command: Option<Vec<OsString>>,
    /// A URL that gets one notice as JSON.
    pub webhook: Option<PrivateText>,
    /// The URL of a topic.
    pub ntfy: Option<PrivateText>,
}

impl Channels {
    /// Those that are there, each address of `mail` by itself.
    #[must_use]
    pub fn list(&self) -> Vec<Channel> {
        let mail = self.mail.iter().flat_map(|mail| &mail.to);
        let mut all: Vec<_> = mail.cloned().map(Channel::Mail).collect();
        all.extend(self.desktop.then_some(Channel::Desktop));
        all.extend(self.command.as_ref().map(|_| Channel::Command));
        all.extend(self.webhook.as_ref().map(|_| Channel::Webhook));
        all.extend(self.ntfy.as_ref().map(|_| Channel::Ntfy));
        all
    }

    /// Sends reports by one channel: several at once where [`takes_all_at_once`], else exactly one.
    ///
    /// # Errors
    /// Not delivered, in words that hold no secret.
    pub fn send(
        &self,
        channel: &Channel,
        reports: &[Report],
        now: Timestamp,
        sender: &Sender,
        network: &Network,
    ) -> Result<(), String> {
        match channel {
            Channel::Mail(to) => {
                let mail = self.mail.as_ref().ok_or("no mail is set up")?;
                let (subject, body) = sender.mail(reports);
                let message = message::Message {
                    subject: &subject,
                    body: &body,
                    id: reports.last().map_or("", |report| &report.id),
                    host: &sender.host,
                    date: now,
                };
                mail::send(mail, to, &message, network)
            }
            Channel::Desktop => {
                let (title, text) = sender.short(reports);
                let is_urgent = reports.iter().any(is_urgent);
                within(network.limit, move || {
                    desktop::send(&title, &text, is_urgent)
                })
            }
            Channel::Command => {
                let words = self.command.as_ref().ok_or("no command is set up")?;
                command(words, &json(reports, sender)?, network)
            }
            Channel::Webhook => {
                let url = self.webhook.as_ref().ok_or("no webhook is set up")?;
                let body = json(reports, sender)?;
                let headers = [("Content-Type", "application/json")];
                let post = http::Post {
                    headers: &headers,
                    body: &body,
                };
                http::post(&url.read(network.limit)?, &post, network)
            }
            Channel::Ntfy => {
                let url = self.ntfy.as_ref().ok_or("no ntfy is set up")?;
                let (title, text) = sender.short(reports);
                let text = format!("{title}: {text}");
                let priority = match reports.iter().any(is_urgent) {
                    true => "high",
                    false => "default",
                };
                let headers = [("Title", "sprat"), ("Priority", priority)];
                let post = http::Post {
                    headers: &headers,
                    body: begin_of(&text, http::NTFY_BYTES_MAX),
                };
                http::post(&url.read(network.limit)?, &post, network)
            }
        }
    }
}

/// Whether all reports of one run go in one message.
#[must_use]
pub fn takes_all_at_once(channel: &Channel) -> bool {
    match channel {
        Channel::Mail(_) | Channel::Desktop | Channel::Ntfy => true,
        Channel::Command | Channel::Webhook => false,
    }
}

fn is_urgent(report: &Report) -> bool {
    let is_open = !matches!(report.state, State::Closed | State::Passed);
    let kind = report.event.key.kind;
    is_open
        && matches!(
            kind,
            Kind::Damage | Kind::Failure | Kind::Overdue | Kind::Change
        )
}

fn json(reports: &[Report], sender: &Sender) -> Result<String, String> {
    let [report] = reports else {
        return Err("one notice at a time".to_owned());
    };
    serde_json::to_string(&sender.json(report)).map_err(|error| error.to_string())
}

/// Its output is not shown: it may hold what the program knows.
fn command(words: &[OsString], json: &str, network: &Network) -> Result<(), String> {
    let name = words.first().map(|name| name.to_string_lossy());
    let name = name.unwrap_or_default();
    let ended = program::run(words, format!("{json}\n").as_bytes(), network.limit)
        .map_err(|error| format!("can't start {name}: {error}"))?;
    match ended.status {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(format!("{name} failed: {status}")),
        None => Err(format!(
            "{name} did not end within {} s",
            network.limit.as_secs()
        )),
    }
}

/// At most so many bytes, whole characters.
fn begin_of(text: &str, bytes_max: usize) -> &str {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Does something on a thread of its own and waits so long for it. A thread that takes longer ends by
/// the limits of its connections, or with the process.
fn within(
    limit: Duration,
    work: impl FnOnce() -> Result<(), String> + Send + 'static,
) -> Result<(), String> {
    let (sender, result) = mpsc::channel();
    std::thread::Builder::new()
        .name("notice".to_owned())
        .spawn(move || sender.send(work()))
        .map_err(|error| error.to_string())?;
    match result.recv_timeout(limit) {
        Ok(result) => result,
        Err(_) => Err(format!("not done within {} s", limit.as_secs())),
    }
}
