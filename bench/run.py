#!/usr/bin/env python3
"""Measures sprat beside other tools: same trees, same slow line, cold page caches, in one run.

Usually started by `make bench`. As root. Everything it makes lies in one folder below --work and is
removed at the end, the mounts and processes first.
"""
import argparse
import datetime
import filecmp
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import measure
import report
from loads import DEFAULT_LOADS, LOADS, ONE_FILE, Tree
from server import LINES, Sshd, Wire, stream_rate
from tools import DEFAULT_TOOLS, TOOLS, Tool, find_programs

ROOT = Path(__file__).resolve().parent.parent
# sprat's SFTP channels for data: so many plain streams are the line's yardstick.
SPRAT_STREAMS = 4
# As on the command line, and as in the tables.
MEASURES = {
    "first": "first", "unchanged": "unchanged", "no-cache": "unchanged, no cache", "changed": "1 % changed",
    "restore": "restore all", "restore-one": "restore one",
}


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def named(kind, known):
    def parse(text):
        names = text.replace(",", " ").split()
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no such {kind}: {name} (there are {', '.join(known)})")
        return names
    return parse


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sprat", type=Path, required=True, help="the release binary")
    parser.add_argument("--peers", type=Path, default=Path("/nonexistent"), help="where bench/install put other tools")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp"), help="folder on a real disk, some 10 GiB free")
    parser.add_argument("--lines", type=named("line", LINES), help=f"of {', '.join(LINES)}")
    parser.add_argument("--loads", type=named("load", LOADS), help=f"of {', '.join(LOADS)}")
    parser.add_argument("--tools", type=named("tool", TOOLS), help=f"of {', '.join(TOOLS)}")
    parser.add_argument("--measures", type=named("measure", MEASURES), help=f"of {', '.join(MEASURES)}; the first backup is always made")
    parser.add_argument("--quick", action="store_true", help="only the line of 50 ms and the source-like tree")
    parser.add_argument("--scale", type=float, default=1.0, help="a share of every load; for trying the bench itself")
    parser.add_argument("--seed", type=int, default=1, help="of the trees")
    parser.add_argument("--limit-s", type=int, default=1800, help="most that one measurement may take")
    parser.add_argument("--container-bytes", type=int, default=10 << 30, help="size of sprat's and sshfs' volume")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/benchmarks.md")
    given = parser.parse_args()
    given.lines = given.lines or (["50ms"] if given.quick else list(LINES))
    given.loads = given.loads or (["source"] if given.quick else list(DEFAULT_LOADS))
    given.tools = given.tools or list(DEFAULT_TOOLS)
    given.measures = given.measures or list(MEASURES)
    return given


class Round:
    """One load on one line with every tool: for each measure all tools, one after the other."""

    def __init__(self, given, work, tree, wire, tools, rows):
        self.given, self.work, self.tree, self.wire, self.tools, self.rows = given, work, tree, wire, tools, rows

    def measure(self, tool, name, command, check=None):
        """Measures one command of one tool from cold caches, and keeps the row."""
        measure.drop_caches()
        log = self.work / f"{self.wire.line.name}-{self.tree.load.name}-{tool.name}.log"
        result, output = measure.run(
            [str(word) for word in command], tool.environment, log, self.wire, limit_s=self.given.limit_s
        )
        result.read_requests, result.write_requests = tool.requests(output)
        if not result.error and check:
            result.error = check()
        self.rows.append(
            {"line": self.wire.line.name, "load": self.tree.load.name, "tool": tool.name, "measure": name, **asdict(result)}
        )
        what = f"FAILED: {result.error}" if result.error else (
            f"{result.wall_s:8.2f} s   sent {result.up_bytes / 1e6:8.1f} MB   received {result.down_bytes / 1e6:8.1f} MB"
            f"   memory {result.memory_bytes / (1 << 20):6.0f} MiB   processor {result.cpu_s:6.2f} s   load {result.load_before:.1f}"
        )
        say(f"  {name:20} {tool.name:12} {what}")

    def restore(self, tool, name, command_for, check):
        to = self.work / "restored"
        to.mkdir()
        try:
            self.measure(tool, name, command_for(to, self.tree.root), lambda: check(tool, to))
        finally:
            shutil.rmtree(to)

    def same_tree(self, tool, to):
        restored = tool.restored(to, self.tree.root)
        done = subprocess.run(
            ["diff", "-rq", "--no-dereference", self.tree.root, restored], capture_output=True, text=True
        )
        return None if done.returncode == 0 else f"restored wrong: {(done.stdout + done.stderr)[:300]}"

    def same_file(self, tool, to):
        restored = tool.restored_one(to, self.tree.root)
        if restored.is_file() and filecmp.cmp(self.tree.root / ONE_FILE, restored, shallow=False):
            return None
        return f"restored wrong: {restored}"

    def run(self):
        self.backups("first")
        if "unchanged" in self.given.measures:
            self.backups("unchanged")
        if "no-cache" in self.given.measures:
            self.backups("no-cache", [tool for tool in self.tools if tool.has_cache], Tool.forget_cache)
        if "changed" in self.given.measures:
            self.tree.change()
            self.backups("changed")
        if "restore" in self.given.measures:
            for tool in self.tools:
                self.restore(tool, MEASURES["restore"], tool.restore, self.same_tree)
        if "restore-one" in self.given.measures:
            for tool in self.tools:
                self.restore(tool, MEASURES["restore-one"], tool.restore_one, self.same_file)

    def backups(self, name, tools=None, prepare=None):
        for tool in self.tools if tools is None else tools:
            if prepare:
                prepare(tool)
            self.measure(tool, MEASURES[name], tool.backup(self.tree.root))
        # Snapshot names are whole seconds.
        time.sleep(1)


def set_up(given, programs, wire, sshd, work, rows):
    """Makes each tool's repository; a tool for which that fails is left out, with the reason."""
    tools = []
    for name in given.tools:
        tool = TOOLS[name](programs, wire, work / "home" / name, sshd.srv / name, given.container_bytes)
        try:
            tool.prepare()
            tools.append(tool)
        except (RuntimeError, OSError) as error:
            say(f"  {name}: set-up failed: {error}")
            rows.append({"line": wire.line.name, "tool": name, "measure": "set-up", "error": str(error)})
    return tools


def bench(given, programs, work, result):
    sshd = Sshd(work / "sshd")
    trees = {}
    try:
        for line_name in given.lines:
            line = LINES[line_name]
            wire = Wire(work / f"wire-{line.name}", sshd, line)
            try:
                for streams in sorted({1, SPRAT_STREAMS, 2 * SPRAT_STREAMS}):
                    rate = stream_rate(wire, streams)
                    result["yardstick"].append({"line": line.name, "streams": streams, "bytes_per_s": rate})
                    say(f"{line.name}: {streams} plain ssh streams move {rate / 1e6:.1f} MB/s")
                for load_name in given.loads:
                    if load_name not in trees:
                        say(f"making the load {load_name} …")
                        trees[load_name] = Tree(work / "trees" / load_name, LOADS[load_name], given.seed, given.scale)
                    tree = trees[load_name]
                    result["loads"][load_name] = {"files": tree.count, "bytes": tree.bytes}
                    say(f"{line.name}, {load_name}: {tree.count} files, {tree.bytes / 1e6:.0f} MB")
                    tools = set_up(given, programs, wire, sshd, work, result["rows"])
                    Round(given, work, tree, wire, tools, result["rows"]).run()
                    for folder in (work / "home", *sshd.srv.iterdir()):
                        shutil.rmtree(folder)
            finally:
                wire.close()
    finally:
        sshd.close()


def take_down_mounts(work):
    """Whatever a failed or interrupted tool left mounted below the work folder; deepest first."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    below = [line.split()[1] for line in lines if line.split()[1].startswith(f"{work}/")]
    for place in reversed(below):
        subprocess.run(["umount", "-l", place], check=False)


def machine():
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor, "cores": len(os.sched_getaffinity(0)), "memory_bytes": memory,
        "kernel": platform.release(), "python": platform.python_version(),
    }


def commit():
    """The last commit that changed sprat itself."""
    # The tree may belong to another user than root, which git then asks about.
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    crates = ["--", "crates", "Cargo.toml", "Cargo.lock"]
    last = subprocess.run([*git, "log", "-1", "--format=%h", *crates], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", *crates], capture_output=True, text=True).stdout.strip()
    return (last or "unknown") + (" with changes" if changed else "")


def main():
    given = parse_arguments()
    if os.geteuid() != 0:
        sys.exit("bench: run it as root: it mounts, and empties the page cache")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    programs = find_programs(given.sprat.resolve(), given.peers)
    for name in list(given.tools):
        if missing := TOOLS[name].missing(programs):
            say(f"leaving out {name}: {missing}")
            given.tools.remove(name)
    result = {
        "began": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": os.environ.get("BENCH_COMMAND") or " ".join(sys.argv), "commit": commit(), "machine": machine(),
        "quick": given.quick, "seed": given.seed, "scale": given.scale, "container_bytes": given.container_bytes,
        "sprat_streams": SPRAT_STREAMS,
        "versions": {name: TOOLS[name].version(programs) for name in given.tools},
        "loads": {}, "yardstick": [], "rows": [],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="sprat-bench-", dir=given.work))
    began = time.monotonic()
    try:
        bench(given, programs, work, result)
    finally:
        take_down_mounts(work)
        for log in work.glob("*.log"):
            shutil.copy(log, given.out)
        shutil.rmtree(work, ignore_errors=True)
        result["took_s"] = round(time.monotonic() - began)
        stem = result["began"][:19].replace(":", "-")
        (given.out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = report.markdown(result)
    (given.out / f"{stem}.md").write_text(text)
    print(text)
    say(f"bench: {given.out / stem}.json and .md, {result['took_s']} s")
    if given.write_docs:
        report.write_docs(ROOT / "docs" / "benchmarks.md", "quick" if given.quick else "full", text)
    if any(row.get("error") and row["tool"].startswith("sprat") for row in result["rows"]):
        sys.exit("bench: sprat failed somewhere")


if __name__ == "__main__":
    main()
