//! The server: its host key, the login, and what it can do.

use sprat_session::address::SshLocation;
use sprat_session::ssh_config::Known;
use sprat_session::survey::{NotReached, Survey, survey};
use sprat_session::{Failure, text};

use super::place::{Place, login};
use super::{Setup, host_key, login as keys};
use crate::config::{Words, join_words};

/// Less free space is worth a warning, in bytes.
const LITTLE_BYTES: u64 = 10 << 30;

/// A server that lets us in.
pub(super) struct Reached {
    pub(super) survey: Survey,
    /// How ssh is run.
    pub(super) command: Words,
    /// The same, if the container's table must say it.
    pub(super) ssh_command: Option<Words>,
    /// The server lets only one connection in.
    pub(super) one_connection: bool,
}

impl Setup<'_> {
    /// Logs in. Adds the host key and makes an ssh key if they are missing.
    pub(super) fn reach(&mut self, place: &Place) -> Result<Reached, Failure> {
        let base = self.ssh_command(place);
        let Some(server) = place.target.ssh() else {
            let survey = self.survey(place, &base).map_err(|not| not.failure)?;
            return Ok(Reached {
                survey,
                command: base,
                ssh_command: None,
                one_connection: false,
            });
        };
        self.host_key(place, server, &base)?;
        let (survey, command) = self.log_in(place, server, &base)?;
        if survey.has_container {
            return Ok(Reached {
                survey,
                ssh_command: (command != self.default_command()).then(|| command.clone()),
                command,
                one_connection: false,
            });
        }
        let one_connection = self.check_server(place, &survey, &command)?;
        Ok(Reached {
            survey,
            ssh_command: (command != self.default_command()).then(|| command.clone()),
            command,
            one_connection,
        })
    }

    /// What a container without `ssh_command` of its own uses.
    fn default_command(&self) -> Words {
        let top = self.config.ssh_command.clone();
        top.unwrap_or_else(|| vec!["ssh".into()])
    }

    fn ssh_command(&self, place: &Place) -> Words {
        let mut containers = self.config.containers.iter();
        let own = containers.find(|one| place.configured && one.name == place.name);
        let own = own.and_then(|one| one.ssh_command.clone());
        let given = self.request.ssh_command.clone();
        // With the same command again, the container's own one is the given one with its key.
        let own = own.filter(|own| given.as_ref().is_none_or(|given| own.starts_with(given)));
        own.or(given).unwrap_or_else(|| self.default_command())
    }

    fn survey(&self, place: &Place, command: &Words) -> Result<Survey, NotReached> {
        survey(&place.target, &self.ssh_options(command.clone()))
    }

    /// Makes sure that the server's host key is known: ssh asks nobody in a timer.
    fn host_key(
        &mut self,
        place: &Place,
        server: &SshLocation,
        command: &Words,
    ) -> Result<(), Failure> {
        // Another program than ssh knows its hosts by itself, and so does ssh's configuration if it names a way
        // through another host: what is wrong then is reported by the login.
        let Some(known) = Known::look_up(&place.target, command).server else {
            return Ok(());
        };
        if !known.host_keys.is_empty() {
            return Ok(());
        }
        let by_hand = format!(
            "Log in once with `ssh {}`, and compare the key that it shows",
            login(server)
        );
        let Some(file) = known.known_hosts.as_ref().filter(|_| known.proxy.is_none()) else {
            return Err(
                Failure::usage(format!("the host key of {} is not known", server.host))
                    .because(
                        "sprat can't get it, because ssh uses a jump host, or keeps no \
                          known_hosts file"
                            .to_owned(),
                    )
                    .with_hint(format!("nothing was changed. {by_hand}")),
            );
        };
        if self.request.yes && self.request.host_key.is_none() {
            return Err(Failure::usage(format!("the host key of {} is not known", server.host)).with_hint(
                format!("nothing was changed. Give its fingerprint with --host-key SHA256:…. {by_hand}"),
            ));
        }
        let keys = host_key::scan(&known)?;
        let shown: Vec<String> = keys.iter().map(host_key::HostKey::shown).collect();
        let shown = shown.join(", ");
        let other = || {
            Failure::failed(format!("{} shows another host key", server.host))
                .because(format!("it shows {shown}"))
                .with_hint(
                    "nothing was changed. Get the fingerprint from the server's provider or its console. If \
                     the keys differ, somebody else may answer",
                )
        };
        let accepted = match &self.request.host_key {
            Some(given) => host_key::named(&keys, given).ok_or_else(other)?,
            None => {
                self.host.show(&format!(
                    "{} is not known yet. Compare its host key with what its provider or its admin says: {shown}",
                    server.host
                ));
                let prompt = "Is it right? (yes, no, or the fingerprint that it must have) [no] ";
                match self.host.ask(prompt)?.trim() {
                    "yes" => &keys[0],
                    "" | "no" => {
                        return Err(Failure::failed("the host key was not accepted")
                            .with_hint(format!("nothing was changed. {by_hand}")));
                    }
                    typed => host_key::named(&keys, typed).ok_or_else(other)?,
                }
            }
        };
        host_key::accept(accepted, &known.known_as, file)?;
        self.done(&format!(
            "host key: {} is in {}",
            accepted.shown(),
            file.display()
        ));
        Ok(())
    }

    /// Logs in as a timer does, with what root has; else with a key of sprat's own.
    fn log_in(
        &mut self,
        place: &Place,
        server: &SshLocation,
        base: &Words,
    ) -> Result<(Survey, Words), Failure> {
        let key = match &self.request.ssh_key {
            Some(key) => {
                keys::public_line(key)?;
                key.clone()
            }
            None => match self.survey(place, &keys::without_agent(base)) {
                Ok(survey) => return Ok((survey, base.clone())),
                Err(not) if !not.login_refused => return Err(explained(not, server)),
                Err(_) => keys::own_key(&self.machine.places.folder.clone().unwrap_or_default()),
            },
        };
        if key.symlink_metadata().is_err() {
            keys::make_key(&key, &format!("sprat@{}", self.machine.host))?;
            self.done(&format!("ssh key: made {}", key.display()));
        }
        let has_key = base.contains(&key.clone().into_os_string());
        let command = match has_key {
            true => base.clone(),
            false => keys::with_key(base, &key),
        };
        let refused = match self.survey(place, &command) {
            Ok(survey) if place.configured && !has_key && self.request.ssh_key.is_none() => {
                drop(survey);
                return Err(Failure::failed(format!("the login on {} needs a key that the config does not name", server.host))
                    .with_hint(format!(
                        "nothing in the config was changed. Add this to [container.{}]: ssh_command = {:?}",
                        place.name,
                        join_words(&command)
                    )));
            }
            Ok(survey) => return Ok((survey, command)),
            Err(not) if not.login_refused => not,
            Err(not) => return Err(explained(not, server)),
        };
        let line = keys::public_line(&key)?;
        if !self.request.yes {
            self.host.show(&format!(
                "{} does not accept the key {} yet. ssh asks once for the account's password now, to put the \
                 key there. Without a password, press Ctrl-C and {}",
                server.host,
                key.display(),
                keys::by_hand(server, &line)
            ));
            if keys::send_key(base, server, &key)
                && let Ok(survey) = self.survey(place, &command)
            {
                self.done("login: the server accepts the key now");
                return Ok((survey, command));
            }
        }
        let mut failure = refused.failure;
        failure.hint = Some(format!(
            "nothing was made on the server: {}",
            keys::by_hand(server, &line)
        ));
        Err(failure)
    }

    /// Whether the server can hold a container. Returns whether it lets only one connection in.
    fn check_server(
        &mut self,
        place: &Place,
        survey: &Survey,
        command: &Words,
    ) -> Result<bool, Failure> {
        if survey.read_only {
            return Err(
                Failure::failed("the server's file system is read-only").with_hint(
                    "nothing was made there. Choose another folder, or ask the server's admin",
                ),
            );
        }
        if !survey.durable && !self.request.allow_no_fsync {
            return Err(
                Failure::failed("the server can't make writes durable").with_hint(
                    "nothing was made there. An OpenSSH server can (fsync@openssh.com). With \
                 --allow-no-fsync sprat uses this server anyway. Then a crash of the server may \
                 destroy the container",
                ),
            );
        }
        match survey.available_bytes {
            Some(bytes) if bytes < LITTLE_BYTES => {
                let free = text::bytes(bytes);
                self.host
                    .warn(&format!("only {free} are free on the server"));
            }
            Some(bytes) => self
                .host
                .note(&format!("server: {} are free", text::bytes(bytes))),
            None => self.host.warn(
                "the server does not report its free space. Monitor it there: sprat can't warn \
                 before the disk is full",
            ),
        }
        if let Some(kept) = &survey.past_states {
            self.host.note(&format!("server: {kept}"));
        }
        match survey.second_connection(&place.target, &self.ssh_options(command.clone())) {
            Ok(None) => Ok(false),
            Ok(Some(folder)) => {
                self.host.note(&format!(
                    "server: it has snapshots of its own in {folder}. They keep older states of the container"
                ));
                Ok(false)
            }
            Err(why) => {
                self.host.note(&format!(
                    "server: it allows only one connection at a time ({why})"
                ));
                Ok(true)
            }
        }
    }
}

/// A missing folder is named with the command that makes it: sprat makes none on a server.
fn explained(not: NotReached, server: &SshLocation) -> Failure {
    if !not.no_folder {
        return not.failure;
    }
    let mut failure = not.failure;
    failure.exit = sprat_session::Exit::Failed;
    let port = server
        .port
        .map(|port| format!(" -P {port}"))
        .unwrap_or_default();
    failure.with_hint(format!(
        "nothing was made there. Make the folder: `echo 'mkdir {}' | sftp{port} {}`. Then run the same command \
         again",
        server.folder,
        login(server)
    ))
}
