//! Mail, by sendmail or SMTP, to one address at a time.

use std::path::Path;
use std::str::FromStr;

use lettre::address::Envelope;
use lettre::transport::smtp::authentication::Credentials;
use lettre::transport::smtp::client::{Certificate, CertificateStore, Tls, TlsParameters};
use lettre::transport::smtp::extension::ClientId;
use lettre::{Address, SmtpTransport, Transport};

use super::message::Message;
use super::{Network, within};
use crate::notify::private_text::PrivateText;
use crate::program;

/// How mail is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mail {
    /// One mail to each.
    pub to: Vec<String>,
    /// The sender's address. Without it: the login of SMTP if that is an address, else root of this host.
    pub from: Option<String>,
    /// Which way.
    pub route: MailRoute,
}

/// Which way mail goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MailRoute {
    /// The program `sendmail`, in one of [`Network::sendmail_folders`].
    Sendmail,
    /// A server.
    Smtp {
        /// Which one.
        server: SmtpServer,
        /// The login's password.
        password: Option<PrivateText>,
    },
}

/// A mail server, from `smtp://[USER@]HOST[:PORT]` or `smtps://…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SmtpServer {
    /// TLS from the beginning; else after STARTTLS.
    pub tls_first: bool,
    /// The login.
    pub user: Option<String>,
    /// Name or address.
    pub host: String,
    /// 465 with TLS from the beginning, else 587, if the URL names none.
    pub port: u16,
}

/// Why a text names no mail server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SmtpUrlError {
    /// Another scheme.
    #[error("must begin with smtp:// or smtps://")]
    Scheme,
    /// A password in the URL.
    #[error("a password must not stand in the URL: use `password_file` or `password_command`")]
    Password,
    /// No host, or a wrong port.
    #[error("must be smtp://[USER@]HOST[:PORT]")]
    Form,
}

impl FromStr for SmtpServer {
    type Err = SmtpUrlError;

    fn from_str(text: &str) -> Result<Self, SmtpUrlError> {
        let (tls_first, rest) = match text.split_once("://") {
            Some(("smtps", rest)) => (true, rest),
            Some(("smtp", rest)) => (false, rest),
            _ => return Err(SmtpUrlError::Scheme),
        };
        // The login may be an address.
        let (user, place) = match rest.rsplit_once('@') {
            Some((user, place)) => (Some(user), place),
            None => (None, rest),
        };
        if user.is_some_and(|user| user.contains(':')) {
            return Err(SmtpUrlError::Password);
        }
        let place = place.strip_suffix('/').unwrap_or(place);
        let (host, port) = match place.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => {
                (host, port.parse().map_err(|_| SmtpUrlError::Form)?)
            }
            _ => (place, if tls_first { 465 } else { 587 }),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let is_host = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | ':' | '_');
        if host.is_empty() || !host.chars().all(is_host) || user == Some("") || port == 0 {
            return Err(SmtpUrlError::Form);
        }
        Ok(Self {
            tls_first,
            user: user.map(|user| user.replace("%40", "@")),
            host: host.to_owned(),
            port,
        })
    }
}

/// Sends a mail to one address.
pub(super) fn send(
    mail: &Mail,
    to: &str,
    message: &Message<'_>,
    network: &Network,
) -> Result<(), String> {
    let is_harmless = |text: &str| !text.starts_with('-') && !text.contains(char::is_control);
    let from = from(mail, message.host);
    if !is_harmless(to) || !is_harmless(&from) {
        return Err("the address has characters that no address has".to_owned());
    }
    let bytes = message.bytes(&format!("sprat <{from}>"), to);
    match &mail.route {
        MailRoute::Sendmail => sendmail(mail.from.as_deref(), to, &bytes, network),
        MailRoute::Smtp { server, password } => {
            let smtp = Smtp {
                server: server.clone(),
                password: match password {
                    None => None,
                    Some(password) => Some(password.read(network.limit)?),
                },
                from,
                to: to.to_owned(),
                hello: message.host.to_owned(),
                network: network.clone(),
            };
            within(network.limit, move || smtp.send(&bytes))
        }
    }
}

fn from(mail: &Mail, host: &str) -> String {
    let login = match &mail.route {
        MailRoute::Smtp { server, .. } => server.user.clone(),
        MailRoute::Sendmail => None,
    };
    let login = login.filter(|login| login.contains('@'));
    let from = mail.from.clone().or(login);
    from.unwrap_or_else(|| format!("root@{host}"))
}

/// Its exit 0 is the success: the mail is in its queue.
fn sendmail(from: Option<&str>, to: &str, message: &[u8], network: &Network) -> Result<(), String> {
    let mut paths = network
        .sendmail_folders
        .iter()
        .map(|folder| folder.join("sendmail"));
    let path = paths.find(|path| is_program(path));
    let path = path.ok_or("there is no program sendmail")?;
    let mut words = vec![path.display().to_string(), "-i".to_owned()];
    words.extend(
        from.iter()
            .flat_map(|from| ["-f".to_owned(), (*from).to_owned()]),
    );
    words.extend(["--".to_owned(), to.to_owned()]);
    // It takes the line ends of this system.
    let message = String::from_utf8_lossy(message).replace("\r\n", "\n");
    let ended = program::run(&words, message.as_bytes(), network.limit)
        .map_err(|error| format!("can't start {}: {error}", path.display()))?;
    match ended.status {
        Some(status) if status.success() => Ok(()),
        Some(status) => {
            let said = String::from_utf8_lossy(&ended.stderr);
            let said = said.lines().next_back().unwrap_or_default();
            let said = sprat_session::text::harmless_within(said, 200);
            Err(format!("sendmail failed ({status}): {said}"))
        }
        None => Err(format!(
            "sendmail did not end within {} s",
            network.limit.as_secs()
        )),
    }
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;

    let about = path.metadata();
    about.is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0)
}

/// One transaction with a server.
struct Smtp {
    server: SmtpServer,
    password: Option<zeroize::Zeroizing<String>>,
    from: String,
    to: String,
    hello: String,
    network: Network,
}

impl Smtp {
    fn send(&self, message: &[u8]) -> Result<(), String> {
        let address = |text: &str| {
            let parsed: Result<Address, _> = text.parse();
            parsed.map_err(|_| format!("SMTP needs a whole address, and {text:?} is none"))
        };
        let envelope = Envelope::new(Some(address(&self.from)?), vec![address(&self.to)?]);
        let envelope = envelope.map_err(|error| error.to_string())?;
        let mut transport = SmtpTransport::builder_dangerous(&self.server.host)
            .port(self.server.port)
            .hello_name(ClientId::Domain(self.hello.clone()))
            .timeout(Some(self.network.limit))
            .tls(self.tls()?);
        if let Some(user) = &self.server.user {
            let password = self
                .password
                .as_ref()
                .map_or("", |password| password.as_str());
            let login = Credentials::new(user.clone(), password.to_owned());
            transport = transport.credentials(login);
        }
        // A success is the server's 250 for the sender, the address and the text.
        // lettre ends the last line itself.
        let message = message.strip_suffix(b"\r\n").unwrap_or(message);
        let sent = transport.build().send_raw(&envelope, message);
        sent.map(drop).map_err(|error| {
            let said = explain(&error);
            // lettre's words for it; it has no kind of its own.
            match said.contains("STARTTLS is not supported") {
                true => format!(
                    "{}:{} offers no STARTTLS, and sprat sends no mail without TLS. Use smtps:// if the server has TLS \
                     from the start (port 465), a port with STARTTLS (587), or sendmail",
                    self.server.host, self.server.port
                ),
                false => said,
            }
        })
    }

    fn tls(&self) -> Result<Tls, String> {
        let mut tls = TlsParameters::builder(self.server.host.clone());
        if let Some(pem) = &self.network.only_root {
            let root = Certificate::from_pem(pem).map_err(|error| error.to_string())?;
            tls = tls
                .certificate_store(CertificateStore::None)
                .add_root_certificate(root);
        }
        let tls = tls.build().map_err(|error| explain(&error))?;
        // The password never goes over a connection without TLS.
        Ok(match self.server.tls_first {
            true => Tls::Wrapper(tls),
            false => Tls::Required(tls),
        })
    }
}

/// The error and its causes. lettre never puts the login into them.
fn explain(error: &dyn std::error::Error) -> String {
    let mut texts = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !texts.iter().any(|before| before.contains(&text)) {
            texts.push(text);
        }
        cause = error.source();
    }
    sprat_session::text::harmless_within(&texts.join(": "), 300)
}

#[cfg(test)]
mod tests;
