#!/usr/bin/env python3
"""Counts round trips: stands in for ssh, with an sftp-server behind a delay, and logs every request.

    SPRAT_TRIPS=LOG [SPRAT_TRIPS_RTT_MS=50] sprat --ssh-command bench/trips.py … ssh://any-host/abs/path/x.luks
    bench/trips.py LOG
    bench/trips.py --total LOG

The second form prints the log in order, and the totals: requests, fsyncs, logins, and the longest chain of requests
each of which was sent after the answer of the one before. A slow connection makes sprat wait for that chain. The third
form prints the totals as JSON. `bench/trips_table.py` makes a table of the commands.

ssh's arguments are ignored. A login is taken to be eight round trips (SPRAT_TRIPS_LOGIN). It is not part of the chain.
No ssh and no network take part, so the counts hardly depend on the machine's load; times do. If the arguments contain
`borg serve`, that runs instead of sftp-server, and a chain link is a message and the first bytes that can answer it.
"""
import json
import os
import queue
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

SFTP_SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/lib/ssh/sftp-server")
NAMES = {
    1: "INIT", 2: "VERSION", 3: "OPEN", 4: "CLOSE", 5: "READ", 6: "WRITE", 7: "LSTAT", 8: "FSTAT", 9: "SETSTAT",
    10: "FSETSTAT", 11: "OPENDIR", 12: "READDIR", 13: "REMOVE", 14: "MKDIR", 17: "STAT", 18: "RENAME",
    101: "STATUS", 102: "HANDLE", 103: "DATA", 104: "NAME", 105: "ATTRS", 200: "EXTENDED", 201: "EXTENDED_REPLY",
}
BY_PATH, BY_HANDLE = (3, 7, 9, 11, 13, 14, 17, 18), (4, 5, 6, 8, 10, 12)


def text_at(body, at):
    """A string of a packet, and where the next field begins."""
    (count,) = struct.unpack_from(">I", body, at)
    return body[at + 4 : at + 4 + count], at + 4 + count


class Log:
    """One line for each packet, from all channels: time, channel, and what it is."""

    def __init__(self, path):
        self.file, self.handles, self.asked = open(path, "a", buffering=1), {}, {}
        self.message_sent = None

    def say(self, *words):
        self.file.write(" ".join(str(word) for word in (f"{time.time():.4f}", os.getpid(), *words)) + "\n")

    def request(self, body):
        kind, what = body[0], ""
        if kind == 1:
            return self.say("> INIT")
        name, (number,) = NAMES.get(kind, kind), struct.unpack_from(">I", body, 1)
        if kind in BY_PATH:
            what = os.path.basename(text_at(body, 5)[0].decode(errors="replace"))
        elif kind in BY_HANDLE:
            handle, at = text_at(body, 5)
            what = self.handles.get(handle, handle.hex())
            if kind in (5, 6):
                what += " @%d+%d" % struct.unpack_from(">QI", body, at)
        elif kind == 200:
            extension, at = text_at(body, 5)
            name = extension.decode(errors="replace").split("@")[0]
            if name == "fsync":
                handle = text_at(body, at)[0]
                what = self.handles.get(handle, handle.hex())
        self.asked[number] = (name, what)
        self.say(">", name, what)

    def answer(self, body):
        if body[0] == 2:
            return self.say("< VERSION")
        name, what = self.asked.pop(struct.unpack_from(">I", body, 1)[0], ("?", ""))
        if body[0] == 102:
            self.handles[text_at(body, 5)[0]] = what
        self.say("<", name, what, NAMES.get(body[0], body[0]))

    def message(self):
        """Some bytes of a protocol that is not SFTP were sent."""
        if self.message_sent is None:
            self.message_sent = time.monotonic()
            self.say("> MESSAGE")

    def message_answer(self, rtt_s):
        """Some bytes of such a protocol arrived. Bytes that were under way before can't be the answer."""
        if self.message_sent is not None and time.monotonic() >= self.message_sent + rtt_s:
            self.message_sent = None
            self.say("< MESSAGE DATA")


def packets_of(source):
    """SFTP's packets: each with its length in front, and its body."""
    while len(head := source.read(4)) == 4:
        body = source.read(struct.unpack(">I", head)[0])
        yield head + body, body


def chunks_of(source):
    """Bytes as they come, for any other protocol."""
    while chunk := source.read1(1 << 16):
        yield chunk, chunk


def pump(source, to, delay_s, sent, arrived, ready, cut=packets_of):
    """Passes packets on, each after the delay."""
    packets = queue.Queue()

    def deliver():
        while True:
            due, packet = packets.get()
            time.sleep(max(0, due - time.monotonic()))
            try:
                if packet is None:
                    return to.close()
                packet, body = packet
                arrived(body)
                to.write(packet)
                to.flush()
            except OSError:
                pass

    delivering = threading.Thread(target=deliver)
    delivering.start()
    for packet, body in cut(source):
        sent(body)
        packets.put((max(ready, time.monotonic()) + delay_s, (packet, body)))
    packets.put((time.monotonic() + delay_s, None))
    delivering.join()


def stand_in(path, arguments):
    rtt_s = float(os.environ.get("SPRAT_TRIPS_RTT_MS", "50")) / 1000
    logged_in = time.monotonic() + rtt_s * float(os.environ.get("SPRAT_TRIPS_LOGIN", "8"))
    log, nothing = Log(path), lambda body: None
    if "serve" in arguments:
        program = [shutil.which("borg"), "serve"]
        sent, arrived, cut = lambda body: log.message(), lambda body: log.message_answer(rtt_s), chunks_of
    else:
        program = [next(program for program in SFTP_SERVERS if os.access(program, os.X_OK))]
        sent, arrived, cut = log.request, log.answer, packets_of
    server = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    up = (sys.stdin.buffer, server.stdin, rtt_s / 2, sent, nothing, logged_in, cut)
    threading.Thread(target=pump, args=up, daemon=True).start()
    pump(server.stdout, sys.stdout.buffer, rtt_s / 2, nothing, arrived, 0, cut)
    os._exit(0)


def totals(path, each=lambda line: None):
    """Counts what a log holds: requests, fsyncs, logins and the longest chain. `each` gets every line of it."""
    lines = sorted((line.split(" ", 2) for line in Path(path).read_text().splitlines()), key=lambda line: line[0])
    channels, depth, answered, requests, fsyncs = {}, {}, 0, 0, 0
    for at, channel, what in lines:
        number = channels.setdefault(channel, len(channels))
        way, name = what.split()[:2]
        key = (channel, what[2:].rsplit(" ", 1)[0] if way == "<" and name != "VERSION" else what[2:].strip())
        if name == "VERSION":
            key = (channel, "INIT")
        if way == ">":
            requests, fsyncs = requests + 1, fsyncs + (name == "fsync")
            depth.setdefault(key, []).append(answered + 1)
        elif depth.get(key):
            answered = max(answered, depth[key].pop(0))
        each(f"{float(at) - float(lines[0][0]):8.3f} {number} {answered:4} {what}")
    return {"chain": answered, "requests": requests, "fsyncs": fsyncs, "logins": len(channels)}


if __name__ == "__main__":
    if "SPRAT_TRIPS" in os.environ:
        stand_in(os.environ["SPRAT_TRIPS"], sys.argv[1:])
    elif sys.argv[1] == "--total":
        print(json.dumps(totals(sys.argv[2])))
    else:
        found = totals(sys.argv[1], print)
        print("{requests} requests, {fsyncs} fsyncs, {logins} logins, longest chain {chain}".format(**found))
