//! The recovery sheet as text and as a page.

use std::path::Path;

use sprat_luks::Pins;
use sprat_run::recovery_sheet::{Sheet, SheetJob, page};
use sprat_session::address::Target;
use sprat_session::ssh_config::{Known, KnownServer, Proxy};

/// Some container's pins.
fn pins() -> Pins {
    Pins {
        cipher: "aes-xts-plain64".to_owned(),
        key_bits: 512,
        sector_bytes: 4096,
        payload_offset_bytes: 16 << 20,
        iv_tweak: 0,
        volume_key_digest: "00".repeat(32),
        uuid: "8a2ac4f5-8d45-4a0c-a1f3-3c3c7c4fca46".to_owned(),
        sequence_id: 3,
    }
}

#[test]
fn commands_of_the_sheet_are_quoted_for_the_shell() {
    let target = "ssh://u1@[2001:db8::1]:2222/srv/it's here/x y.luks";
    let target = Target::parse(target, Path::new("/")).unwrap();
    let known = Known::default();
    let sheet = Sheet {
        target: &target,
        known: &known,
        pins: &pins(),
        recovery_key: "aaaa-cccc",
        key_file: Some((Path::new("/etc/sprat/keys/x y.key"), "ff00")),
        jobs: &[SheetJob {
            name: "büro 2".to_owned(),
            sources: vec!["/home".to_owned()],
        }],
        made_at: "2026-11-23 13:21:01 UTC",
    };
    insta::assert_snapshot!(sheet.text(), @r##"
    ==============================================================================
    SPRAT RECOVERY SHEET                     SECRET: print it, keep it off this machine
    ==============================================================================
    Made           2026-11-23 13:21:01 UTC
    Container      ssh://u1@[2001:db8::1]:2222/srv/it's here/x y.luks
    Server         2001:db8::1
    Login          u1
    Port           2222
    Folder         /srv/it's here
    File           x y.luks
    UUID           8a2ac4f5-8d45-4a0c-a1f3-3c3c7c4fca46
    Fingerprint    893B-F403-70A0-DA3E-1442
    Header         aes-xts-plain64, 512-bit key, sectors of 4096 bytes, offset 16777216, IV tweak 0
    Key digest     0000000000000000000000000000000000000000000000000000000000000000
    Key file       /etc/sprat/keys/x y.key
      its SHA-256  ff00
    RECOVERY KEY   aaaa-cccc

    The key file and the recovery key each open the container. Without both, nobody can open it.
    The key file is on this machine only: copy it to a safe place, too.
    ssh's own key is on this machine only: copy it to a safe place, too, or let the
    server accept a new one.

    To restore everything without sprat, run these commands as root on any Linux
    machine with cryptsetup, sshfs and rsync, while no backup runs:

    1. Write the ssh configuration. Put ssh's key at the path of IdentityFile, or set another key that the server accepts
           printf '%s\n' \
             'Host sprat-server' \
             '  HostName 2001:db8::1' \
             '  User u1' \
             '  Port 2222' \
             > /root/sprat-ssh.conf

    2. Mount the server's folder
           mkdir -p /mnt/sprat-server /mnt/sprat-volume
           sshfs -F /root/sprat-ssh.conf "sprat-server:/srv/it's here" /mnt/sprat-server

    3. Check the container: UUID, cipher (aes-xts-plain64) and offset must be those above
           cryptsetup luksDump '/mnt/sprat-server/x y.luks'

    4. Open the container with the key file
           cryptsetup open --type luks2 --key-file '/etc/sprat/keys/x y.key' '/mnt/sprat-server/x y.luks' sprat-restore

    5. Or, without the key file, open it with the recovery key; type its dashes, too
           cryptsetup open --type luks2 '/mnt/sprat-server/x y.luks' sprat-restore

    6. Mount the snapshots and list them
           mount -o ro /dev/mapper/sprat-restore /mnt/sprat-volume
           ls -l /mnt/sprat-volume

    7. Copy everything to /restore, with owners, times and links
           mkdir -p /restore
           rsync -aHAXXS --numeric-ids '/mnt/sprat-volume/büro 2/latest/' /restore/

    8. Unmount and close everything
           umount /mnt/sprat-volume
           cryptsetup close sprat-restore
           fusermount3 -u /mnt/sprat-server

    If the account may only read: add --readonly to `cryptsetup open` and use
    `mount -o ro,noload`; if the file system is btrfs, `mount -o ro`.
    If `mount` does not know btrfs, use another Linux: RHEL and Rocky have none. The
    package btrfs-progs has the programs that check it.

    With sprat on a new machine, as root:

    1. Write the ssh configuration, as above in step 1. Then log in once with `sftp -F /root/sprat-ssh.conf sprat-server`, and compare the host key that it shows with the one above: sprat connects to no server with an unknown host key
           printf '%s\n' \
             'Host sprat-server' \
             '  HostName 2001:db8::1' \
             '  User u1' \
             '  Port 2222' \
             > /root/sprat-ssh.conf

    2. Create a key file for the new machine; sprat prompts for the recovery key
           sprat --ssh-command 'ssh -F /root/sprat-ssh.conf' --fingerprint 893B-F403-70A0-DA3E-1442 key add "sprat-server:/srv/it's here/x y.luks" --new-key-file /etc/sprat/keys/x-y.key

    3. Restore everything to /restore; `--to /` restores it to the original paths
           sprat --ssh-command 'ssh -F /root/sprat-ssh.conf' --fingerprint 893B-F403-70A0-DA3E-1442 --key-file /etc/sprat/keys/x-y.key restore "sprat-server:/srv/it's here/x y.luks" 'büro 2' --to /restore

    4. Continue the backups. This config has only the sources of each job. If you restored your own sprat.toml, copy all other settings from it
           printf '%s\n' \
             '[container."x-y"]' \
             "target = \"sprat-server:/srv/it's here/x y.luks\"" \
             'key_file = "/etc/sprat/keys/x-y.key"' \
             'ssh_command = "ssh -F /root/sprat-ssh.conf"' \
             '[job."büro 2"]' \
             'container = "x-y"' \
             'sources = ["/home"]' \
             > /etc/sprat/sprat.toml
           sprat backup

    If a command ends with exit code 11, the old machine was lost in the middle of a
    backup. If it is off for good, and not asleep, run this, and then the command again:
           sprat --ssh-command 'ssh -F /root/sprat-ssh.conf' --fingerprint 893B-F403-70A0-DA3E-1442 unlock "sprat-server:/srv/it's here/x y.luks" --that-machine-is-off
    ==============================================================================
    "##);
}

#[test]
fn sheet_needs_nothing_of_the_machines_ssh_configuration() {
    let target = Target::parse("nas:backup/x.luks", Path::new("/")).unwrap();
    let known = Known {
        server: Some(KnownServer {
            host: "nas.example".to_owned(),
            user: "u1".to_owned(),
            port: 2222,
            proxy: Some(Proxy::Jump(vec![
                KnownServer {
                    host: "gate.example".to_owned(),
                    host_keys: vec!["RSA SHA256:def".to_owned()],
                    ..KnownServer::default()
                },
                KnownServer {
                    host: "inner".to_owned(),
                    user: "u2".to_owned(),
                    port: 22,
                    ..KnownServer::default()
                },
            ])),
            host_keys: vec!["ED25519 SHA256:abc".to_owned()],
            identities: vec![sprat_session::ssh_config::Identity {
                path: "/root/my key".into(),
                fingerprint: Some("ED25519 SHA256:def".to_owned()),
            }],
            settings: vec![("ciphers".to_owned(), "a,b".to_owned())],
            ..KnownServer::default()
        }),
        unknown: vec!["What the moon does is not known.".to_owned()],
    };
    let sheet = Sheet {
        target: &target,
        known: &known,
        pins: &pins(),
        recovery_key: "aaaa-cccc",
        key_file: None,
        jobs: &[],
        made_at: "2026-11-23",
    };
    let fields = sheet.fields();
    let of_server: Vec<_> = fields[2..9]
        .iter()
        .map(|(name, value)| format!("{name}: {value}"))
        .collect();
    insta::assert_snapshot!(of_server.join("\n"), @r##"
    Server: nas.example (nas in this machine's ssh configuration)
    Login: u1
    Port: 2222
    ssh's key: /root/my key (ED25519 SHA256:def)
    Its host key: ED25519 SHA256:abc
    Reached by: ProxyJump=gate.example,u2@inner
    Jump host key: gate.example RSA SHA256:def
    "##);
    let config = sheet.known.server.as_ref().unwrap().ssh_config("s");
    insta::assert_snapshot!(config.join("\n"), @r#"
    Host s-hop-1
      HostName gate.example
    Host s-hop-2
      HostName inner
      User u2
      ProxyJump s-hop-1
    Host s
      HostName nas.example
      User u1
      Port 2222
      IdentityFile "/root/my key"
      ciphers a,b
      ProxyJump s-hop-2
    "#);
    insta::assert_snapshot!(
        sheet.steps()[1].commands[1],
        @"sshfs -F /root/sprat-ssh.conf sprat-server:backup /mnt/sprat-server"
    );
    assert!(sheet.text().contains("NOT ON THIS SHEET: What the moon"));
}

#[test]
fn a_page_holds_everything_and_runs_nothing() {
    let target = Target::parse("ssh://u1@host/srv/<b>x.luks", Path::new("/")).unwrap();
    let sheet = Sheet {
        target: &target,
        known: &Known::default(),
        pins: &pins(),
        recovery_key: "aaaa-cccc",
        key_file: None,
        jobs: &[SheetJob {
            name: "a<script>&".to_owned(),
            sources: Vec::new(),
        }],
        made_at: "2026-11-23",
    };
    let whole = page(&sheet, Some("aaaa-cccc")).unwrap();
    assert!(whole.contains("<code>aaaa-cccc</code>"));
    assert!(whole.contains("893B-F403-70A0-DA3E-1442"));
    assert!(whole.contains("a&lt;script&gt;&amp;") && !whole.contains("<script"));
    assert!(!whole.contains("<b>"));
    for fetched in ["src=", "href=", "url(", "@import"] {
        assert!(!whole.contains(fetched), "{fetched}");
    }
    let without = page(&sheet, None).unwrap();
    assert!(!without.contains("<svg") && !without.contains("aaaa-cccc"));
}

/// A job of a `command` has no sources. It is restored like the others, but a config with an empty list of
/// sources would be refused.
#[test]
fn config_on_the_sheet_has_no_job_without_sources() {
    let target = Target::parse("/mnt/usb/x.luks", Path::new("/")).unwrap();
    let job = |name: &str, sources: &[&str]| SheetJob {
        name: name.to_owned(),
        sources: sources.iter().map(ToString::to_string).collect(),
    };
    let sheet = Sheet {
        target: &target,
        known: &Known::default(),
        pins: &pins(),
        recovery_key: "aaaa-cccc",
        key_file: None,
        jobs: &[job("home", &["/home"]), job("dump", &[])],
        made_at: "2026-11-23",
    };
    let steps = sheet.steps_with_sprat();
    let config = &steps.last().unwrap().commands[0];
    assert!(config.contains("[job.\"home\"]"), "{config}");
    assert!(
        !config.contains("dump") && !config.contains("sources = []"),
        "{config}"
    );
    let restored = format!("{:?}", steps[steps.len() - 2].commands);
    assert!(restored.contains("dump"), "{restored}");
}
