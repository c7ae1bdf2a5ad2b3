//! Servers that receive notices: SMTP (aiosmtpd) and HTTP, with and without TLS, on loopback.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use openssl::asn1::Asn1Time;
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::x509::extension::{BasicConstraints, SubjectAlternativeName};
use openssl::x509::{X509, X509NameBuilder};
use serde_json::Value;

/// The Python of the system: the modules are packages of the distribution.
pub const PYTHON: &str = "/usr/bin/python3";

/// What is missing if the system's Python lacks a module.
#[must_use]
pub fn python_module_missing(module: &str) -> Option<String> {
    let import = Command::new(PYTHON)
        .args(["-c", &format!("import {module}")])
        .output();
    let has_it = import.is_ok_and(|output| output.status.success());
    (!has_it).then(|| format!("{PYTHON} has no {module}"))
}

/// What a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// No TLS.
    Plain,
    /// TLS after `STARTTLS`; SMTP only.
    StartTls,
    /// TLS from the beginning.
    Tls,
}

impl Wire {
    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::StartTls => "starttls",
            Self::Tls => "tls",
        }
    }
}

/// A server; ends when it is dropped.
#[derive(Debug)]
pub struct NoticeServer {
    folder: tempfile::TempDir,
    child: Child,
    /// On 127.0.0.1, which its certificate names, too.
    pub port: u16,
}

impl NoticeServer {
    /// Starts an SMTP server; with `login` (user and password) it wants a login.
    ///
    /// # Panics
    /// When it does not come up; needs the Python module `aiosmtpd`.
    #[must_use]
    pub fn smtp(wire: Wire, login: Option<(&str, &str)>) -> Self {
        let login = login.map(|(user, password)| [user, password]);
        let login = login.as_ref().map_or(&[][..], |login| login);
        Self::start(include_str!("notice_servers/smtp_server.py"), wire, login)
    }

    /// Starts a web server.
    ///
    /// # Panics
    /// When it does not come up; needs the system's Python.
    #[must_use]
    pub fn http(wire: Wire) -> Self {
        Self::start(include_str!("notice_servers/http_server.py"), wire, &[])
    }

    fn start(program: &str, wire: Wire, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("server.py"), program).expect("the program");
        make_certificate(folder.path());
        let mut child = Command::new(PYTHON)
            .arg(folder.path().join("server.py"))
            .arg(wire.name())
            .arg(folder.path())
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped"))
            .read_line(&mut line)
            .expect("a line");
        let port = line.trim().parse().expect("the server prints its port");
        Self {
            folder,
            child,
            port,
        }
    }

    /// The certificate to trust, as PEM.
    ///
    /// # Panics
    /// When it can't be read.
    #[must_use]
    pub fn certificate(&self) -> Vec<u8> {
        fs::read(self.folder.path().join("cert.pem")).expect("the certificate")
    }

    /// What it received so far.
    ///
    /// # Panics
    /// When that is not JSON.
    #[must_use]
    pub fn received(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.folder.path().join("received")).unwrap_or_default();
        let lines = text.lines();
        lines
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect()
    }
}

impl Drop for NoticeServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes a key, and a certificate for 127.0.0.1 and localhost that it signed itself.
fn make_certificate(folder: &Path) {
    let make = || -> Result<_, openssl::error::ErrorStack> {
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
        let key = PKey::from_ec_key(EcKey::generate(&group)?)?;
        let mut name = X509NameBuilder::new()?;
        name.append_entry_by_text("CN", "localhost")?;
        let name = name.build();
        let mut cert = X509::builder()?;
        cert.set_version(2)?;
        let serial = BigNum::from_u32(1)?.to_asn1_integer()?;
        cert.set_serial_number(&serial)?;
        cert.set_subject_name(&name)?;
        cert.set_issuer_name(&name)?;
        cert.set_not_before(Asn1Time::days_from_now(0)?.as_ref())?;
        cert.set_not_after(Asn1Time::days_from_now(2)?.as_ref())?;
        cert.set_pubkey(&key)?;
        cert.append_extension(BasicConstraints::new().critical().ca().build()?)?;
        let names = SubjectAlternativeName::new()
            .ip("127.0.0.1")
            .dns("localhost")
            .build(&cert.x509v3_context(None, None))?;
        cert.append_extension(names)?;
        cert.sign(&key, MessageDigest::sha256())?;
        Ok((cert.build().to_pem()?, key.private_key_to_pem_pkcs8()?))
    };
    let (cert, key) = make().expect("a certificate");
    fs::write(folder.join("cert.pem"), cert).expect("the certificate");
    fs::write(folder.join("key.pem"), key).expect("the key");
}
