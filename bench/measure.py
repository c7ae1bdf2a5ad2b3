"""Runs one command and measures it: time, processor time, memory of all its processes, bytes on the wire."""
import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
PR_SET_PDEATHSIG = 1
SAMPLE_S = 0.1
# A command's helpers may outlive it by this long before they count as left behind.
TRAILING_S = 30
LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass
class Measured:
    """One run of one command."""

    wall_s: float = 0.0
    # User and system time of all its processes on the client; work of the kernel's own threads
    # (loop devices, write-back) belongs to nobody.
    cpu_s: float = 0.0
    # The highest sum of the proportional set sizes of all its processes, seen every 0.1 s.
    memory_bytes: int = 0
    up_bytes: int = 0
    down_bytes: int = 0
    connections: int = 0
    # As the tool itself tells.
    read_requests: int | None = None
    write_requests: int | None = None
    # The machine's load average (1 min) just before: above about 0.5 others were at work.
    load_before: float = 0.0
    error: str | None = None


def parser(description, files):
    """The options of a bench of sprat that has a server and a connection of its own."""
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    options.add_argument("--sprat", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--work", type=Path, default=Path("/var/tmp"))
    options.add_argument("--files", type=int, default=files)
    options.add_argument("--rtt-ms", type=float, default=50)
    return options


def drop_caches():
    """Empties the page cache: client, server and source tree begin cold, as after a day."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def descendants(pid):
    """Every process below `pid`, at this moment."""
    found, next_up = [], [pid]
    while next_up:
        parent = next_up.pop()
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                below = [int(child) for child in children.read_text().split()]
            except OSError:
                continue
            found += below
            next_up += below
    return found


def memory_now(pid):
    total = 0
    for below in descendants(pid):
        try:
            for line in Path(f"/proc/{below}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
                    break
        except OSError:
            pass  # it has ended
    return total


def launch(command, env, cwd, out, told):
    """In the forked child: runs the command, adopts what it leaves behind, tells how it went."""
    # Away from the terminal: an interrupt there reaches the bench alone, which then ends what runs.
    os.setsid()
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out[0], stderr=out[1]
    )
    # Its end, whatever adopted processes end before it.
    process.wait()
    wall_s, trailing_until = time.monotonic() - began, time.monotonic() + TRAILING_S
    left = 0
    while True:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if ended == 0:
            if time.monotonic() > trailing_until:
                left = len(descendants(os.getpid()))
                break
            time.sleep(0.01)
    times = os.times()
    cpu_s = times.children_user + times.children_system
    os.write(told, json.dumps({"status": process.returncode, "wall_s": wall_s, "cpu_s": cpu_s, "left": left}).encode())


def run(command, env, log, wire=None, cwd=None, limit_s=3600):
    """Runs `command`; returns what was measured, and its standard output. Never raises for its failure."""
    result = Measured(load_before=os.getloadavg()[0])
    before = wire.counts() if wire else None
    answer, told = os.pipe()
    out_path = log.with_suffix(".out")
    with out_path.open("wb") as out, log.open("ab") as errors:
        errors.write(f"\n# {' '.join(map(str, command))}\n".encode())
        errors.flush()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                launch(command, env, cwd, (out, errors), told)
                status = 0
            except BaseException as error:  # nothing of the parent's must run in the child
                print(error, file=sys.stderr)
            finally:
                os._exit(status)
    os.close(told)
    try:
        watch(child, result, limit_s)
    except BaseException:
        end_all(child)
        raise
    report = os.read(answer, 65536)
    os.close(answer)
    if report:
        report = json.loads(report)
        result.wall_s, result.cpu_s = report["wall_s"], report["cpu_s"]
        if report["status"] != 0:
            result.error = f"exit {report['status']}: {last_words(log)}"
        elif report["left"]:
            result.error = f"{report['left']} processes were left behind"
    elif not result.error:
        result.error = f"not run: {last_words(log)}"
    if wire:
        after = wire.counts()
        for name in ("up_bytes", "down_bytes", "connections"):
            setattr(result, name, after[name] - before[name])
    return result, out_path.read_text(errors="replace")


def watch(child, result, limit_s):
    """Samples the memory of what runs below the child until the child has ended."""
    until = time.monotonic() + limit_s
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        result.memory_bytes = max(result.memory_bytes, memory_now(child))
        if time.monotonic() > until:
            end_all(child)
            result.error = f"ended after {limit_s} s"
            return
        time.sleep(SAMPLE_S)


def end_all(child):
    """Asks what runs below the child to end, then ends it, and the child."""
    for number, patience_s in ((signal.SIGTERM, 10), (signal.SIGKILL, 2)):
        for pid in descendants(child):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
        until = time.monotonic() + patience_s
        while descendants(child) and time.monotonic() < until:
            time.sleep(0.1)
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def last_words(log):
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-400:]
