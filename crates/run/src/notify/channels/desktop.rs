//! A notice on the screen of the person at this machine: by the notification service of the
//! session's bus, asked as that user (org.freedesktop.Notifications, version 1.2).

use std::io;
use std::path::Path;

use rustix::process::Uid;
use sprat_session::message_bus::{Bus, Value, Values};

const LOGIND: &str = "org.freedesktop.login1";
const LOGIND_PATH: &str = "/org/freedesktop/login1";
const MANAGER: &str = "org.freedesktop.login1.Manager";
const SESSION: &str = "org.freedesktop.login1.Session";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
const NOTIFICATIONS: &str = "org.freedesktop.Notifications";
const NOTIFICATIONS_PATH: &str = "/org/freedesktop/Notifications";
/// Below it each user has a folder with the socket of the session's bus.
const RUNTIME_FOLDERS: &str = "/run/user";

/// Shows a notice in each active local graphical session. One that gave an id is a success.
pub(super) fn send(title: &str, text: &str, stays: bool) -> Result<(), String> {
    let mut system = Bus::system().map_err(|error| format!("no system bus: {error}"))?;
    let notice = Notice { title, text, stays };
    send_by(&mut system, Path::new(RUNTIME_FOLDERS), &notice)
}

struct Notice<'n> {
    title: &'n str,
    text: &'n str,
    /// Until a person closes it.
    stays: bool,
}

fn send_by(system: &mut Bus, runtime: &Path, notice: &Notice<'_>) -> Result<(), String> {
    let users =
        users_at_the_screen(system).map_err(|error| format!("logind did not answer: {error}"))?;
    let mut outcome = Err("there is no active graphical session on this machine".to_owned());
    for uid in users {
        let socket = runtime.join(uid.to_string()).join("bus");
        match as_user(uid, || notice.show(&socket)) {
            Ok(()) => outcome = Ok(()),
            Err(error) if outcome.is_err() => {
                outcome = Err(format!(
                    "the session of user {uid} did not show it: {error}"
                ));
            }
            Err(_) => {}
        }
    }
    outcome
}

/// Whether somebody works in an active local graphical session.
#[must_use]
pub fn desktop_is_used() -> bool {
    let users = Bus::system().and_then(|mut system| users_at_the_screen(&mut system));
    users.is_ok_and(|users| !users.is_empty())
}

/// The users of the sessions that are active, local and graphical.
fn users_at_the_screen(system: &mut Bus) -> io::Result<Vec<u32>> {
    let sessions = system.call(LOGIND, LOGIND_PATH, MANAGER, "ListSessions", &[])?;
    let sessions = sessions.values()?;
    let mut users = Vec::new();
    // Of each: id, user's number and name, seat, path.
    for session in sessions.chunks_exact(5) {
        let [_, Value::Number(uid), _, _, Value::Text(path)] = session else {
            return Err(io::Error::other("an unknown list of sessions"));
        };
        // One that ended meanwhile has no properties.
        if is_at_the_screen(system, path).unwrap_or(false) && !users.contains(uid) {
            users.push(*uid);
        }
    }
    Ok(users)
}

fn is_at_the_screen(system: &mut Bus, path: &str) -> io::Result<bool> {
    let mut get = |name: &str| -> io::Result<Option<Value>> {
        let answer = system.call(LOGIND, path, PROPERTIES, "Get", &[SESSION, name])?;
        Ok(answer.values()?.into_iter().next())
    };
    let kind = get("Type")?;
    let is_graphical = ["x11", "wayland", "mir"]
        .iter()
        .any(|name| kind == Some(Value::Text((*name).to_owned())));
    Ok(is_graphical
        && get("Class")? == Some(Value::Text("user".to_owned()))
        && get("Active")? == Some(Value::Number(1))
        && get("Remote")? == Some(Value::Number(0)))
}

/// Does something as a user, on a thread of its own: the kernel keeps users by thread. Only the
/// *effective* user changes. With the real one that user could send signals to this process.
fn as_user(uid: u32, work: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    let me = rustix::process::geteuid();
    let user = Uid::from_raw(uid);
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            if me != user {
                rustix::thread::set_thread_res_uid(None, user, None)?;
            }
            work()
        });
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("internal error: a thread panicked")))
    })
}

impl Notice<'_> {
    fn show(&self, socket: &Path) -> io::Result<()> {
        let mut bus = Bus::at(socket)?;
        let mut values = Values::default();
        values.text("sprat");
        // It replaces none.
        values.number(0);
        values.text("");
        values.text(self.title);
        values.text(&without_markup(self.text));
        let nothing: [&str; 0] = [];
        values.array(4, nothing, Values::text);
        values.array(8, nothing, Values::text);
        // 0 is for ever, -1 the service's own time.
        values.number(if self.stays { 0 } else { u32::MAX });
        let answer = bus.call_with(
            NOTIFICATIONS,
            NOTIFICATIONS_PATH,
            NOTIFICATIONS,
            "Notify",
            ("susssasa{sv}i", values),
        )?;
        match answer.number() {
            Some(1..) => Ok(()),
            _ => Err(io::Error::other("the service gave no id")),
        }
    }
}

/// Services may take `<b>` and the like for markup.
fn without_markup(text: &str) -> String {
    let text = text.replace('&', "&amp;");
    text.replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::sync::mpsc::{Receiver, channel};
    use std::time::Duration;

    use sprat_session::message_bus::Message;
    use sprat_testkit::private_bus::PrivateBus;
    use sprat_testkit::{needs, requires};

    use super::*;

    /// nobody and another one.
    const USER: u32 = 65_534;
    const OTHER: u32 = 65_533;

    /// A session: user, type, class, active, remote.
    type Session = (u32, &'static str, &'static str, bool, bool);

    /// A bus on which threads of the test are logind and the notification service.
    struct Desktop {
        bus: PrivateBus,
        runtime: tempfile::TempDir,
    }

    impl Desktop {
        fn start(sessions: &'static [Session]) -> Self {
            let bus = PrivateBus::start();
            let open = |path: &Path| {
                std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
            };
            open(bus.socket().parent().unwrap());
            let runtime = tempfile::tempdir().unwrap();
            open(runtime.path());
            let folder = runtime.path().join(USER.to_string());
            std::fs::create_dir(&folder).unwrap();
            symlink(bus.socket(), folder.join("bus")).unwrap();
            serve(&bus, LOGIND, move |bus, call| {
                answer_as_logind(bus, call, sessions);
            });
            Self { bus, runtime }
        }

        /// Starts the notification service, which gives this id; each notice with its user arrives here.
        fn notifications(&self, id: u32) -> Receiver<(u32, Vec<Value>)> {
            let (sender, shown) = channel();
            serve(&self.bus, NOTIFICATIONS, move |bus, call| {
                let user = bus
                    .ask_bus("GetConnectionUnixUser", &[&call.sender])
                    .unwrap();
                let _ = sender.send((user.number().unwrap(), call.values().unwrap()));
                let mut values = Values::default();
                values.number(id);
                bus.answer(call, ("u", values), None).unwrap();
            });
            shown
        }

        fn send(&self, text: &str) -> Result<(), String> {
            let mut system = Bus::at(&self.bus.socket()).unwrap();
            let notice = Notice {
                title: "sprat on laptop",
                text,
                stays: true,
            };
            send_by(&mut system, self.runtime.path(), &notice)
        }
    }

    /// Acquires a name and answers its calls on a thread, until the bus ends.
    fn serve(
        bus: &PrivateBus,
        name: &'static str,
        mut answer: impl FnMut(&mut Bus, &Message) + Send + 'static,
    ) {
        let mut bus = Bus::at(&bus.socket()).unwrap();
        bus.request_name(name).unwrap();
        std::thread::spawn(move || {
            while let Ok(call) = bus.next(Duration::from_secs(1)) {
                // Signals about the name have no answer.
                if let Some(call) = call.filter(|call| !call.member.starts_with("Name")) {
                    answer(&mut bus, &call);
                }
            }
        });
    }

    fn answer_as_logind(bus: &mut Bus, call: &Message, sessions: &[Session]) {
        let mut values = Values::default();
        if call.member == "ListSessions" {
            values.array(8, sessions.iter().enumerate(), |values, (at, session)| {
                values.align(8);
                values.text(&at.to_string());
                values.number(session.0);
                values.text("user");
                values.text("seat0");
                values.text(&format!("/session/{at}"));
            });
            bus.answer(call, ("a(susso)", values), None).unwrap();
            return;
        }
        let at: usize = call
            .path
            .strip_prefix("/session/")
            .unwrap()
            .parse()
            .unwrap();
        let (_, kind, class, active, remote) = sessions[at];
        let asked = call.values().unwrap();
        let Value::Text(name) = &asked[1] else {
            panic!("no name")
        };
        let (text, number) = match name.as_str() {
            "Type" => (kind, 0),
            "Class" => (class, 0),
            "Active" => ("", u32::from(active)),
            "Remote" => ("", u32::from(remote)),
            other => panic!("{other}"),
        };
        if text.is_empty() {
            values.signature("b");
            values.number(number);
        } else {
            values.signature("s");
            values.text(text);
        }
        bus.answer(call, ("v", values), None).unwrap();
    }

    #[test]
    fn notice_is_shown_by_the_active_local_graphical_session_as_its_user() {
        requires!(needs::program("dbus-daemon"), needs::root());
        let desktop = Desktop::start(&[
            (0, "tty", "user", true, false),
            (OTHER, "wayland", "user", false, false),
            (OTHER, "x11", "user", true, true),
            (OTHER, "wayland", "greeter", true, false),
            (USER, "wayland", "user", true, false),
        ]);
        let shown = desktop.notifications(7);
        assert_eq!(desktop.send("1 < 2 & <b>3</b>"), Ok(()));
        let (user, values) = shown.try_recv().unwrap();
        assert_eq!(user, USER);
        let text = |at: usize| match &values[at] {
            Value::Text(text) => text.as_str(),
            Value::Number(_) => panic!("no text"),
        };
        assert_eq!((text(0), text(3)), ("sprat", "sprat on laptop"));
        assert_eq!(text(4), "1 &lt; 2 &amp; &lt;b&gt;3&lt;/b&gt;");
        assert!(shown.try_recv().is_err());
        // This thread is who it was.
        assert!(rustix::process::geteuid().is_root());
    }

    #[test]
    fn without_a_session_a_service_or_an_id_it_is_not_delivered() {
        requires!(needs::program("dbus-daemon"), needs::root());
        let nobody = Desktop::start(&[(USER, "wayland", "user", false, false)]);
        let why = nobody.send("text").unwrap_err();
        assert!(why.contains("no active graphical session"), "{why}");
        let desktop = Desktop::start(&[(USER, "x11", "user", true, false)]);
        let why = desktop.send("text").unwrap_err();
        assert!(why.contains("did not show it"), "{why}");
        let _shown = desktop.notifications(0);
        let why = desktop.send("text").unwrap_err();
        assert!(why.contains("no id"), "{why}");
        // A user without a bus.
        let other = Desktop::start(&[(OTHER, "x11", "user", true, false)]);
        assert!(other.send("text").unwrap_err().contains("did not show it"));
    }
}
