//! Requests over HTTP: webhook, ntfy and the pings of healthchecks. Redirects are not followed.

use std::net::IpAddr;
use std::time::Duration;

use ureq::config::Config;
use ureq::http::Uri;
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

use super::Network;

/// Longest message of ntfy, in bytes; it makes an attachment of a longer one.
pub(super) const NTFY_BYTES_MAX: usize = 4000;

/// Checks the form of an address in the config: https, or http to this machine or a private address.
/// What a name leads to is checked when it is used.
///
/// # Errors
/// In words that don't show the address: it may hold a secret.
pub fn check_url(url: &str) -> Result<(), String> {
    let uri: Uri = url.parse().map_err(|_| "this is no URL".to_owned())?;
    let host = uri.host().filter(|host| !host.is_empty());
    let host = host.ok_or("the URL has no host")?;
    match uri.scheme_str() {
        Some("https") => Ok(()),
        Some("http") => {
            let is_near = match literal(host) {
                Some(address) => is_private(address),
                None => is_local_name(host),
            };
            is_near.then_some(()).ok_or_else(|| NOT_PRIVATE.to_owned())
        }
        _ => Err("it must begin with https://".to_owned()),
    }
}

const NOT_PRIVATE: &str =
    "http:// is allowed only for this machine and for private addresses: write https://";

/// Endings of names that the internet does not have (RFC 6761, 6762, 8375 and ICANN's `internal`), and
/// `lan`, which many routers give.
const LOCAL_ENDINGS: [&str; 5] = ["localhost", "local", "lan", "internal", "home.arpa"];

fn is_local_name(host: &str) -> bool {
    let host = host.to_ascii_lowercase();
    let is_below = |ending: &&str| host.ends_with(&format!(".{ending}"));
    !host.contains('.') || LOCAL_ENDINGS.iter().any(is_below)
}

fn literal(host: &str) -> Option<IpAddr> {
    let host = host.strip_prefix('[').unwrap_or(host);
    host.strip_suffix(']').unwrap_or(host).parse().ok()
}

fn is_private(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_private() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unique_local() || v6.is_unicast_link_local(),
    }
}

/// A request.
#[derive(Debug)]
pub(super) struct Post<'p> {
    pub headers: &'p [(&'static str, &'p str)],
    pub body: &'p str,
}

/// Sends a request. Success is a status from 200 to 299.
pub(super) fn post(url: &str, request: &Post<'_>, network: &Network) -> Result<(), String> {
    check_url(url)?;
    let agent = ureq::Agent::with_parts(
        config(network)?,
        DefaultConnector::default(),
        PrivateOnly::default(),
    );
    let mut post = agent.post(url);
    for (name, value) in request.headers {
        post = post.header(*name, *value);
    }
    let answer = post
        .send(request.body)
        .map_err(|error| explain(&error, network.limit))?;
    match answer.status().as_u16() {
        200..=299 => Ok(()),
        status @ 300..=399 => Err(format!(
            "the server answered with a redirection (status {status}), which is not followed"
        )),
        status => Err(format!("the server answered with status {status}")),
    }
}

fn config(network: &Network) -> Result<Config, String> {
    let roots = match &network.only_root {
        None => RootCerts::PlatformVerifier,
        Some(pem) => {
            let certificate = Certificate::from_pem(pem).map_err(|error| error.to_string())?;
            RootCerts::new_with_certs(&[certificate])
        }
    };
    let tls = TlsConfig::builder()
        .provider(TlsProvider::NativeTls)
        .root_certs(roots)
        .build();
    Ok(ureq::Agent::config_builder()
        .timeout_global(Some(network.limit))
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        // Nothing is read from the environment.
        .proxy(None)
        .user_agent("sprat")
        .tls_config(tls)
        .build())
}

/// In words that never hold the URL.
fn explain(error: &ureq::Error, limit: Duration) -> String {
    match error {
        ureq::Error::Timeout(_) => format!("no answer within {} s", limit.as_secs()),
        ureq::Error::HostNotFound => "the host was not found".to_owned(),
        ureq::Error::Io(error) => error.to_string(),
        ureq::Error::NativeTls(error) => format!("TLS failed: {error}"),
        ureq::Error::Tls(what) => format!("TLS failed: {what}"),
        ureq::Error::Other(error) if error.is::<NotPrivate>() => NOT_PRIVATE.to_owned(),
        ureq::Error::ConnectionFailed => "no connection to the server".to_owned(),
        _ => "the request failed".to_owned(),
    }
}

/// Finds addresses; those of an `http://` URL must be private.
#[derive(Debug, Default)]
struct PrivateOnly(DefaultResolver);

#[derive(Debug, thiserror::Error)]
#[error("not a private address")]
struct NotPrivate;

impl Resolver for PrivateOnly {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let found = self.0.resolve(uri, config, timeout)?;
        let is_plain = uri.scheme_str() != Some("https");
        if is_plain && !found.iter().all(|address| is_private(address.ip())) {
            return Err(ureq::Error::Other(Box::new(NotPrivate)));
        }
        Ok(found)
    }
}

/// A ping of healthchecks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ping {
    /// It began.
    Start,
    /// Code 0.
    Complete,
    /// Code 3.
    Incomplete,
    /// Every other code.
    Fail,
}

impl Ping {
    /// The ping of an exit code.
    #[must_use]
    pub fn of(code: u8) -> Self {
        match code {
            0 => Self::Complete,
            3 => Self::Incomplete,
            _ => Self::Fail,
        }
    }
}

/// Sends a ping to the URL of a check; `run` is the run's id, a UUID.
///
/// # Errors
/// In words that don't show the URL: it is a secret.
pub fn ping(url: &str, ping: Ping, run: &str, network: &Network) -> Result<(), String> {
    let body = match ping {
        Ping::Incomplete => "incomplete",
        Ping::Start | Ping::Complete | Ping::Fail => "",
    };
    let request = Post { headers: &[], body };
    post(&ping_url(url, ping, run), &request, network)
}

fn ping_url(url: &str, ping: Ping, run: &str) -> String {
    let (path, query) = url.split_once('?').unwrap_or((url, ""));
    let end = match ping {
        Ping::Start => "/start",
        Ping::Complete | Ping::Incomplete => "",
        Ping::Fail => "/fail",
    };
    let more = if query.is_empty() { "" } else { "&" };
    format!("{}{end}?{query}{more}rid={run}", path.trim_end_matches('/'))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::Instant;

    use sprat_testkit::notice_servers::{NoticeServer, Wire, python_module_missing};
    use sprat_testkit::requires;

    use super::*;

    fn network() -> Network {
        Network {
            limit: Duration::from_secs(20),
            ..Network::default()
        }
    }

    const BODY: Post<'static> = Post {
        headers: &[("Content-Type", "application/json")],
        body: "{}",
    };

    #[test]
    fn only_https_and_private_http_are_allowed() {
        for right in [
            "https://example.org/x?y",
            "https://93.184.216.34/",
            "http://localhost:8080/x",
            "http://ntfy.lan/topic",
            "http://nas/topic",
            "http://127.0.0.1/",
            "http://192.168.1.2:80/",
            "http://10.0.0.1",
            "http://172.31.0.1",
            "http://[::1]:8080/",
            "http://[fd00::1]/",
        ] {
            assert_eq!(check_url(right), Ok(()), "{right}");
        }
        for wrong in [
            "http://93.184.216.34/secret",
            "http://172.32.0.1/secret",
            "http://ntfy.example.org/secret",
            "https://exa mple.org/secret",
            "http://[2001:db8::1]/secret",
            "http://[::ffff:93.184.216.34]/secret",
            "ftp://example.org/secret",
            "example.org/secret",
            "https:///secret",
            "secret",
            "",
        ] {
            let why = check_url(wrong).unwrap_err();
            assert!(!why.contains("secret"), "{why}");
        }
    }

    #[test]
    fn only_2xx_is_a_success_and_no_redirect_is_followed() {
        requires!(python_module_missing("http.server"));
        let server = NoticeServer::http(Wire::Plain);
        let url = |path: &str| format!("http://127.0.0.1:{}{path}", server.port);
        let send = |path: &str| post(&url(path), &BODY, &network());
        assert_eq!(send("/hook?token=1"), Ok(()));
        assert_eq!(send("/status/204"), Ok(()));
        assert!(send("/redirect").unwrap_err().contains("redirection"));
        assert!(send("/status/500").unwrap_err().contains("status 500"));
        assert!(send("/status/404").unwrap_err().contains("status 404"));
        let received = server.received();
        let paths: Vec<_> = received.iter().map(|request| &request["path"]).collect();
        assert_eq!(
            paths,
            [
                "/hook?token=1",
                "/status/204",
                "/redirect",
                "/status/500",
                "/status/404"
            ]
        );
        assert_eq!(received[0]["method"], "POST");
        assert_eq!(received[0]["body"], "{}");
        assert_eq!(received[0]["headers"]["content-type"], "application/json");
    }

    #[test]
    fn tls_needs_a_trusted_certificate_for_the_host() {
        requires!(python_module_missing("http.server"));
        let server = NoticeServer::http(Wire::Tls);
        let url = format!("https://localhost:{}/hook", server.port);
        let why = post(&url, &BODY, &network()).unwrap_err();
        assert!(
            why.contains("TLS failed") || why.contains("certificate"),
            "{why}"
        );
        assert!(server.received().is_empty());
        let trusting = Network {
            only_root: Some(server.certificate()),
            ..network()
        };
        assert_eq!(post(&url, &BODY, &trusting), Ok(()));
        assert_eq!(server.received().len(), 1);
        // Plain HTTP to it is no success.
        let plain = format!("http://127.0.0.1:{}/hook", server.port);
        assert!(post(&plain, &BODY, &network()).is_err());
    }

    #[test]
    fn server_that_never_answers_is_left_at_the_limit() {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/secret", silent.local_addr().unwrap());
        let short = Network {
            limit: Duration::from_millis(300),
            ..network()
        };
        let begun = Instant::now();
        let why = post(&url, &BODY, &short).unwrap_err();
        assert!(why.contains("no answer"), "{why}");
        assert!(begun.elapsed() < Duration::from_secs(10));
        drop(silent);
        let why = post(&url, &BODY, &network()).unwrap_err();
        assert!(why.contains("refused") && !why.contains("secret"), "{why}");
    }

    #[test]
    fn name_that_leads_to_a_public_address_is_refused_over_http() {
        let resolver = PrivateOnly::default();
        let config = config(&network()).unwrap();
        let timeout = || NextTimeout {
            after: ureq::unversioned::transport::time::Duration::NotHappening,
            reason: ureq::Timeout::Global,
            per_read: None,
            per_write: None,
        };
        let resolve = |url: &str| resolver.resolve(&url.parse().unwrap(), &config, timeout());
        assert!(resolve("http://localhost:80/").is_ok());
        assert!(resolve("https://93.184.216.34/").is_ok());
        let refused = resolve("http://93.184.216.34/").unwrap_err();
        assert_eq!(explain(&refused, network().limit), NOT_PRIVATE);
    }

    #[test]
    fn pings_have_their_path_the_run_and_incomplete_in_the_body() {
        requires!(python_module_missing("http.server"));
        let server = NoticeServer::http(Wire::Plain);
        let run = "0b9f2a1c-0000-4000-8000-000000000001";
        let url = format!("http://127.0.0.1:{}/key/home", server.port);
        for (what, path, body) in [
            (Ping::Start, "/key/home/start?rid=", ""),
            (Ping::of(0), "/key/home?rid=", ""),
            (Ping::of(3), "/key/home?rid=", "incomplete"),
            (Ping::of(1), "/key/home/fail?rid=", ""),
            (Ping::of(14), "/key/home/fail?rid=", ""),
        ] {
            assert_eq!(ping(&url, what, run, &network()), Ok(()));
            let last = server.received().pop().unwrap();
            assert_eq!(last["path"], format!("{path}{run}"));
            assert_eq!(last["body"], body);
        }
        assert_eq!(
            ping_url("https://hc.example/key/home/?create=1", Ping::Fail, "1"),
            "https://hc.example/key/home/fail?create=1&rid=1"
        );
    }
}
