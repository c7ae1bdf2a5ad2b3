#!/usr/bin/env python3
"""Measures `sprat trim` by each of its routes: what the server gets back, how long it takes, and how much of
that the server's own work is.

    trim.py --sprat PROGRAM --out FOLDER [--work FOLDER] [--files N] [--rtt-ms N]

A volume holds twice as many files of 64 KiB as shall become holes; every second one is deleted, so that what is
unused lies in that many pieces, and as much again in one. Every route begins with the same container. What the
shell is told is kept, and told once more to a shell on the server itself, without a line: the yardstick.
Started by `make bench TRIM=1`. As root.
"""
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import measure
from server import HOST, Line, Sshd, Wire

FILE_BYTES = 64 << 10
# Files of 1 MiB that are deleted, too: most of a real deletion is in large pieces.
LARGE_FILES = 512
ROUTES = (("local", []), ("shell", []), ("rewrite", ["--rewrite"]), ("through client", ["--rewrite", "--through-client"]))

# Stands in for ssh. Of a shell's session it keeps what is told to it, the lock that it looks for, when it began
# and, as the time of a file, when the last answer came: once that is there, all of this is killed.
RECORDER = """#!/bin/bash
for last; do :; done
[ "${last%% *}" = sh ] || exec ssh "$@"
date +%s.%N >{kept}/begun
exec 3<&0
{ until cp $(grep -l '"free":false' {store}/x.luks.lock.*) {kept}/ 2>/dev/null; do sleep 0.01; done; } &
tee {kept}/told <&3 | ssh "$@" | tee {kept}/answers
"""


class Bench:
    def __init__(self, given, work, agent=None, policy=""):
        self.sprat_program, self.work = given.sprat, work
        self.sshd = Sshd(work / "sshd", agent, policy)
        self.wire = Wire(work / "wire", self.sshd, Line("", given.rtt_ms))
        self.store, self.kept = self.sshd.srv, work / "kept"
        self.kept.mkdir()
        self.ssh = work / "ssh"
        recorder = RECORDER.replace("{store}", str(self.store)).replace("{kept}", str(self.kept))
        self.ssh.write_text(recorder)
        self.ssh.chmod(0o755)

    def sprat(self, *words):
        command = [
            self.sprat_program, "--json", "--key-file", self.work / "key", "--cheap-kdf-for-tests",
            "--ssh-command", f"{self.ssh} -F {self.wire.config}", *words,
        ]
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.work), "SPRAT_RESERVE_BYTES": "0"}
        for kind in ("STATE", "RUNTIME", "CACHE", "CONFIG"):
            environment[f"SPRAT_{kind}_DIR"] = str(self.work / kind.lower())
        words = [str(word) for word in command]
        done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: exit {done.returncode}: {done.stderr.strip()[-800:]}")
        return done.stdout

    def make(self, files):
        """A container with holes to be made in it, kept beside the store; returns the bytes that were deleted."""
        container, mounted = self.store / "x.luks", self.work / "mounted"
        mounted.mkdir()
        self.sprat("init", container, "--size", str((2 << 30) + (16 << 20)))
        self.sprat("mount", container, mounted, "--rw")
        noise = os.urandom(FILE_BYTES)
        for number in range(2 * files):
            (mounted / f"{number}").write_bytes(noise)
            if number % 2000 == 1999:
                os.sync()
        for number in range(LARGE_FILES):
            (mounted / f"large {number}").write_bytes(noise * 16)
        os.sync()
        for number in range(0, 2 * files, 2):
            (mounted / f"{number}").unlink()
        for number in range(LARGE_FILES):
            (mounted / f"large {number}").unlink()
        self.sprat("umount", mounted)
        container.rename(self.work / "pristine")
        return files * FILE_BYTES + (LARGE_FILES << 20)

    def lay(self):
        """The same container at the beginning of each measurement."""
        container = self.store / "x.luks"
        container.unlink(missing_ok=True)
        subprocess.run(["cp", "--sparse=always", self.work / "pristine", container], check=True)
        os.sync()
        return container

    def measure(self, route, options):
        container = self.lay()
        before = container.stat().st_blocks * 512
        target = container if route == "local" else f"ssh://{HOST}{container}"
        shutil.rmtree(self.work / "cache", ignore_errors=True)
        begun = time.monotonic()
        said = json.loads(self.sprat("trim", target, *options))["trim"]
        return time.monotonic() - begun, before - container.stat().st_blocks * 512, said

    def on_the_server(self):
        """Seconds that the same shell commands take on the server itself."""
        container = self.lay()
        for lock in self.kept.glob("x.luks.lock.*"):
            shutil.copy(lock, self.store)
        before = container.stat().st_blocks * 512
        told = (self.kept / "told").read_text()
        script = told[: re.search(r"^\d+ \d+$", told, re.MULTILINE).start()]
        begun = time.monotonic()
        # As over the line: a shell reads ahead, so what follows the script may come only once it runs.
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        shell = subprocess.Popen(["sh", "-s"], **pipes)
        shell.stdin.write(script)
        shell.stdin.flush()
        ready = shell.stdout.readline()
        said, complaints = shell.communicate(told[len(script):])
        took = time.monotonic() - begun
        for lock in self.store.glob("x.luks.lock.*"):
            lock.unlink()
        if shell.returncode != 0 or not ready.endswith(" ready\n") or " no " in said:
            raise RuntimeError(f"the shell said {ready}{said[-400:]} {complaints[-400:]}")
        return took, before - container.stat().st_blocks * 512

    def close(self):
        subprocess.run(["umount", "-l", self.work / "mounted"], stderr=subprocess.DEVNULL)
        self.wire.close()
        self.sshd.close()


def main():
    given = measure.parser(__doc__, files=10_000).parse_args()
    given.sprat = given.sprat.resolve()
    work = Path(tempfile.mkdtemp(prefix="sprat-bench-trim-", dir=given.work))
    bench = Bench(given, work)
    try:
        freed = bench.make(given.files)
        lines = [
            f"`sprat trim` of a volume of 2 GiB in which {freed / 2**20:.0f} MiB were deleted, {given.files} pieces of "
            f"64 KiB among them; {given.rtt_ms:.0f} ms round trip (load average {os.getloadavg()[0]:.1f}):", "",
            "| route | given back, `stat` on the server | ranges | command s |", "| --- | ---: | ---: | ---: |",
        ]
        for route, options in ROUTES:
            took, given_back, said = bench.measure(route, options)
            lines.append(f"| {route} | {100 * given_back / freed:.1f} % | {said['ranges']} | {took:.1f} |")
            print(lines[-1], flush=True)
            if route == "shell":
                begun = float((bench.kept / "begun").read_text())
                ended = (bench.kept / "answers").stat().st_mtime
        here, given_back = bench.on_the_server()
        limit = 1.3 * here + 20 * given.rtt_ms / 1000
        lines += ["", f"The shell's session, from its login to its last answer: {ended - begun:.2f} s. The same commands told to "
                  f"a shell on the server itself: {here:.2f} s ({100 * given_back / freed:.1f} % given back). "
                  f"1.3 times that and 20 round trips are {limit:.2f} s."]
        text = "\n".join(lines) + "\n"
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "trim.md").write_text(text)
        print(text)
    finally:
        bench.close()
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
