#!/usr/bin/env python3
"""Measures commands on a container with many snapshots: `analyze`, `find`, the removal of half of them, and readers
beside a backup.

    history.py --sprat PROGRAM --out FOLDER [--work FOLDER] [--files N] [--snapshots N] [--rtt-ms N]

The load is *small*, with one percent changed before each backup. Both kinds of file system, and the sshfs stack whose
snapshots are removed with `rm -rf`. The snapshots are made without a delay, and the commands are measured with it.
Started by `make bench HISTORY=1`. As root.
"""
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

import measure
from loads import LOADS, Tree
from server import Line, Sshd, Wire
from tools import JOB, Sprat, SpratBtrfs, SshfsStack

CONTAINER_BYTES = 10 << 30


class Stack(SshfsStack):
    """The sshfs stack. Its snapshots are made on the server itself: only their removal is measured."""

    def make(self, tree, snapshots):
        mounted = self.home / "here"
        mounted.mkdir()
        self.run("mount", "-o", "loop", self.folder / "volume.img", mounted)
        try:
            older = None
            for number in range(snapshots):
                snapshot = mounted / f"2026-01-01T00-00-{number:02}Z"
                link = [] if older is None else [f"--link-dest={older}"]
                self.run("rsync", "-aHAXS", *link, f"{tree.root}/", f"{snapshot}/")
                older = snapshot
                tree.change()
        finally:
            self.run("umount", mounted)


def made(tool, tree, snapshots):
    """The tool's container, with that many snapshots."""
    tool.prepare()
    if isinstance(tool, Stack):
        tool.make(tree, snapshots)
        return
    for _ in range(snapshots):
        begun = time.monotonic()
        tool.run(*tool.backup(tree.root))
        tree.change()
        # Snapshot names are whole seconds.
        time.sleep(max(0, 1.01 - (time.monotonic() - begun)))


class Bench:
    def __init__(self, work, sshd, wire):
        self.work, self.sshd, self.wire, self.lines = work, sshd, wire, []

    def measure(self, tool, what, command):
        measure.drop_caches()
        words = [str(word) for word in command]
        result, _ = measure.run(words, tool.environment, self.work / f"{tool.name}.log", self.wire)
        row = result.error or (
            f"{result.wall_s:.2f} | {result.cpu_s:.2f} | {result.memory_bytes / 2**20:.0f} | "
            f"{result.up_bytes / 1e6:.1f} | {result.down_bytes / 1e6:.1f}"
        )
        self.add(tool, what, row)

    def add(self, tool, what, row):
        self.lines.append(f"| {tool.name} | {what} | {row} |")
        print(self.lines[-1], flush=True)

    def readers(self, tool):
        """A backup without readers, readers without a backup, and both at once. Seconds only."""
        shown = tool.words("ls", tool.target, f"{JOB}:{self.work}/tree/00")
        alone = self.large_backup(tool, "alone")
        before = [timed(lambda: tool.run(*shown)) for _ in range(10)]
        meanwhile = []

        def read():
            if len(meanwhile) < 10:
                meanwhile.append(timed(lambda: tool.run(*shown)))
            time.sleep(0.01)

        backup = self.large_backup(tool, "beside", read)
        self.add(tool, "a backup of 512 MiB", f"{alone:.2f} | | | |")
        self.add(tool, "`ls` ten times, median", f"{median(before):.2f} | | | |")
        self.add(tool, f"that backup, beside {len(meanwhile)} times `ls` in a row", f"{backup:.2f} | | | |")
        self.add(tool, "`ls` beside that backup, median", f"{median(meanwhile):.2f} | | | |")

    def large_backup(self, tool, name, meanwhile=lambda: time.sleep(0.01)):
        """Seconds that the first backup of large files takes; `meanwhile` runs again and again."""
        tree = Tree(self.work / name, LOADS["large"], name, 0.5)
        words = [str(word) for word in tool.words("backup", tool.target, "--name", name, tree.root)]
        measure.drop_caches()
        try:
            with (self.work / f"{tool.name}.log").open("ab") as log:
                begun = time.monotonic()
                backup = subprocess.Popen(
                    words, env=tool.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
                while backup.poll() is None:
                    meanwhile()
                took = time.monotonic() - begun
            if backup.returncode != 0:
                raise RuntimeError(f"{' '.join(words)}: exit {backup.returncode}")
            return took
        finally:
            tree.remove()


def timed(what):
    begun = time.monotonic()
    what()
    return time.monotonic() - begun


def main():
    parser = measure.parser(__doc__, files=20_000)
    parser.add_argument("--snapshots", type=int, default=50)
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="sprat-bench-history-", dir=given.work))
    programs = {"sprat": str(given.sprat.resolve()), "sshfs": shutil.which("sshfs")}
    sshd = Sshd(work / "sshd")
    quick, slow = Wire(work / "quick", sshd, Line("", 0)), Wire(work / "slow", sshd, Line("", given.rtt_ms))
    bench = Bench(work, sshd, slow)
    try:
        tools = []
        for kind in (Sprat, SpratBtrfs, Stack):
            tree = Tree(work / "tree", LOADS["small"], 1, given.files / 100_000)
            tool = kind(programs, quick, work / "home" / kind.name, sshd.srv / kind.name, CONTAINER_BYTES)
            made(tool, tree, given.snapshots)
            tree.remove()
            tool.wire, tool.ssh = slow, f"ssh -F {slow.config}"
            tools.append(tool)
            print(f"{kind.name}: {given.snapshots} snapshots of {given.files} files", flush=True)
        removed = given.snapshots // 2
        for tool in (tool for tool in tools if isinstance(tool, Sprat)):
            bench.measure(tool, "analyze, the first", tool.words("analyze", tool.target))
            bench.measure(tool, "analyze, again", tool.words("analyze", tool.target))
            bench.measure(tool, "find", tool.words("find", tool.target, "*000.dat"))
            bench.measure(tool, "find --offline", tool.words("find", "--offline", tool.target, "*000.dat"))
            bench.readers(tool)
        for tool in tools:
            rest = str(given.snapshots - removed)
            command = (
                tool.words("remove", str(removed)) if isinstance(tool, Stack)
                else tool.words("prune", "--job", JOB, "--keep-last", rest, tool.target)
            )
            bench.measure(tool, f"{removed} snapshots removed", command)
        text = "\n".join([
            f"{given.snapshots} snapshots of {given.files} files, {given.rtt_ms:.0f} ms round trip "
            f"(load average {os.getloadavg()[0]:.1f}):", "",
            "| tool | command | s | processor s | MiB memory | MB sent | MB received |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |", *bench.lines,
        ]) + "\n"
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "history.md").write_text(text)
    finally:
        for wire in (quick, slow):
            wire.close()
        sshd.close()
        for mounted in (work / "home").glob("*/here"):
            subprocess.run(["umount", "-l", mounted], stderr=subprocess.DEVNULL)
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
