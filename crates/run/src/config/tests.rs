//! What is accepted, and each mistake with file, line, the likely word, and what it stops.

use std::fs;
use std::time::Duration;

use jiff::civil::Weekday;
use sprat_snapshot::KeepCount;
use tempfile::TempDir;

use super::*;
use crate::due::{AtTime, Schedule};
use crate::growth::GrowthLimit;
use crate::notify::channels::MailRoute;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
/// A config to which a test adds.
const BASE: &str = "\
[container.nas]
target = \"host:laptop.luks\"
[job.home]
container = \"nas\"
sources = \"/home\"
";

fn folder_with(files: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("conf.d")).unwrap();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

fn loaded(files: &[(&str, &str)]) -> Loaded {
    let folder = folder_with(files);
    let places = ConfigPlaces {
        home: Some(PathBuf::from("/home/me")),
        folder: Some(folder.path().to_owned()),
        root: false,
    };
    let mut loaded = load(&default_files(&places), &places);
    let all = loaded.mistakes.iter_mut().chain(&mut loaded.warnings);
    for mistake in all {
        mistake.file = mistake.file.strip_prefix(&folder).unwrap().to_owned();
        mistake.what = mistake
            .what
            .replace(&format!("{}/", folder.path().display()), "");
    }
    loaded
}

fn parsed(text: &str) -> Loaded {
    loaded(&[("sprat.toml", text)])
}

/// The config of a text that must be right.
fn right(text: &str) -> Config {
    let loaded = parsed(text);
    assert_eq!(shown(&loaded.mistakes), Vec::<String>::new(), "{text}");
    loaded.config
}

fn shown(mistakes: &[Mistake]) -> Vec<String> {
    mistakes.iter().map(ToString::to_string).collect()
}

/// `BASE` with `lines` in a table of their own kind.
fn with(place: &str, lines: &str) -> String {
    match place {
        "top" => format!("{lines}\n{BASE}"),
        "container" => BASE.replace("[job.home]", &format!("{lines}\n[job.home]")),
        "job" => format!("{BASE}{lines}\n"),
        _ => format!("{BASE}[{place}]\n{lines}\n"),
    }
}

#[test]
fn every_key_is_read() {
    let config = right(
        r#"
time_zone = "Europe/Berlin"
ssh_command = "ssh -F /root/c"
public_status = false
[container.nas]
target = "backup@nas.example:laptop.luks"
passphrase_command = "pass 'show' x"
connections = 8
upload_limit = [{ from = "08:00", to = "18:00", rate = "5 Mbit/s" }, { from = "22:00", to = "06:00", rate = "1 MiB/s" }]
min_free = "2 GB"
lock_wait = "0 s"
before = ["wakeonlan 00:11", { run = "sh -c 'a | b'", timeout = "1 h", user = "me" }]
finally = "true"
check_every = "never"
check_budget = "5 min"
drill_every = "2 weeks"
trim = "never"
hook_timeout = "90 s"
[container.usb]
target = "/media/usb/x.luks"
[job_defaults]
keep_daily = 14
exclude = ["a", "b"]
every = "2 h"
[job.home]
container = ["usb", "nas"]
sources = ["/home", "~/x"]
exclude = "c"
exclude_from = "/etc/ex"
exclude_caches = true
exclude_if_present = [".nobackup"]
exclude_larger_than = "4 GiB"
exclude_sample = ["home", "system"]
at = ["Mon-Fri 02:30", "Sat,Sun 12:00"]
spread = "12 h"
only_on_ac = true
skip_on_metered = false
only_if_interface = "wg0"
only_if_gateway_mac = "AA:bb:cc:dd:ee:ff"
window = "02:00-13:00"
keep_weekly = "all"
keep_within = "30 days"
prune_every = "0 s"
alert_after = "14 days"
growth = "stop"
growth_limit = "20 GiB"
change_limit = "off"
source_check_every = "30 days"
before = "systemctl stop app"
after = "systemctl start app"
failed = "false"
hook_timeout = "5 min"
healthchecks = "https://hc-ping.com/secret"
one_file_system = true
allow_empty = true
[job.www]
container = "nas"
sources = "/srv"
[notify]
on = ["failure", "overdue"]
desktop = true
mail = { to = ["root", "a@b.example"], smtp = "smtps://me@mail.example:465", password_file = "/etc/pw" }
command = "logger"
webhook = { file = "/etc/url" }
ntfy = "http://192.168.1.5/topic"
remind_after = "never"
digest = "daily"
digest_at = "07:15"
metrics = "/var/lib/x.prom"
[watch.other]
file = "/srv/other.luks"
alert_after = "3 days"
"#,
    );
    assert_eq!(config.time_zone, "Europe/Berlin");
    assert!(!config.public_status);
    let nas = &config.containers[0];
    assert_eq!((nas.connections, nas.min_free), (8, 2_000_000_000));
    assert_eq!(nas.lock_wait, Duration::ZERO);
    assert_eq!((nas.check_every, nas.drill_every), (None, Some(14 * DAY)));
    assert_eq!(nas.before[0].timeout, Duration::from_secs(90));
    assert_eq!(nas.before[1].words[2], "a | b");
    assert_eq!(nas.before[1].user.as_deref(), Some("me"));
    let limit = nas.upload_limit.as_ref().unwrap();
    let at = |hour, minute| limit.rates("UTC").at(jiff::civil::time(hour, minute, 0, 0));
    assert_eq!(at(8, 0), Some(625_000));
    assert_eq!(at(18, 0), None);
    assert_eq!(at(23, 0), Some(1 << 20));
    assert_eq!(at(5, 59), Some(1 << 20));
    assert_eq!(at(6, 0), None);
    let home = &config.jobs[0];
    assert_eq!(home.containers, ["usb", "nas"]);
    assert_eq!(
        home.filters.exclude,
        ["c"],
        "a job's list replaces that of the defaults"
    );
    let keep = home.keep.unwrap();
    assert_eq!(keep.daily, KeepCount::new(14));
    assert_eq!(keep.weekly, KeepCount::ALL);
    // A job's `at` replaces `every` of the defaults.
    let work = Weekday::Monday.cycle_forward().take(5);
    let Schedule::At(at) = &home.schedule else {
        panic!("{:?}", home.schedule)
    };
    let time = at.times[0].time();
    assert_eq!(at.times[0], AtTime::on(work, time));
    // Friday 02:30 to Saturday 12:00.
    assert_eq!(home.schedule.longest_gap(), Some(33 * HOUR + HOUR / 2));
    assert_eq!(home.alert_after, Some(14 * DAY));
    assert_eq!(home.growth.growth_limit, GrowthLimit::Bytes(20 << 30));
    assert_eq!(home.source_check_every, Some(30 * DAY));
    assert_eq!(home.conditions.gateway_macs, ["aa:bb:cc:dd:ee:ff"]);
    let www = &config.jobs[1];
    assert_eq!(www.schedule, Schedule::Every(2 * HOUR));
    assert_eq!(www.alert_after, Some(2 * 2 * HOUR + DAY));
    assert_eq!(www.filters.exclude, ["a", "b"]);
    assert_eq!(config.notify.digest, Digest::Daily);
    let MailRoute::Smtp { server, .. } = &config.notify.mail.as_ref().unwrap().route else {
        panic!("no server")
    };
    assert_eq!(
        (&*server.host, server.port, server.tls_first),
        ("mail.example", 465, true)
    );
    assert_eq!(config.watches[0].alert_after, 3 * DAY);
    let copies: Vec<String> = config
        .copies()
        .map(|copy| copy.name().to_string())
        .collect();
    assert_eq!(copies, ["home@nas", "www@nas", "home@usb"]);
}

#[test]
fn defaults_are_those_of_the_documentation() {
    let config = right(BASE);
    let (container, job) = (&config.containers[0], &config.jobs[0]);
    assert_eq!((container.connections, container.min_free), (4, 1 << 30));
    assert_eq!(container.lock_wait, Duration::from_secs(600));
    assert_eq!(container.check_every, Some(90 * DAY));
    assert_eq!(container.check_budget, HOUR / 2);
    assert_eq!(container.drill_every, Some(30 * DAY));
    assert!(container.trim);
    assert_eq!(job.schedule, Schedule::Every(DAY));
    assert_eq!(job.alert_after, Some(3 * DAY));
    assert_eq!((job.keep, job.prune_every), (None, DAY));
    assert!(job.conditions.skip_on_metered && !job.conditions.only_on_ac);
    let growth = GrowthRules {
        growth: Growth::Warn,
        growth_limit: GrowthLimit::Times(10),
        change_limit: Some(30),
    };
    assert_eq!(job.growth, growth);
    assert_eq!(job.source_check_every, Some(100 * DAY));
    assert_eq!(config.notify.digest, Digest::Never);
    assert_eq!(config.notify.remind_after, Some(7 * DAY));
    assert!(!config.notify.has_channel());
    // By hand only: never overdue.
    let config = right(&with("job", "every = \"never\"\nalert_after = \"3 days\""));
    assert_eq!(config.jobs[0].alert_after, None);
}

/// Place | lines (`\n`: the next one) | line of the mistake | the mistake.
const MISTAKES: &str = r#"
top | time_zon = 1 | 1 | unknown setting `time_zon` at the top of the file; did you mean "time_zone"?
top | time_zone = "Europe/Berln" | 1 | `time_zone`: there is no time zone "Europe/Berln"
top | public_status = 1 | 1 | `public_status` must be true or false
top | ssh_command = "ssh 'x" | 1 | `ssh_command`: a quote is not closed
top | ssh_command = 'a && b' | 1 | `ssh_command`: sprat runs it without a shell, so "&" has no meaning; quote it, or write sh -c '…'
top | ssh_command = 'a "$(b)" $(c)' | 1 | `ssh_command`: sprat runs it without a shell, so "$(" has no meaning; quote it, or write sh -c '…'
container | connections = 9 | 3 | `connections` must be a whole number from 1 to 8
container | connections = "4" | 3 | `connections` must be a whole number from 1 to 8
container | min_free = "5" | 3 | `min_free`: "5": a unit is missing, such as MiB or GiB
container | min_free = "5 GX" | 3 | `min_free`: "5 GX": the unit must be K, M, G, T or P, or KiB, kB and so on
container | lock_wait = "10m" | 3 | `lock_wait`: "10m": `m` could be minutes or months; did you mean "10 min"?
container | lock_wait = "1 month" | 3 | `lock_wait`: "1 month": months and years have no fixed length; write days or weeks
container | lock_wait = "ten" | 3 | `lock_wait`: "ten": write a whole number and a unit: s, min, h, days or weeks
container | lock_wait = 10 | 3 | `lock_wait` must be text in quotes, not integer
container | lock_wait = "99999 weeks" | 3 | `lock_wait`: "99999 weeks": it must be at most 36600 days
container | upload_limit = "20 Mbit" | 3 | `upload_limit`: "20 Mbit": write a rate like 20 Mbit/s (kbit/s, Mbit/s, Gbit/s) or 2 MiB/s
container | upload_limit = "1 kbit/s" | 3 | `upload_limit`: "1 kbit/s": it must be at least 1 kB/s
container | upload_limit = [{ from = "08:00", to = "18:00", rate = "1 MB/s" }, { from = "17:00", to = "09:00", rate = "1 MB/s" }] | 3 | `upload_limit`: the times from 08:00 and from 17:00 overlap
container | upload_limit = { from = "8:00", to = "18:00", rate = "1 MB/s" } | 3 | `upload_limit`: "8:00" is not a time of the day, 00:00 to 23:59
container | upload_limit = { form = "08:00", to = "18:00", rate = "1 MB/s" } | 3 | `upload_limit`: "form" is none of from, to, rate; did you mean "from"?
container | trim = "alway" | 3 | `trim`: "alway" is none of auto, never
container | drill_every = "1 h" | 3 | `drill_every`: "1 h": it must be at least 1 day
container | before = { runn = "x" } | 3 | `before`: "runn" is none of run, timeout, user; did you mean "run"?
container | before = ["true", { run = "x", timeout = "5m" }] | 3 | `before`: `timeout`: "5m": `m` could be minutes or months; did you mean "5 min"?
container | before = 'echo > x' | 3 | `before`: sprat runs it without a shell, so ">" has no meaning; quote it, or write sh -c '…'
job | container_ = 1 | 6 | unknown setting `container_` in [job.home]; did you mean "container"?
job | every = "10 min" | 6 | `every`: "10 min": it must be at least 15 min
job | every = "1 day"\nat = "02:30" | 7 | `at`: a job has either `at` or `every`
job | at = "2:30" | 6 | `at`: "2:30": write a time such as 02:30 or Mon-Fri 02:30
job | at = "Mo 02:30" | 6 | `at`: "Mo" is none of Mon, Tue, Wed, Thu, Fri, Sat, Sun; did you mean "Mon"?
job | at = [] | 6 | `at`: the list is empty
job | at = "02:30"\nwindow = "03:00-04:00" | 6 | `at`: 02:30 is outside of `window`
job | window = "03:00" | 6 | `window` must be like 22:00-06:00
job | window = "03:00-03:00" | 6 | `window`: it begins and ends at the same time
job | spread = "13 h" | 6 | `spread`: "13 h": it must be at most 12 h
job | alert_after = "1 day" | 6 | `alert_after`: it must be longer than 1 day, the time between two copies
job | at = "Mon 02:30"\nalert_after = "7 days" | 7 | `alert_after`: it must be longer than 7 days, the time between two copies
job | only_if_gateway_mac = "aa:bb" | 6 | `only_if_gateway_mac`: "aa:bb" is not a MAC address such as aa:bb:cc:dd:ee:ff
job | only_if_interface = "a b" | 6 | `only_if_interface`: "a b" is not the name of an interface
job | keep_daily = 10001 | 6 | `keep_daily` must be a whole number up to 10000, or "all"
job | keep_daily = "every" | 6 | `keep_daily` must be a whole number up to 10000, or "all"
job | keep_last = 0\nkeep_daily = 0 | 6 | `keep_last`: all rules are 0; to remove nothing, write keep_last = "all"
job | exclude_larger_than = "0 B" | 6 | `exclude_larger_than`: "0 B": it must be at least 1 B
job | growth_limit = "0 GiB" | 6 | `growth_limit`: "0 GiB": it must be at least 1 B
job | growth = "warm" | 6 | `growth`: "warm" is none of warn, stop, off; did you mean "warn"?
job | growth_limit = "x" | 6 | `growth_limit`: "x": write a size, or a factor such as 10x
job | change_limit = "101 %" | 6 | `change_limit`: "101 %": write 1 % to 100 %, or off
job | exclude_sample = "hom" | 6 | `exclude_sample`: "hom" is none of home, system; did you mean "home"?
job | exclude = "~/x" | 6 | `exclude`: "~/x": '~' is not expanded here, so it matches nothing; write the full path
job | exclude = "./x" | 6 | `exclude`: "./x": no file is named '.' or '..', so it matches nothing; omit that part
job | exclude_if_present = "a/b" | 6 | `exclude_if_present`: "a/b" is not the name of a file, without its folder
job | healthchecks = "http://hc-ping.com/x" | 6 | `healthchecks`: http:// is allowed only for this machine and for private addresses: write https://
job_defaults | container = "nas" | 7 | `container` belongs in each [job.NAME], not in [job_defaults]
job_defaults | keep_dayly = 3 | 7 | unknown setting `keep_dayly` in [job_defaults]; did you mean "keep_daily"?
job_defaults | window = "x" | 7 | `window` must be like 22:00-06:00
job.b | sources = "/x" | 6 | [job.b] has no `container`
job.b | container = "nas" | 6 | [job.b] has no `sources`
job.b | container = ["nas", "nas"]\nsources = "/x" | 7 | `container`: "nas" is named twice
job.b | container = "nass"\nsources = "/x" | 7 | there is no [container.nass]; did you mean "nas"?
job.b | container = []\nsources = "/x" | 7 | [job.b]: `container` is empty
job.b | container = "nas"\nsources = [] | 6 | [job.b]: `sources` is empty
job.b | container = "nas"\nsources = ["/x", "x"] | 8 | `sources`: "x" must begin with / or ~/
job.b | container = "nas"\nsources = "web:srv" | 8 | `sources`: "web:srv": the path on the host must begin with /
job.b | container = "nas"\nsources = "ssh://root@web:22/srv" | 8 | `sources`: "ssh://root@web:22/srv": write [user@]host:/path. Set a port in ssh's configuration
job.b | container = "nas"\nsources = "-x:/srv" | 8 | `sources`: "-x:/srv" must be a path or [user@]host:/path
job.b | container = "nas"\nsources = ["root@web:/srv", "web:/etc"] | 8 | `sources`: web is named with two users. Use one user, or one job for each
job.b | container = "nas"\nsources = "dump:/srv" | 8 | `sources`: @dump is the folder of what comes from no host. Give the host another name in ssh's configuration
container.b | target = "host:laptop.luks" | 6 | [container.b] has the target of [container.nas]
container.b |  | 6 | [container.b] has no `target`
container.b | target = "x.luks" | 7 | `target`: "x.luks" must be ssh://…, host:path or an absolute path
container.b | target = "/x.luks"\nkey_file = "/k"\npassphrase_file = "/p" | 6 | [container.b]: only one of key_file, passphrase_file, passphrase_command
notify | on = ["failure", "digest"] | 7 | `on`: "digest" has its own setting: `digest`
notify | on = "failures" | 7 | `on`: "failures" is none of failure, incomplete, missing, overdue, damage, growth, change, held, space, config, clock, recovered; did you mean "failure"?
notify | mail = "root" | 7 | `mail` must be like { to = "root@example.org" }
notify | mail = { to = "-x" } | 7 | `mail`: `to`: "-x" is not a mail address
notify | mail = { to = "a@b", smtp = "smtps://me:pw@host", password_file = "/p" } | 7 | `mail`: `smtp`: a password must not stand in the URL: use `password_file` or `password_command`
notify | mail = { to = "a@b", smtp = "host:25" } | 7 | `mail`: `smtp` must be like smtps://user@host or smtp://user@host:port
notify | mail = { to = "a@b", smtp = "smtp://me@host" } | 7 | `mail`: the user in `smtp` needs `password_file` or `password_command`
notify | webhook = "ftp://x" | 7 | `webhook`: it must begin with https://
notify | ntfy = { file = "x" } | 7 | `ntfy`: `file`: "x" must begin with / or ~/
notify | digest = "monthly" | 7 | `digest`: "monthly" is none of never, daily, weekly
notify | digest = "weekly"\ndigest_at = "08:00" | 8 | `digest_at`: a weekly digest needs one day and a time, such as Mon 08:00
notify | metrics = "/x.txt" | 7 | `metrics` must be a file that ends in .prom
watch.x | file = "/x" | 6 | [watch.x] has no `alert_after`
watch.x | file = "/x"\nalert_after = "never" | 8 | `alert_after`: "never": write a whole number and a unit: s, min, h, days or weeks
"#;

#[test]
fn each_mistake_is_reported_with_its_line_and_the_likely_word() {
    let mut wrong = Vec::new();
    for case in MISTAKES.lines().skip(1) {
        let mut fields = case.splitn(4, " | ");
        let [place, lines, line, what] = [(); 4].map(|()| fields.next().unwrap());
        let lines = lines.replace("\\n", "\n");
        let found = shown(&parsed(&with(place, &lines)).mistakes);
        let expected = format!("sprat.toml:{line}: {what}");
        if found != [expected.clone()] {
            wrong.push(format!(
                "{lines}\n  expected {expected}\n  found    {found:#?}"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_mistake_stops_only_what_it_concerns() {
    let both = "[container.a]\ntarget = \"/a.luks\"\n[container.b]\ntarget = \"/b.luks\"\n\
                [job.x]\ncontainer = [\"a\", \"b\"]\nsources = \"/x\"\n\
                [job.y]\ncontainer = \"a\"\nsources = \"/y\"\n";
    let all = ["x@a", "y@a", "x@b"];
    let cases: [(&str, String, Stops, &[&str]); 8] = [
        ("top", format!("zzz = 1\n{both}"), Stops::Nothing, &all),
        (
            "notify",
            format!("{both}[notify]\nzzz = 1\n"),
            Stops::Notices,
            &all,
        ),
        (
            "watch",
            format!("{both}[watch.w]\nfile = \"/f\"\nalert_after = \"1 day\"\nzzz = 1\n"),
            Stops::Nothing,
            &all,
        ),
        (
            "defaults",
            format!("{both}[job_defaults]\nevery = \"1m\"\n"),
            Stops::EveryJob,
            &[],
        ),
        (
            "job",
            both.replace("\"/y\"", "\"/y\"\nevery = \"1m\""),
            Stops::Job("y".to_owned()),
            &["x@a", "x@b"],
        ),
        (
            "container",
            both.replace("\"/b.luks\"", "\"/b.luks\"\nconnections = 0"),
            Stops::Container("b".to_owned()),
            &["x@a", "y@a"],
        ),
        // The keys meet in a job: only that one is stopped, wherever the keys stand.
        (
            "a job with a default",
            both.replace("\"/y\"", "\"/y\"\nevery = \"10 days\"")
                + "[job_defaults]\nalert_after = \"5 days\"\n",
            Stops::Job("y".to_owned()),
            &["x@a", "x@b"],
        ),
        // A zero in the defaults is one rule less for each job.
        (
            "a job whose rules are 0 together with those of the defaults",
            both.replace("\"/y\"", "\"/y\"\nkeep_last = 0")
                .replace("\"/x\"", "\"/x\"\nkeep_weekly = 4")
                + "[job_defaults]\nkeep_daily = 0\n",
            Stops::Job("y".to_owned()),
            &["x@a", "x@b"],
        ),
    ];
    for (case, text, stops, copies) in cases {
        let loaded = parsed(&text);
        let found: Vec<&Stops> = loaded.mistakes.iter().map(|one| &one.stops).collect();
        assert_eq!(found, [&stops], "{case}: {:?}", loaded.mistakes);
        let made: Vec<String> = loaded
            .config
            .copies()
            .map(|c| c.name().to_string())
            .collect();
        assert_eq!(made, copies, "{case}");
        let stopped: Vec<String> = loaded
            .config
            .stopped
            .iter()
            .map(ToString::to_string)
            .collect();
        let mut expected: Vec<&str> = ["x@a", "x@b", "y@a"]
            .into_iter()
            .filter(|copy| !copies.contains(copy))
            .collect();
        expected.sort_unstable();
        assert_eq!(stopped, expected, "{case}");
        let is_unknown = loaded.mistakes.iter().any(Mistake::concerns_notices);
        assert_eq!(is_unknown, case == "notify");
    }
}

#[test]
fn files_are_read_in_order_and_nothing_stands_in_two() {
    let parts = loaded(&[
        (
            "sprat.toml",
            "ssh_command = \"ssh\"\n[job.home]\ncontainer = \"b\"\nsources = \"/x\"\n",
        ),
        (
            "conf.d/B.toml",
            "[container.b]\ntarget = \"/b.luks\"\n[job.www]\ncontainer = [\"a\", \"b\"]\nsources = \"/w\"\n",
        ),
        ("conf.d/a.toml", "[container.a]\ntarget = \"/a.luks\"\n"),
        ("conf.d/.hidden.toml", "nonsense"),
        ("conf.d/a.toml~", "nonsense"),
    ]);
    assert_eq!(shown(&parts.mistakes), Vec::<String>::new());
    let copies: Vec<String> = parts
        .config
        .copies()
        .map(|c| c.name().to_string())
        .collect();
    assert_eq!(copies, ["home@b", "www@b", "www@a"]);

    let twice = loaded(&[
        (
            "sprat.toml",
            &format!("ssh_command = \"ssh\"\n{BASE}[notify]\ndesktop = true\n"),
        ),
        (
            "conf.d/a.toml",
            "ssh_command = \"ssh\"\n[job.home]\n[container.nas]\n[notify]\n[job_defaults]\n",
        ),
        ("conf.d/b.toml", "[job_defaults]\n"),
    ]);
    assert_eq!(
        shown(&twice.mistakes),
        [
            "conf.d/a.toml:1: `ssh_command` is also in sprat.toml:1",
            "conf.d/a.toml:2: [job.home] is also in sprat.toml:4",
            "conf.d/a.toml:3: [container.nas] is also in sprat.toml:2",
            "conf.d/a.toml:4: [notify] is also in sprat.toml:7",
            "conf.d/b.toml:1: [job_defaults] is also in conf.d/a.toml:5",
        ]
    );
    assert!(twice.mistakes.iter().any(Mistake::concerns_notices));
    assert!(twice.config.jobs.is_empty());
}

#[test]
fn a_file_that_is_not_toml_costs_only_what_stands_in_it() {
    let loaded = loaded(&[
        ("sprat.toml", BASE),
        ("conf.d/a.toml", "[job.www]\ncontainer = \"n\n"),
    ]);
    assert_eq!(
        shown(&loaded.mistakes),
        ["conf.d/a.toml:2: invalid basic string, expected `\"`"]
    );
    assert_eq!(loaded.mistakes[0].stops, Stops::File);
    assert_eq!(loaded.config.copies().count(), 1);
}

#[test]
fn a_name_that_one_file_has_twice_is_reported() {
    for (text, what) in [
        (
            "[job.home]\n[job.home]\n",
            "2: `home` is in this file twice",
        ),
        (
            "[container.nas]\n[container.nas]\n",
            "2: `nas` is in this file twice",
        ),
        (
            "[job.home]\nevery = \"1 h\"\nevery = \"2 h\"\n",
            "3: `every` is in this file twice",
        ),
    ] {
        let found = shown(&parsed(text).mistakes);
        assert_eq!(found, [format!("sprat.toml:{what}")]);
    }
}

#[test]
fn doubtful_settings_are_warnings_only() {
    let cases = [
        (
            "container",
            "insist_without_fsync = true",
            "`insist_without_fsync` is the old name of `allow_no_fsync`: write `allow_no_fsync`",
        ),
        (
            "job",
            "exclude = \"*.iso \"",
            "`exclude`: \"*.iso \" ends with a space, and the pattern matches only names with this space",
        ),
        (
            "job",
            "exclude = \"/srv/x\"",
            "`exclude`: \"/srv/x\" is outside of all sources",
        ),
        (
            "job",
            "file = \"x\"",
            "`file` has no effect without `command`",
        ),
        (
            "job",
            "window = \"23:55-00:09\"",
            "`window`: only 14 min of `window` follow 23:55. The timer calls sprat every 15 min, so it may \
             never begin a copy in that time",
        ),
        (
            "job",
            "at = \"02:50\"\nwindow = \"01:00-03:00\"",
            "`at`: only 10 min of `window` follow 02:50. The timer calls sprat every 15 min, so it may never \
             begin a copy in that time",
        ),
    ];
    for (place, lines, what) in cases {
        let loaded = parsed(&with(place, lines));
        assert_eq!(shown(&loaded.mistakes), Vec::<String>::new());
        let found: Vec<&str> = loaded.warnings.iter().map(|one| &*one.what).collect();
        assert!(found.contains(&what), "{lines}: {found:?}");
    }
    for pattern in ["/home/x", "/home", "/*/x", "*.iso", "x/"] {
        let loaded = parsed(&with("job", &format!("exclude = \"{pattern}\"")));
        assert_eq!(shown(&loaded.warnings), Vec::<String>::new());
    }
    for lines in [
        "window = \"23:50-00:05\"",
        "at = \"02:45\"\nwindow = \"02:00-03:00\"",
    ] {
        let loaded = parsed(&with("job", lines));
        assert_eq!(shown(&loaded.warnings), Vec::<String>::new(), "{lines}");
    }
    let config = parsed(&with("container", "insist_without_fsync = true")).config;
    assert!(config.containers[0].allow_no_fsync);
}

#[test]
fn secrets_are_neither_shown_nor_in_debug() {
    let text = with("job", "healthchecks = \"https://example.org/tttt\"");
    let config = right(
        &(text + "[notify]\nntfy = \"https://ntfy.sh/tttt\"\nwebhook = { file = \"/etc/url\" }\n"),
    );
    assert!(!format!("{config:?}").contains("tttt"));
    let ntfy = config.notify.settings.iter().find(|one| one.key == "ntfy");
    assert_eq!(ntfy.unwrap().value.as_str(), Some("***"));
    let url = config.notify.ntfy.unwrap().read(Duration::ZERO).unwrap();
    assert_eq!(*url, "https://ntfy.sh/tttt");
    let mistake = parsed(&with("notify", "ntfy = \"http://ntfy.sh/tttt\"")).mistakes;
    assert!(!format!("{mistake:?}").contains("tttt"));
}

#[test]
fn settings_name_the_origin_of_each_value() {
    let config = right(&with("job_defaults", "keep_daily = 14"));
    let of = |key: &str| {
        let settings = &config.jobs[0].settings;
        settings.iter().find(|one| one.key == key).unwrap().clone()
    };
    assert_eq!(of("keep_daily").origin.unwrap().line, 7);
    assert_eq!(of("sources").origin.unwrap().line, 5);
    assert_eq!(of("every").origin, None);
    assert_eq!(of("alert_after").value.as_str(), Some("3 days"));
}

#[test]
fn copies_are_named_by_job_and_container() {
    let config = right(
        "[container.a]\ntarget = \"/a.luks\"\n[container.b]\ntarget = \"/b.luks\"\n\
         [job.x]\ncontainer = [\"b\", \"a\"]\nsources = \"/x\"\n",
    );
    let names = |word: &str| -> Vec<String> {
        let copies = config.copies_of(word).unwrap();
        copies.iter().map(|copy| copy.name().to_string()).collect()
    };
    assert_eq!(names("x"), ["x@a", "x@b"]);
    assert_eq!(names("x@b"), ["x@b"]);
    let wrong = |word: &str| config.copies_of(word).unwrap_err();
    assert_eq!(wrong("x@bb").what, "job x does not back up to \"bb\"");
    assert_eq!(wrong("x@bb").hint.unwrap(), "did you mean x@b?");
    assert_eq!(wrong("y@a").what, "no job \"y\" in the config");
}
