#!/usr/bin/env python3
"""Prints a table of the round trips of each command, behind a slow connection that bench/trips.py stands in for.

    bench/trips_table.py SPRAT [RTT_MS]        as root; some minutes (100 ms)

The load is 41 small files in 5 folders, and a warm cache. Each command runs three times; the least counts, because
requests that do not depend on each other may be counted one after another on a busy machine. borg and restic are
measured beside sprat if they are installed.
"""
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from trips import totals

TRIPS = Path(__file__).resolve().parent / "trips.py"
ROUNDS = 3
COLUMNS = ("round trips", "requests", "fsyncs", "logins")


class Scene:
    """Folders of one run, and the source."""

    def __init__(self, folder, rtt_ms):
        self.folder, self.log = Path(folder), Path(folder) / "log"
        self.rtt_ms, self.turn = rtt_ms, 0
        dice = random.Random(1)
        for name in ("server", "etc"):
            (self.folder / name).mkdir()
        for number in range(41):
            file = self.folder / f"src/d{number % 5}/f{number}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(dice.randbytes(20_000))

    def change(self):
        """Changes one file."""
        self.turn += 1
        (self.folder / "src/d1/f1").write_text(f"{self.turn}\n")

    def run(self, command, env):
        """Runs a command behind the slow connection. Returns the counts, once its last answers are there."""
        self.log.unlink(missing_ok=True)
        env = {**os.environ, **env, "SPRAT_TRIPS": str(self.log), "SPRAT_TRIPS_RTT_MS": str(self.rtt_ms)}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            sys.exit(f"{command} ended with {done.returncode}:\n{done.stdout}")
        return totals(self.log)

    def least(self, command, env, before=lambda: None):
        """The least of some rounds."""
        found = []
        for _ in range(ROUNDS):
            before()
            found.append(self.run(command, env))
        return min(found, key=lambda counts: counts["chain"])


def sprat(scene, program):
    """Yields sprat's rows."""
    folder, etc = scene.folder, scene.folder / "etc"
    env = {f"SPRAT_{name}_DIR": str(folder / name.lower()) for name in ("STATE", "CACHE", "RUNTIME")}
    env["SPRAT_CONFIG_DIR"] = str(etc)
    config = etc / "sprat.toml"
    config.write_text(
        f'ssh_command = "{TRIPS}"\n[container.c]\ntarget = "ssh://slow{folder}/server/c.luks"\n'
        f'key_file = "{folder}/key"\n[job.j]\ncontainer = "c"\nsources = ["{folder}/src"]\n'
    )
    config.chmod(0o600)
    scene.run([program, "init", "c", "--size", "20G", "--cheap-kdf-for-tests"], env)
    for _ in range(2):
        scene.run([program, "backup", "j"], env)
    restored = folder / "back"
    restore = [program, "restore", "c", f"j/latest:{folder}/src/d2/f2", "--to", str(restored)]
    yield "`sprat snapshots`", scene.least([program, "snapshots", "c"], env)
    yield "`sprat restore` of one file", scene.least(restore, env, lambda: shutil.rmtree(restored, ignore_errors=True))
    yield "`sprat backup`, unchanged", scene.least([program, "backup", "j"], env)
    yield "`sprat backup`, one file changed", scene.least([program, "backup", "j"], env, scene.change)
    yield "`sprat check`", scene.least([program, "check", "c"], env)


def restic(scene):
    """Yields restic's rows, if it is installed."""
    program = shutil.which("restic")
    if not program:
        return
    folder = scene.folder
    env = {"RESTIC_PASSWORD": "x", "RESTIC_CACHE_DIR": str(folder / "restic-cache")}
    base = [program, "-r", f"sftp:slow:{folder}/server/restic", "-o", f"sftp.command={TRIPS}"]
    source = str(folder / "src")
    scene.run([*base, "init"], env)
    for _ in range(2):
        scene.run([*base, "backup", source], env)
    restore = [*base, "restore", "latest", "--target", str(folder / "restic-back"), "--include", f"{source}/d2/f2"]
    yield "`restic snapshots`", scene.least([*base, "snapshots"], env)
    yield "`restic restore` of one file", scene.least(restore, env)
    yield "`restic backup`, unchanged", scene.least([*base, "backup", source], env)
    yield "`restic backup`, one file changed", scene.least([*base, "backup", source], env, scene.change)


def borg(scene):
    """Yields borg's rows, if it is installed."""
    program = shutil.which("borg")
    if not program:
        return
    folder = scene.folder
    env = {"BORG_RSH": str(TRIPS), "BORG_PASSPHRASE": "x", "BORG_BASE_DIR": str(folder / "borg")}
    repository = f"ssh://slow{folder}/server/borg"
    create = [program, "create", f"{repository}::{{now:%s%f}}", str(folder / "src")]
    scene.run([program, "init", "-e", "repokey", repository], env)
    for _ in range(2):
        scene.run(create, env)
    restored = folder / "borg-back"
    restored.mkdir()
    name = subprocess.run(
        [program, "list", "--last", "1", "--short", str(folder / "server/borg")],
        env={**os.environ, **env, "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes"}, stdout=subprocess.PIPE, text=True, check=True,
    ).stdout.strip()
    file = str(folder / "src/d2/f2").lstrip("/")
    restore = ["sh", "-c", 'cd "$1" && exec borg extract "$2" "$3"', "sh", str(restored), f"{repository}::{name}", file]
    env["BORG_RELOCATED_REPO_ACCESS_IS_OK"] = "yes"
    yield "`borg list`", scene.least([program, "list", repository], env)
    yield "`borg extract` of one file", scene.least(restore, env)
    yield "`borg create`, unchanged", scene.least(create, env)
    yield "`borg create`, one file changed", scene.least(create, env, scene.change)


def main():
    program, rtt_ms = os.path.abspath(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 100
    print(f"| command | {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * len(COLUMNS)}")
    with tempfile.TemporaryDirectory(prefix="sprat-trips-", dir="/var/tmp") as folder:
        scene = Scene(folder, rtt_ms)
        for rows in (sprat(scene, program), restic(scene), borg(scene)):
            for name, counts in rows:
                messages = name.startswith("`borg")
                cells = [counts["chain"], "" if messages else counts["requests"], "" if messages else counts["fsyncs"],
                         counts["logins"]]
                print(f"| {name} | {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
