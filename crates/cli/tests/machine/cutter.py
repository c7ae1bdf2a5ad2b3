# Stands in for ssh: passes bytes between sprat and a real sftp-server, counts what sprat writes
# (WRITE requests and fsyncs, over all channels), and at the one asked for cuts every channel or
# kills sprat with -9, before or after that request has been passed on and carried out.
# usage: cutter.py FOLDER SFTP-SERVER cut|kill before|after NTH …
import fcntl, os, signal, struct, subprocess, sys, threading, time

folder, server, how, when, nth = sys.argv[1:5] + [int(sys.argv[5])]


def name(pid, what):
    with open(f"/proc/{pid}/{what}", "rb") as file:
        return file.read()


def parent(pid):
    return int(name(pid, "stat").rsplit(b")", 1)[1].split()[1])


def volume_process():
    pid = os.getppid()
    while b"volume-process" not in name(pid, "cmdline"):
        pid = parent(pid)
    return pid


def count():
    with open(f"{folder}/count", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        now = int(file.read() or 0) + 1
        file.truncate(0)
        file.write(str(now))
        return now


def strike():
    with open(f"{folder}/struck", "w"):
        pass
    if how == "kill":
        volume = volume_process()
        session = parent(volume)
        for pid in (volume, session):
            os.kill(pid, signal.SIGKILL)
    for line in open(f"{folder}/pids"):
        if int(line) != os.getpid():
            try:
                os.kill(int(line), signal.SIGKILL)
            except ProcessLookupError:
                pass
    child.kill()
    os._exit(1)


def read(size):
    data = b""
    while len(data) < size:
        more = os.read(0, size - len(data))
        if not more:
            child.stdin.close()
            child.wait()
            os._exit(0)
        data += more
    return data


if os.path.exists(f"{folder}/struck"):
    sys.exit("the line is cut")
with open(f"{folder}/pids", "a") as pids:
    pids.write(f"{os.getpid()}\n")
child = subprocess.Popen([server], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def answers():
    while True:
        data = os.read(child.stdout.fileno(), 65536)
        if not data:
            os._exit(0)
        while data:
            data = data[os.write(1, data) :]


threading.Thread(target=answers, daemon=True).start()
while True:
    head = read(4)
    body = read(struct.unpack(">I", head)[0])
    writes = body[0] == 6 or (body[0] == 200 and b"fsync@openssh.com" in body[:40])
    due = writes and count() == nth
    if due and when == "before":
        strike()
    child.stdin.write(head + body)
    child.stdin.flush()
    if due:
        # Carried out, as far as a moment shows; the answer may have arrived or not.
        time.sleep(0.02)
        strike()
