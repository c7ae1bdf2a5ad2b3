//! A mail as bytes: headers and text, by RFC 5322, 2045 and 2047.

use jiff::Timestamp;

/// Base64 of an encoded word, so that the line stays below 76 characters.
const WORD_BYTES: usize = 42;
/// Base64 of one line of the body.
const LINE_BYTES: usize = 57;

/// What a mail says.
#[derive(Debug)]
pub(super) struct Message<'m> {
    pub subject: &'m str,
    pub body: &'m str,
    /// Without brackets and host.
    pub id: &'m str,
    pub host: &'m str,
    pub date: Timestamp,
}

impl Message<'_> {
    /// The mail to one address, with CRLF at the ends of lines.
    pub(super) fn bytes(&self, from: &str, to: &str) -> Vec<u8> {
        let date =
            jiff::fmt::rfc2822::to_string(&self.date.to_zoned_datetime(jiff::tz::TimeZone::UTC));
        let host = self
            .host
            .replace(|c: char| !c.is_ascii_alphanumeric() && c != '.', "-");
        let mut lines = vec![
            format!("From: {}", one_line(from)),
            format!("To: {}", one_line(to)),
            format!("Subject: {}", header_text(self.subject)),
            format!("Date: {}", date.unwrap_or_default()),
            format!("Message-ID: <{}@{host}>", one_line(self.id)),
            "MIME-Version: 1.0".to_owned(),
            // An answer of a machine, so no machine answers it (RFC 3834).
            "Auto-Submitted: auto-generated".to_owned(),
            "Content-Type: text/plain; charset=utf-8".to_owned(),
        ];
        let is_plain = self.body.is_ascii() && self.body.lines().all(|line| line.len() <= 900);
        if is_plain {
            lines.push("Content-Transfer-Encoding: 7bit".to_owned());
            lines.push(String::new());
            lines.extend(self.body.lines().map(str::to_owned));
        } else {
            lines.push("Content-Transfer-Encoding: base64".to_owned());
            lines.push(String::new());
            let pieces = self.body.as_bytes().chunks(LINE_BYTES);
            lines.extend(pieces.map(openssl::base64::encode_block));
        }
        let mut bytes = lines.join("\r\n").into_bytes();
        bytes.extend(b"\r\n");
        bytes
    }
}

/// No header begins inside another one.
fn one_line(text: &str) -> String {
    text.replace(|c: char| c.is_control(), " ")
}

/// ASCII as it is, everything else as encoded words.
fn header_text(text: &str) -> String {
    let text = one_line(text);
    if text.is_ascii() && text.len() <= 900 {
        return text;
    }
    let mut words = Vec::new();
    let mut word = String::new();
    for c in text.chars() {
        if word.len() + c.len_utf8() > WORD_BYTES {
            words.push(std::mem::take(&mut word));
        }
        word.push(c);
    }
    words.push(word);
    let encode = |word: &String| {
        let word = openssl::base64::encode_block(word.as_bytes());
        format!("=?utf-8?B?{word}?=")
    };
    let words: Vec<_> = words.iter().map(encode).collect();
    words.join("\r\n ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message<'m>(subject: &'m str, body: &'m str) -> String {
        let message = Message {
            subject,
            body,
            id: "id.1",
            host: "laptop",
            date: Timestamp::from_second(1_795_874_400).unwrap(),
        };
        String::from_utf8(message.bytes("sprat <root@laptop>", "root@example.org")).unwrap()
    }

    #[test]
    fn plain_text_stays_readable() {
        insta::assert_snapshot!(message("sprat on laptop: x", "one\ntwo\n").replace('\r', ""), @r"
        From: sprat <root@laptop>
        To: root@example.org
        Subject: sprat on laptop: x
        Date: Sat, 28 Nov 2026 14:00:00 +0000
        Message-ID: <id.1@laptop>
        MIME-Version: 1.0
        Auto-Submitted: auto-generated
        Content-Type: text/plain; charset=utf-8
        Content-Transfer-Encoding: 7bit

        one
        two
        ");
    }

    #[test]
    fn other_text_is_encoded_in_short_lines() {
        let text = "Rückgrat: ".repeat(30);
        let mail = message(&text, &text);
        assert!(mail.is_ascii());
        assert!(mail.split("\r\n").all(|line| line.len() <= 78), "{mail}");
        assert!(!mail.replace("\r\n", "").contains(['\r', '\n']));
        let (head, body) = mail.split_once("\r\n\r\n").unwrap();
        let body = openssl::base64::decode_block(&body.replace("\r\n", "")).unwrap();
        assert_eq!(String::from_utf8(body).unwrap(), text);
        let subject = head.split("Subject: ").nth(1).unwrap();
        let words = subject
            .split("\r\n")
            .take_while(|line| line.trim_start().starts_with("=?"));
        let words = words.map(|word| {
            let word = word.trim_start().strip_prefix("=?utf-8?B?").unwrap();
            let bytes = openssl::base64::decode_block(word.strip_suffix("?=").unwrap());
            String::from_utf8(bytes.unwrap()).unwrap()
        });
        assert_eq!(words.collect::<String>(), text);
    }

    #[test]
    fn no_header_can_be_smuggled_in() {
        let mail = message("x\r\nBcc: evil@example.org", "body");
        assert!(mail.contains("Subject: x  Bcc: evil@example.org\r\n"));
    }
}
