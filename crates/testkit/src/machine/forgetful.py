# Stands in for ssh: an SFTP server that calls writes to one file done, and keeps none from the NTH on.
# All else, leases too, it does as it should. Where `lying` is asked for, it answers reads from what it
# threw away for as long as FOLDER/lies is there; else it shows what its disk has.
# With `renames` it keeps all writes, and gives the name NAME to no file, though it says so.
# usage: forgetful.py FOLDER SFTP-SERVER NAME NTH honest|lying|renames …
# FOLDER/writes: a line for each write of the file, over all channels. FOLDER/reads: the offset of each read. FOLDER/forgotten: offset and length
# of each that was thrown away; FOLDER/overlay holds their bytes.
import fcntl, os, struct, subprocess, sys, threading

folder, server, name, nth, how = sys.argv[1:6]
OPEN, CLOSE, READ, WRITE, RENAME = 3, 4, 5, 6, 18
STATUS, HANDLE, DATA, EXTENDED = 101, 102, 103, 200
child = subprocess.Popen([server], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
opening, handles, reading = set(), set(), {}
out = threading.Lock()
overlay = os.open(f"{folder}/overlay", os.O_RDWR | os.O_CREAT, 0o600)


def forgets(offset, data):
    """Whether this write is thrown away."""
    with open(f"{folder}/writes", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{offset} {len(data)}\n")
        file.flush()
        file.seek(0)
        if sum(1 for _ in file) < int(nth):
            return False
        os.pwrite(overlay, data, offset)
        with open(f"{folder}/forgotten", "a") as forgotten:
            forgotten.write(f"{offset} {len(data)}\n")
        return True


def patched(offset, data):
    """What a liar answers instead."""
    if how != "lying" or not os.path.exists(f"{folder}/lies"):
        return data
    data = bytearray(data)
    try:
        lines = open(f"{folder}/forgotten").readlines()
    except FileNotFoundError:
        return data
    for line in lines:
        begin, length = map(int, line.split())
        first, last = max(begin, offset), min(begin + length, offset + len(data))
        if first < last:
            data[first - offset : last - offset] = os.pread(overlay, last - first, first)
    return data


def new_name(body):
    """The name that a request gives to a file, if it does."""
    texts, rest = [], body[5:]
    while len(rest) >= 4:
        (length,) = struct.unpack(">I", rest[:4])
        texts.append(rest[4 : 4 + length])
        rest = rest[4 + length :]
    renames = body[0] == RENAME or texts[0] in (b"posix-rename@openssh.com", b"hardlink@openssh.com")
    return os.path.basename(texts[-1]).decode() if renames else None


def read(file, size):
    data = b""
    while len(data) < size:
        more = os.read(file, size - len(data))
        if not more:
            child.stdin.close()
            child.wait()
            os._exit(0)
        data += more
    return data


def packet(file):
    (length,) = struct.unpack(">I", read(file, 4))
    return read(file, length)


def answer(body):
    data = struct.pack(">I", len(body)) + body
    with out:
        while data:
            data = data[os.write(1, data) :]


def answers():
    while True:
        body = packet(child.stdout.fileno())
        request = body[1:5]
        if body[0] == HANDLE and request in opening:
            (length,) = struct.unpack(">I", body[5:9])
            handles.add(body[9 : 9 + length])
        if body[0] == DATA and request in reading:
            body = body[:9] + patched(reading[request], body[9:])
        opening.discard(request)
        reading.pop(request, None)
        answer(bytes(body))


threading.Thread(target=answers, daemon=True).start()
while True:
    body = packet(0)
    request = body[1:5]
    if body[0] in (OPEN, CLOSE, READ, WRITE):
        (length,) = struct.unpack(">I", body[5:9])
        named, rest = body[9 : 9 + length], body[9 + length :]
        if body[0] == OPEN and os.path.basename(named) == name.encode():
            opening.add(request)
        # The server gives the handle to the next file that is opened.
        if body[0] == CLOSE:
            handles.discard(named)
        if named in handles and body[0] == READ:
            reading[request] = struct.unpack(">Q", rest[:8])[0]
            with open(f"{folder}/reads", "a") as reads:
                reads.write(f"{reading[request]}\n")
        if named in handles and body[0] == WRITE:
            (offset,) = struct.unpack(">Q", rest[:8])
            if forgets(offset, rest[12:]):
                answer(struct.pack(">B4sI", STATUS, request, 0) + struct.pack(">I", 0) * 2)
                continue
    if how == "renames" and body[0] in (RENAME, EXTENDED) and new_name(body) == name:
        answer(struct.pack(">B4sI", STATUS, request, 0) + struct.pack(">I", 0) * 2)
        continue
    child.stdin.write(struct.pack(">I", len(body)) + body)
    child.stdin.flush()
