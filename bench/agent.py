#!/usr/bin/env python3
"""Measures sprat with sprat-agent on the server beside sprat with OpenSSH's sftp-server.

    agent.py --sprat PROGRAM --agent PROGRAM --out FOLDER [--work FOLDER] [--rtt-ms N] [--rounds N]
             [--parts backups,blocks,daily,begin,past,trim]

Both servers are measured in turn in each round; a ratio is the median of the rounds' own ratios. Started by
`make bench AGENT=1`. As root.
"""
import argparse
import os
import random
import re
import resource
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import measure
import trim
from loads import LOADS, Tree
from server import Line, Sshd, Wire
from tools import Sprat

PARTS = ("backups", "blocks", "daily", "begin", "past", "trim")
BLOCK = 4096
BLOCKS_OVERWRITTEN = 10_000
# The past states of which the oldest is read, and how much of the container each of them overwrites.
PAST_STATES = 60
PAST_SHARE = 0.01
PAST_READ = 255 << 10
# Every session begins a generation, as the first of a day does.
POLICY = "new = burst 1000, then 1 per 1s\nfree_min = 0%\nheader = free\n"


class Raw:
    """An SFTP client of one channel, for requests that sprat sends among many others."""

    def __init__(self, command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.next = 1
        self.process.stdin.write(struct.pack(">IBI", 5, 1, 3))
        self.process.stdin.flush()
        self.answer()

    def answer(self):
        length = struct.unpack(">I", self.process.stdout.read(4))[0]
        return self.process.stdout.read(length)

    def send(self, kind, *fields):
        body = b"".join(fields)
        self.process.stdin.write(struct.pack(">IBI", len(body) + 5, kind, self.next) + body)
        self.process.stdin.flush()
        self.next += 1

    def ask(self, kind, *fields):
        self.send(kind, *fields)
        answer = self.answer()
        if answer[0] == 101 and (status := struct.unpack(">I", answer[5:9])[0]):
            raise RuntimeError(f"request {kind}: status {status}")
        return answer[5:]

    def open(self, path, flags=3):
        answer = self.ask(3, text(path), struct.pack(">II", flags, 0))
        return answer[4:]

    def write(self, handle, offset, data):
        self.ask(6, text(handle), struct.pack(">Q", offset), text(data))

    def read_all(self, handle, length):
        for offset in range(0, length, PAST_READ):
            self.ask(5, text(handle), struct.pack(">QI", offset, min(PAST_READ, length - offset)))

    def punch(self, handle, ranges, owed_max=2):
        """As sprat does it: the next request is there when one is done. Returns the number of requests."""
        left, owed, requests = list(reversed(ranges)), [], 0
        while left or owed:
            while left and len(owed) < owed_max:
                part = next_request(left)
                packed = b"".join(struct.pack(">QQ", start, end - start) for start, end in part)
                self.send(200, text(b"punch@sprat"), text(handle), struct.pack(">I", len(part)), packed)
                owed.append(part)
                requests += 1
            answer = self.answer()
            if answer[0] == 101:
                raise RuntimeError(f"punch: status {struct.unpack('>I', answer[5:9])[0]}")
            done = struct.unpack(">Q", answer[5:])[0]
            left += [(max(start, done), end) for start, end in reversed(owed.pop(0)) if end > done]
        return requests

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def text(words):
    words = words.encode() if isinstance(words, str) else bytes(words)
    return struct.pack(">I", len(words)) + words


def next_request(left):
    """The ranges of one request, all of which the agent will do; taken from the end of `left`."""
    part, room = [], 64 << 20
    while left and room and len(part) < 8192:
        start, end = left.pop()
        cut = min(end, start + room)
        room -= cut - start
        part.append((start, cut))
        if cut < end:
            left.append((cut, end))
    return part


class Side:
    """One of the two servers, its line, and sprat with a container there."""

    def __init__(self, name, given, work, agent):
        self.name, self.work = name, work
        work.mkdir()
        self.sshd = Sshd(work / "sshd", agent, POLICY)
        self.wire = Wire(work / "wire", self.sshd, Line("", given.rtt_ms))
        self.given, self.containers = given, 0

    def new_sprat(self, container_bytes=10 << 30):
        """sprat with a new container; what there was is removed."""
        for old in self.sshd.srv.glob("*.luks*"):
            old.unlink()
        own = self.sshd.srv / ".sprat-agent"
        for old in own.glob("*.luks"):
            shutil.rmtree(old)
        self.containers += 1
        sprat = Sprat({"sprat": str(self.given.sprat)}, self.wire, self.work / f"home{self.containers}",
                      self.work / f"unused{self.containers}", container_bytes)
        sprat.target = f"ssh://bench-server{self.sshd.srv}/x.luks"
        sprat.prepare()
        return sprat

    @property
    def container(self):
        return self.sshd.srv / "x.luks"

    def saved_bytes(self):
        """What the logs take on the disk."""
        logs = self.sshd.srv / ".sprat-agent" / "x.luks" / "logs"
        return sum(log.stat().st_blocks * 512 for log in logs.glob("*"))

    def timed(self, sprat, words):
        measure.drop_caches()
        result, _ = measure.run([str(word) for word in words], sprat.environment, self.work / "log", self.wire)
        if result.error:
            raise RuntimeError(f"{self.name}: {result.error}")
        return result.wall_s

    def close(self):
        self.wire.close()
        self.sshd.close()


def in_turn(sides, rounds, what):
    """`what(side)` gives several seconds by name; returns them by name and side, a value a round."""
    found = {}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            for name, seconds in what(side).items():
                found.setdefault(name, {}).setdefault(side.name, []).append(seconds)
                print(f"  {name}, {side.name}: {seconds:.2f} s (load average {os.getloadavg()[0]:.1f})", flush=True)
    return found


def row(name, values, goal):
    plain, agent = values["sftp-server"], values["agent"]
    ratios = [ours / theirs for ours, theirs in zip(agent, plain)]
    shown = [", ".join(f"{one:.1f}" for one in side) for side in (plain, agent)]
    return f"| {name} | {shown[0]} | {shown[1]} | {statistics.median(ratios):.2f} | ≤ {goal} |"


def backups(sides, given, tree):
    def once(side):
        sprat = side.new_sprat()
        first = side.timed(sprat, sprat.backup(tree.root))
        time.sleep(1)
        unchanged = side.timed(sprat, sprat.backup(tree.root))
        return {"first backup": first, "unchanged": unchanged}

    found = in_turn(sides, given.rounds, once)
    return [row(f"first backup, {tree.bytes / 2**20:.0f} MiB", found["first backup"], 1.05), row("unchanged", found["unchanged"], 1.1)]


def blocks(sides, given):
    """A file of 128 MiB in the container; then 10,000 blocks of it are overwritten, in random order, in one session."""
    order = random.Random(7).sample(range(128 << 20 >> 12), BLOCKS_OVERWRITTEN)
    prepared = {}
    for side in sides:
        sprat = side.new_sprat(2 << 30)
        mounted = side.work / "mounted"
        mounted.mkdir()
        sprat.run(*sprat.words("mount", sprat.target, mounted, "--rw"))
        (mounted / "file").write_bytes(os.urandom(128 << 20))
        sprat.run(*sprat.words("umount", mounted))
        prepared[side.name] = sprat

    def once(side):
        sprat, mounted = prepared[side.name], side.work / "mounted"
        before = side.saved_bytes()
        sprat.run(*sprat.words("mount", sprat.target, mounted, "--rw"))
        data = os.urandom(BLOCK * 16)
        begun = time.monotonic()
        with (mounted / "file").open("r+b", buffering=0) as file:
            for number, block in enumerate(order):
                file.seek(block * BLOCK)
                file.write(data[number % 16 * BLOCK :][:BLOCK])
            os.fsync(file.fileno())
        took = time.monotonic() - begun
        sprat.run(*sprat.words("umount", mounted))
        if side.name == "agent":
            print(f"  saved: {(side.saved_bytes() - before) / 2**20:.1f} MiB", flush=True)
        return {"blocks": took}

    found = in_turn(sides, given.rounds, once)
    return [row("10,000 × 4 KiB in a mounted container, and `fsync`", found["blocks"], 1.3)]


def differing(before, after):
    """Blocks that had data before, and have other data now."""
    count = 0
    with before.open("rb") as old, after.open("rb") as new:
        while one := old.read(1 << 20):
            other = new.read(len(one))
            if one == other:
                continue
            for at in range(0, len(one), BLOCK):
                was = one[at : at + BLOCK]
                count += was != other[at : at + BLOCK] and any(was)
    return count


def daily(side, tree):
    sprat = side.new_sprat(2 << 30)
    side.timed(sprat, sprat.backup(tree.root))
    lines = []
    for day in (1, 2):
        tree.change()
        time.sleep(1)
        copy, logs = side.work / "copy", side.saved_bytes()
        subprocess.run(["cp", "--sparse=always", side.container, copy], check=True)
        side.timed(sprat, sprat.backup(tree.root))
        saved, changed = side.saved_bytes() - logs, differing(copy, side.container) * BLOCK
        copy.unlink()
        lines.append(f"Day {day}, 1 % of {tree.count} files changed: the log takes {saved / 2**20:.2f} MiB. Used blocks "
                     f"that have other content now: {changed / 2**20:.2f} MiB. That is {saved / max(changed, 1):.2f} times (goal: ≤ 1.1).")
        print(lines[-1], flush=True)
    return lines


def begin(side, given):
    """How long the first write of a session takes that begins a generation, without a line."""
    for old in side.sshd.srv.glob("*.luks*"):
        old.unlink()
    shutil.rmtree(side.sshd.srv / ".sprat-agent" / "x.luks", ignore_errors=True)
    ranges = 100_000
    with side.container.open("wb") as file:
        file.truncate(2 * ranges * BLOCK)
        for number in range(ranges):
            os.pwrite(file.fileno(), b"x" * BLOCK, 2 * number * BLOCK)
    os.sync()
    took = []
    for number in range(5):
        raw = Raw([given.agent, "serve", "--root", side.sshd.srv])
        handle = raw.open("x.luks")
        begun = time.monotonic()
        raw.ask(200, text(b"session-begin@sprat"), text("x.luks"), text("t"))
        raw.write(handle, number * 2 * BLOCK, b"y" * BLOCK)
        took.append(1000 * (time.monotonic() - begun))
        raw.close()
    generations = len(list((side.sshd.srv / ".sprat-agent" / "x.luks").glob("g.*")))
    side.container.unlink()
    shutil.rmtree(side.sshd.srv / ".sprat-agent" / "x.luks")
    line = (f"Begin of a generation of a container with {ranges} ranges, with the first write: "
            f"{', '.join(f'{one:.0f}' for one in took)} ms ({generations} generations; goal: ≤ 100 ms).")
    print(line, flush=True)
    return [line]


def past(side, given):
    """The oldest past state, read as a whole, compared with the container itself: with the agent only, and with sftp
    through the slow connection."""
    lines, length = [], 256 << 20
    for piece in (BLOCK, 64 << 10):
        wrote = random.Random(piece)
        with side.container.open("wb") as file:
            for _ in range(length >> 20):
                file.write(wrote.randbytes(1 << 20))
        for _ in range(PAST_STATES):
            raw = Raw([given.agent, "serve", "--root", side.sshd.srv])
            handle = raw.open("x.luks")
            raw.ask(200, text(b"session-begin@sprat"), text("x.luks"), text("t"))
            for number in wrote.sample(range(length // piece), int(length * PAST_SHARE) // piece):
                raw.write(handle, number * piece, wrote.randbytes(piece))
            raw.close()
        listed = subprocess.run([given.agent, "list", "--root", side.sshd.srv], capture_output=True, text=True, check=True).stdout
        states = re.findall(r"\d{4}-\d\d-\d\dT\S+", listed)
        took = {}
        names = ("x.luks", f".generations/x.luks/{states[0]}")
        for number in range(2 * given.rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                measure.drop_caches()
                spent, begun = children_seconds(), time.monotonic()
                raw = Raw([given.agent, "serve", "--root", side.sshd.srv])
                raw.read_all(raw.open(name, 1), length)
                raw.close()
                alone, processor = time.monotonic() - begun, children_seconds() - spent
                measure.drop_caches()
                begun = time.monotonic()
                subprocess.run(["sftp", "-q", "-F", side.wire.config, f"bench-server:{name}", side.work / "got"], check=True)
                took.setdefault(name, []).append((alone, processor, time.monotonic() - begun))
        live, oldest = ([statistics.median(values) for values in zip(*took[name])] for name in names)
        lines.append(f"The oldest of {len(states)} past states, each with 1 % of 256 MiB in pieces of {piece >> 10} KiB, beside the "
                     + "container: " + ", ".join(f"{what} {old:.2f} s beside {new:.2f} s ({old / new:.2f} times)" for what, old, new
                     in zip(("only the agent", "its processor time", "sftp through the connection"), oldest, live)) + " (goal: ≤ 2).")
        print(lines[-1], flush=True)
        side.container.unlink()
        shutil.rmtree(side.sshd.srv / ".sprat-agent" / "x.luks")
    return lines


def children_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def holes(given, work):
    """`sprat trim` of 10,000 pieces, by the shell and by the agent; and the requests for the same holes alone."""
    work.mkdir()
    lines, seconds, freed = [], {}, 0
    for name, agent in (("shell", None), ("agent", given.agent)):
        own = work / name
        own.mkdir()
        bench = trim.Bench(given, own, agent, POLICY)
        try:
            if agent:
                shutil.copytree(work / "shell-state", own, dirs_exist_ok=True)
            else:
                freed = bench.make(given.files)
                for kind in ("key", "state", "pristine"):
                    to, what = work / "shell-state" / kind, own / kind
                    to.parent.mkdir(exist_ok=True)
                    subprocess.run(["cp", "-a", "--sparse=always", what, to], check=True)
            took, given_back, said = bench.measure(name, [])
            if not agent:
                begun = float((bench.kept / "begun").read_text())
                part = (bench.kept / "answers").stat().st_mtime - begun
                told = (bench.kept / "told").read_text()
                ranges = [(int(start), int(start) + int(length)) for start, length in
                          (line.split() for line in told.splitlines() if line.replace(" ", "").isdigit() and " " in line)]
            else:
                log = sum(one.stat().st_blocks * 512 for one in (bench.store / ".sprat-agent" / "x.luks" / "logs").glob("*"))
                part, requests = punched(bench, ranges, given)
                lines.append(f"The agent saved {log / 2**20:.0f} MiB. The holes alone took {requests} requests.")
            seconds[name] = part
            lines.append(f"{name}: `sprat trim` {took:.1f} s, {100 * given_back / freed:.1f} % given back, "
                         f"{said['ranges']} ranges; for the holes alone, from login to last answer, {part:.2f} s.")
            print(lines[-1], flush=True)
        finally:
            bench.close()
    lines.append(f"The agent needs {seconds['agent'] / seconds['shell']:.2f} of the shell's time (goal: ≤ 0.2).")
    return lines


def punched(bench, ranges, given):
    """Seconds and requests for these holes, through the line."""
    bench.lay()
    shutil.rmtree(bench.store / ".sprat-agent" / "x.luks", ignore_errors=True)
    begun = time.monotonic()
    raw = Raw(["ssh", "-F", bench.wire.config, "-s", "bench-server", "sftp"])
    handle = raw.open("x.luks")
    raw.ask(200, text(b"session-begin@sprat"), text("x.luks"), text("t"))
    requests = raw.punch(handle, ranges)
    raw.ask(200, text(b"fsync@openssh.com"), text(handle))
    took = time.monotonic() - begun
    raw.close()
    return took, requests


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sprat", type=Path, required=True)
    parser.add_argument("--agent", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--rtt-ms", type=float, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=10_000, help="pieces of the trim")
    parser.add_argument("--scale", type=float, default=1.0, help="a share of every load; for trying the bench itself")
    parser.add_argument("--parts", default=",".join(PARTS))
    given = parser.parse_args()
    given.sprat, given.agent = given.sprat.resolve(), given.agent.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parts = given.parts.replace(",", " ").split()
    work = Path(tempfile.mkdtemp(prefix="sprat-bench-agent-", dir=given.work))
    sides, lines, table = [], [], []
    load = os.getloadavg()[0]
    try:
        sides = [Side("sftp-server", given, work / "plain", None), Side("agent", given, work / "agent", given.agent)]
        if "backups" in parts:
            table += backups(sides, given, Tree(work / "large", LOADS["large"], 1, given.scale))
        if "blocks" in parts:
            table += blocks(sides, given)
        if "daily" in parts:
            lines += daily(sides[1], Tree(work / "source", LOADS["source"], 1, given.scale))
        if "begin" in parts:
            lines += begin(sides[1], given)
        if "past" in parts:
            lines += past(sides[1], given)
        if "trim" in parts:
            lines += holes(given, work / "trim")
    finally:
        for side in sides:
            for mounted in (side.work / "mounted",):
                subprocess.run(["umount", "-l", mounted], stderr=subprocess.DEVNULL)
            side.close()
        shutil.rmtree(work, ignore_errors=True)
    head = ["| seconds, each round | sftp-server | agent | median ratio | goal |", "| --- | ---: | ---: | ---: | ---: |"]
    report = [f"{given.rtt_ms:.0f} ms round trip, load average {load:.1f} at the start:", ""]
    report += [*head, *table, ""] if table else []
    report = "\n".join(report + lines) + "\n"
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "agent.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
