#!/usr/bin/env python3
"""Writes what restic and borg keep into the table of retention cases, by running both.

    retention.py [TABLE]

TABLE is crates/snapshot/tests/snapshot/retention.txt if none is given; a test compares its `sprat` words with the code.
Each case becomes a host in one restic repository and a prefix in one borg repository. Takes a few minutes.
Needs python3, `restic` and `borg`: see `bench/install`.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from zoneinfo import ZoneInfo

TABLE = Path(__file__).parent.parent / "crates/snapshot/tests/snapshot/retention.txt"
NOW = "2026-11-29 12:00"
LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d)([^:]*):(.*)")

# restic keeps the oldest snapshot of a rule that is not full since 0.16, as its manual says. It is added for an older one.
PERIODS = {"hourly": "%Y-%m-%d %H", "daily": "%Y-%m-%d", "weekly": "%G-%V", "monthly": "%Y-%m", "yearly": "%Y"}

# borg counts --keep-within from now: the case says when that is.
BORG = """
import datetime, sys
import borg.helpers.misc as misc
from borg.archiver import main
NOW = datetime.datetime.fromisoformat(sys.argv[1])
class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW.replace(tzinfo=tz)
misc.datetime = Clock
sys.argv = ["borg"] + sys.argv[2:]
main()
"""


def run(words, zone, **variables):
    done = subprocess.run(words, env={**os.environ, "TZ": zone, **variables}, input="x", text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr}")
    return done.stdout + done.stderr


def utc(text):
    return datetime.strptime(text, "%Y-%m-%d %H:%M").replace(tzinfo=timezone.utc)


def is_full(case, rule, count):
    zone = ZoneInfo(case.zone)
    periods = {utc(time).astimezone(zone).strftime(PERIODS[rule]) for time in case.times}
    return count != "all" and len(periods) >= int(count)


def restic_oldest(case):
    rules = [(rule, count) for rule, count in case.rules.items() if rule in PERIODS]
    return {case.times[0]} if not all(is_full(case, *rule) for rule in rules) else set()


class Case:
    def __init__(self, number, fields, times):
        self.name = f"case{number}"
        self.zone = fields["zone"]
        self.now = utc(fields.get("now", NOW))
        self.rules = dict(rule.split() for rule in fields["rules"].split(","))
        self.times = times


class Restic:
    def __init__(self, folder):
        self.words = ["restic", "--repo", str(folder / "restic"), "--no-cache", "--quiet"]
        run(["restic", "--repo", str(folder / "restic"), "init"], "UTC", RESTIC_PASSWORD="x")

    def run(self, zone, *words):
        return run(self.words + list(words), zone, RESTIC_PASSWORD="x")

    def kept(self, case):
        for time in case.times:
            local = utc(time).astimezone(ZoneInfo(case.zone))
            zone = case.zone
            # Of an hour that comes twice, a text can only name the first.
            if local.fold:
                zone = f"Etc/GMT{-int(local.utcoffset().total_seconds() // 3600):+}"
            self.run(zone, "backup", "--host", case.name, "--stdin", "--time", local.strftime("%Y-%m-%d %H:%M:%S"))
        words = []
        for rule, count in case.rules.items():
            if count == "all":
                count = "1000000"
            if count.endswith("w"):
                count = f"{7 * int(count[:-1])}d"
            words += [f"--keep-{rule}", count]
        printed = self.run(case.zone, "forget", "--host", case.name, "--group-by", "", "--dry-run", "--json", *words)
        kept = json.loads(printed.splitlines()[0])[0]["keep"] or []
        kept = {datetime.fromisoformat(one["time"]).astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M")
                for one in kept}
        return kept | restic_oldest(case)


class Borg:
    def __init__(self, folder):
        self.repository = str(folder / "borg")
        self.base = str(folder / "base")
        self.run("UTC", ["borg"], "init", "--encryption", "none", self.repository)

    def run(self, zone, borg, *words):
        return run(borg + list(words), zone, BORG_BASE_DIR=self.base)

    def kept(self, case):
        for time in case.times:
            stamp = utc(time).strftime("%Y-%m-%dT%H:%M:%S")
            archive = f"{self.repository}::{case.name}-{time.replace(' ', '_')}"
            self.run("UTC", ["borg"], "create", "--timestamp", stamp, archive, "-")
        words = []
        for rule, count in case.rules.items():
            words += [f"--keep-{rule}", "-1" if count == "all" else count]
        python = Path(shutil.which("borg")).read_text().split("\n")[0].removeprefix("#!").split()
        clock = [*python, "-c", BORG, case.now.strftime("%Y-%m-%dT%H:%M:%S")]
        printed = self.run(case.zone, clock, "prune", "--dry-run", "--list", "-P", f"{case.name}-", *words,
                        self.repository)
        kept = re.findall(r"Keeping archive.*?case\d+-(\S+)", printed)
        return {name.replace("_", " ") for name in kept}


def main():
    table = Path(sys.argv[1]) if len(sys.argv) > 1 else TABLE
    blocks = table.read_text().rstrip("\n").split("\n\n")
    with tempfile.TemporaryDirectory() as folder:
        tools = {"restic": Restic(Path(folder)), "borg": Borg(Path(folder))}
        for number, block in enumerate(blocks[1:], 1):
            lines = block.split("\n")
            found = [LINE.fullmatch(line) for line in lines]
            fields = dict(line.split(": ", 1) for line, match in zip(lines, found) if not match)
            case = Case(number, fields, [match[1] for match in found if match])
            kept = {name: tool.kept(case) for name, tool in tools.items()}
            for at, match in enumerate(found):
                if match:
                    words = ["sprat"] if "sprat" in match[3].split() else []
                    words += [name for name in tools if match[1] in kept[name]]
                    lines[at] = f"{match[1]}{match[2]}: {' '.join(words)}".rstrip()
            blocks[number] = "\n".join(lines)
    table.write_text("\n\n".join(blocks) + "\n")


if __name__ == "__main__":
    main()
