#!/usr/bin/env python3
"""Runs a static sprat-agent in a root folder that has nothing but this program, a folder for it and the id of the boot: no
C library, no other program, no /dev. So it depends on nothing of a distribution. A session writes, and the past state
reads as before. Only `adopt` runs outside: it says what the system has.
usage: python3 bench/agent_alone.py AGENT       (as root)"""

import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from agent import Raw, text

BLOCK = 4096


def main(agent):
    with tempfile.TemporaryDirectory(prefix="sprat-alone.") as folder:
        root = Path(folder)
        shutil.copy(agent, root / "sprat-agent")
        (root / "data").mkdir()
        boot_id = Path("/proc/sys/kernel/random/boot_id")
        place = root / boot_id.relative_to("/")
        place.parent.mkdir(parents=True)
        place.write_text(boot_id.read_text())
        before, after = os.urandom(8 * BLOCK), os.urandom(BLOCK)
        container = root / "data" / "x.luks"

        def command(*words):
            return ["chroot", root, "/sprat-agent", *words, "--root", "/data"]

        def run(*words):
            return subprocess.run(command(*words), check=True, capture_output=True, text=True).stdout

        subprocess.run([agent, "adopt", "--root", root / "data"], check=True, capture_output=True)
        policy = "new = burst 10, then 1 per 1s\nfree_min = 0%\nheader = free\n"
        (root / "data" / ".sprat-agent" / "policy").write_text(policy)
        container.write_bytes(before)
        client = Raw(command("serve"))
        client.write(client.open("x.luks"), BLOCK, after)
        client.close()
        assert container.read_bytes() == before[:BLOCK] + after + before[2 * BLOCK:], "the write"
        (state,) = (words[1] for line in run("list").splitlines() if (words := line.split()))
        run("export", "x.luks", state, "/data/exported")
        assert (root / "data" / "exported").read_bytes() == before, "the past state"
        client = Raw(command("serve"))
        handle = client.open(f".generations/x.luks/{state}", flags=1)
        answer = client.ask(5, text(handle), struct.pack(">QI", BLOCK, BLOCK))
        assert answer[4:] == before[BLOCK:2 * BLOCK], "a read of the past state"
        client.close()
        assert " 0 findings" in run("check", "--read-data")
        run("tidy")
        print("sprat-agent runs alone: a session, a past state, export, check and tidy")


main(sys.argv[1])
