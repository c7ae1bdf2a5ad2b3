//! Mail arrives at a real SMTP server, and at a program in the place of sendmail.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use sprat_testkit::notice_servers::{NoticeServer, Wire, python_module_missing};
use sprat_testkit::requires;

use super::*;

const LETTER: Message<'static> = Message {
    subject: "sprat on laptop: home@nas: the backup is overdue",
    body: "Größe: 7 GiB\n.\nend\n",
    id: "id.1",
    host: "laptop",
    date: Timestamp::UNIX_EPOCH,
};

fn network() -> Network {
    Network {
        limit: Duration::from_secs(20),
        ..Network::default()
    }
}

fn smtp(server: &NoticeServer, url: &str, password: Option<&str>) -> Mail {
    let url = url.replace("PORT", &server.port.to_string());
    Mail {
        to: Vec::new(),
        from: Some("sprat@example.org".to_owned()),
        route: MailRoute::Smtp {
            server: url.parse().unwrap(),
            password: password.map(PrivateText::text),
        },
    }
}

fn trusting(server: &NoticeServer) -> Network {
    Network {
        only_root: Some(server.certificate()),
        ..network()
    }
}

#[test]
fn urls_of_servers_are_read() {
    let server = |tls_first, user: Option<&str>, host: &str, port| {
        Ok(SmtpServer {
            tls_first,
            user: user.map(str::to_owned),
            host: host.to_owned(),
            port,
        })
    };
    for (url, parsed) in [
        (
            "smtp://mail.example.org",
            server(false, None, "mail.example.org", 587),
        ),
        ("smtps://me@host/", server(true, Some("me"), "host", 465)),
        (
            "smtp://me@example.org@host:25",
            server(false, Some("me@example.org"), "host", 25),
        ),
        (
            "smtp://me%40example.org@host",
            server(false, Some("me@example.org"), "host", 587),
        ),
        ("smtps://[::1]:4650", server(true, None, "::1", 4650)),
        ("smtps://[::1]", server(true, None, "::1", 465)),
        ("http://host", Err(SmtpUrlError::Scheme)),
        ("host", Err(SmtpUrlError::Scheme)),
        ("smtp://me:secret@host", Err(SmtpUrlError::Password)),
        ("smtp://", Err(SmtpUrlError::Form)),
        ("smtp://@host", Err(SmtpUrlError::Form)),
        ("smtp://host:99999", Err(SmtpUrlError::Form)),
        ("smtp://host:0", Err(SmtpUrlError::Form)),
        ("smtp://ho st", Err(SmtpUrlError::Form)),
        ("smtp://host/path", Err(SmtpUrlError::Form)),
    ] {
        assert_eq!(url.parse::<SmtpServer>(), parsed, "{url}");
    }
}

#[test]
fn mail_arrives_over_starttls_and_over_tls() {
    requires!(python_module_missing("aiosmtpd"));
    for (wire, url) in [
        (Wire::StartTls, "smtp://127.0.0.1:PORT"),
        (Wire::Tls, "smtps://localhost:PORT"),
    ] {
        let server = NoticeServer::smtp(wire, None);
        let mail = smtp(&server, url, None);
        let sent = send(&mail, "root@example.org", &LETTER, &trusting(&server));
        assert_eq!(sent, Ok(()), "{wire:?}");
        let received = server.received();
        assert_eq!(received.len(), 1);
        assert_eq!(received[0]["tls"], true);
        assert_eq!(received[0]["from"], "sprat@example.org");
        assert_eq!(received[0]["to"], serde_json::json!(["root@example.org"]));
        let content = received[0]["content"].as_str().unwrap();
        let (head, body) = content.split_once("\r\n\r\n").unwrap();
        assert!(
            head.contains(&format!("Subject: {}\r\n", LETTER.subject)),
            "{head}"
        );
        let body = openssl::base64::decode_block(&body.replace("\r\n", "")).unwrap();
        assert_eq!(String::from_utf8(body).unwrap(), LETTER.body);
        // A certificate that nobody trusts: nothing is sent.
        let why = send(&mail, "root@example.org", &LETTER, &network()).unwrap_err();
        assert!(why.contains("certificate"), "{why}");
        assert_eq!(server.received().len(), 1);
    }
}

#[test]
fn text_with_dots_arrives_as_it_is() {
    requires!(python_module_missing("aiosmtpd"));
    let server = NoticeServer::smtp(Wire::Tls, None);
    let mail = smtp(&server, "smtps://localhost:PORT", None);
    let letter = Message {
        body: "one\n.\n..two\n.three\n",
        ..LETTER
    };
    send(&mail, "root@example.org", &letter, &trusting(&server)).unwrap();
    let received = server.received();
    let content = received[0]["content"].as_str().unwrap();
    assert!(
        content.ends_with("\r\n\r\none\r\n.\r\n..two\r\n.three\r\n"),
        "{content}"
    );
}

#[test]
fn server_without_tls_gets_neither_mail_nor_password() {
    requires!(python_module_missing("aiosmtpd"));
    let server = NoticeServer::smtp(Wire::Plain, None);
    for (url, said) in [
        ("smtp://me@127.0.0.1:PORT", "offers no STARTTLS"),
        ("smtps://me@127.0.0.1:PORT", ""),
    ] {
        let mail = smtp(&server, url, Some("secret"));
        let why = send(&mail, "root@example.org", &LETTER, &trusting(&server)).unwrap_err();
        assert!(!why.contains("secret") && why.contains(said), "{why}");
    }
    assert!(server.received().is_empty());
}

#[test]
fn login_works_and_a_wrong_password_is_reported_without_it() {
    requires!(python_module_missing("aiosmtpd"));
    for (wire, url) in [
        (Wire::StartTls, "smtp://me@example.org@127.0.0.1:PORT"),
        (Wire::Tls, "smtps://me@example.org@127.0.0.1:PORT"),
    ] {
        let server = NoticeServer::smtp(wire, Some(("me@example.org", "right secret")));
        let right = smtp(&server, url, Some("right secret"));
        let network = trusting(&server);
        assert_eq!(send(&right, "root@example.org", &LETTER, &network), Ok(()));
        let wrong = smtp(&server, url, Some("wrong secret"));
        let why = send(&wrong, "root@example.org", &LETTER, &network).unwrap_err();
        assert!(why.contains("535") && !why.contains("secret"), "{why}");
        assert_eq!(server.received().len(), 1);
    }
}

#[test]
fn refused_address_is_a_failure_with_the_servers_words() {
    requires!(python_module_missing("aiosmtpd"));
    let server = NoticeServer::smtp(Wire::StartTls, None);
    let mail = smtp(&server, "smtp://127.0.0.1:PORT", None);
    let network = trusting(&server);
    let why = send(&mail, "nobody@example.org", &LETTER, &network).unwrap_err();
    assert!(why.contains("no such user"), "{why}");
    let why = send(&mail, "root", &LETTER, &network).unwrap_err();
    assert!(why.contains("whole address"), "{why}");
    assert!(server.received().is_empty());
}

#[test]
fn mail_server_that_never_answers_is_left_at_the_limit() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("smtp://{}", silent.local_addr().unwrap());
    let mail = Mail {
        to: Vec::new(),
        from: None,
        route: MailRoute::Smtp {
            server: url.parse().unwrap(),
            password: None,
        },
    };
    let short = Network {
        limit: Duration::from_millis(300),
        ..network()
    };
    let begun = Instant::now();
    assert!(send(&mail, "root@example.org", &LETTER, &short).is_err());
    assert!(begun.elapsed() < Duration::from_secs(10));
}

const BY_SENDMAIL: Mail = Mail {
    to: Vec::new(),
    from: None,
    route: MailRoute::Sendmail,
};

/// A program in the place of sendmail that keeps its arguments and its input.
fn recording_sendmail(folder: &tempfile::TempDir, end: &str) -> Network {
    let at = folder.path().display();
    let path = folder.path().join("sendmail");
    let script = format!("#!/bin/sh\nprintf '%s\\n' \"$@\" > {at}/words\ncat > {at}/mail\n{end}\n");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    Network {
        sendmail_folders: vec![PathBuf::from("/nowhere"), folder.path().to_owned()],
        ..network()
    }
}

#[test]
fn sendmail_gets_address_and_mail_and_its_exit_counts() {
    let folder = tempfile::tempdir().unwrap();
    let network = recording_sendmail(&folder, "exit 0");
    let mut mail = BY_SENDMAIL;
    // A local user has no domain.
    assert_eq!(send(&mail, "root", &LETTER, &network), Ok(()));
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    assert_eq!(read("words"), "-i\n--\nroot\n");
    assert!(read("mail").starts_with("From: sprat <root@laptop>\nTo: root\nSubject: sprat on"));
    assert!(!read("mail").contains('\r'));
    mail.from = Some("me@example.org".to_owned());
    send(&mail, "root", &LETTER, &network).unwrap();
    assert_eq!(read("words"), "-i\n-f\nme@example.org\n--\nroot\n");
    for bad in ["-oQ/tmp", "a\nb"] {
        assert!(send(&mail, bad, &LETTER, &network).is_err());
    }
    let full = recording_sendmail(&folder, "echo queue is full >&2; exit 75");
    let why = send(&BY_SENDMAIL, "root", &LETTER, &full).unwrap_err();
    assert!(why.contains("75") && why.contains("queue is full"), "{why}");
    let slow = Network {
        limit: Duration::from_millis(300),
        ..recording_sendmail(&folder, "exec sleep 1000")
    };
    let why = send(&BY_SENDMAIL, "root", &LETTER, &slow).unwrap_err();
    assert!(why.contains("did not end"), "{why}");
}

#[test]
fn machine_without_sendmail_says_so() {
    let nowhere = Network {
        sendmail_folders: vec![PathBuf::from("/nowhere")],
        ..network()
    };
    let why = send(&BY_SENDMAIL, "root", &LETTER, &nowhere).unwrap_err();
    assert_eq!(why, "there is no program sendmail");
}
