# Stands in for ssh: passes bytes between sprat and a real sftp-server, whose disk can't give some
# blocks back: a read that touches one of them gets an error, as a failing disk's does.
# usage: bad_disk.py BLOCKS SFTP-SERVER …
# BLOCKS: a file with lines `FROM LENGTH`, in bytes of any file that is read; it may change meanwhile.
# Where there is a file BLOCKS.lose the line is lost instead, for good.
# While there is a file BLOCKS.hold such reads wait instead, and BLOCKS.held is there once one does.
import os, struct, subprocess, sys, threading, time

blocks, server = sys.argv[1:3]
READ, STATUS, FAILURE = 5, 101, 4
if sys.argv[-1].split()[0] == "sh":
    sys.exit("no shell")
if os.path.exists(f"{blocks}.lost"):
    sys.exit(255)
child = subprocess.Popen([server], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
answering, passing = threading.Lock(), threading.Lock()


def whole(file, size):
    data = b""
    while len(data) < size:
        more = os.read(file.fileno(), size - len(data))
        if not more:
            os._exit(0)
        data += more
    return data


def packet(file):
    head = whole(file, 4)
    return head, whole(file, struct.unpack(">I", head)[0])


def answer(data):
    with answering:
        while data:
            data = data[os.write(1, data) :]


def answers():
    while True:
        answer(b"".join(packet(child.stdout)))


def touches_bad(body):
    (handle,) = struct.unpack(">I", body[5:9])
    offset, length = struct.unpack(">QI", body[9 + handle : 21 + handle])
    for line in open(blocks):
        start, size = map(int, line.split())
        if offset < start + size and start < offset + length:
            return True
    return False


def refuse(body):
    words = b"Failure"
    said = struct.pack(">B4sII", STATUS, body[1:5], FAILURE, len(words)) + words + bytes(4)
    answer(struct.pack(">I", len(said)) + said)


def lose():
    open(f"{blocks}.lost", "w").close()
    child.kill()
    os._exit(255)


def pass_on(data):
    with passing:
        child.stdin.write(data)
        child.stdin.flush()


def hold(data):
    open(f"{blocks}.held", "w").close()
    while os.path.exists(f"{blocks}.hold"):
        time.sleep(0.01)
    pass_on(data)


threading.Thread(target=answers, daemon=True).start()
while True:
    head, body = packet(sys.stdin.buffer)
    if os.path.exists(f"{blocks}.lost"):
        lose()
    if body[0] != READ or not touches_bad(body):
        pass_on(head + body)
    elif os.path.exists(f"{blocks}.hold"):
        threading.Thread(target=hold, args=[head + body], daemon=True).start()
    elif os.path.exists(f"{blocks}.lose"):
        lose()
    else:
        refuse(body)
