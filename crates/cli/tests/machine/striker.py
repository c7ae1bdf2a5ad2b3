# Stands in for ssh: passes bytes between sprat and a real sftp-server, or a real sh, and counts what
# sprat asks to be changed (SFTP requests that make, write, flush, rename, remove or copy; lines for
# the shell). At the one asked for it cuts every channel, or kills sprat with -9, before or after
# that request was passed on and carried out.
# usage: striker.py FOLDER SFTP-SERVER cut|kill before|after NTH …
import fcntl, os, signal, struct, subprocess, sys, threading, time

folder, server, how, when, nth = sys.argv[1:5] + [int(sys.argv[5])]
shell = sys.argv[-1].split()[0] == "sh"
# OPEN (when it may create), WRITE, SETSTAT, FSETSTAT, REMOVE, RENAME
CHANGES = {6, 9, 10, 13, 18}
EXTENDED = [b"fsync@openssh.com", b"posix-rename@openssh.com", b"copy-data"]


def of_process(pid, what):
    with open(f"/proc/{pid}/{what}", "rb") as file:
        return file.read()


def parent(pid):
    return int(of_process(pid, "stat").rsplit(b")", 1)[1].split()[1])


def count():
    with open(f"{folder}/count", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        now = int(file.read() or 0) + 1
        file.truncate(0)
        file.write(str(now))
        return now


def strike():
    open(f"{folder}/struck", "w").close()
    if how == "kill":
        volume = os.getppid()
        while b"volume-process" not in of_process(volume, "cmdline"):
            volume = parent(volume)
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


def is_change(body):
    if body[0] == 3:
        (length,) = struct.unpack(">I", body[5:9])
        (flags,) = struct.unpack(">I", body[9 + length : 13 + length])
        return flags & 8 != 0
    return body[0] in CHANGES or (
        body[0] == 200 and any(name in body[:40] for name in EXTENDED)
    )


def end():
    child.stdin.close()
    child.wait()
    os._exit(0)


def read(size):
    data = b""
    while len(data) < size:
        more = os.read(0, size - len(data))
        if not more:
            end()
        data += more
    return data


def pass_on(data, counted):
    due = counted and count() == nth
    if due and when == "before":
        strike()
    child.stdin.write(data)
    child.stdin.flush()
    if due:
        # Carried out, as far as a moment shows; the answer may have arrived or not.
        time.sleep(0.02)
        strike()


if os.path.exists(f"{folder}/struck"):
    sys.exit("the line is cut")
with open(f"{folder}/pids", "a") as pids:
    pids.write(f"{os.getpid()}\n")
child = subprocess.Popen(
    ["sh"] if shell else [server], stdin=subprocess.PIPE, stdout=subprocess.PIPE
)


def answers():
    while True:
        data = os.read(child.stdout.fileno(), 65536)
        if not data:
            os._exit(child.wait())
        while data:
            data = data[os.write(1, data) :]


threading.Thread(target=answers, daemon=True).start()
if shell:
    # The script ends with a brace of its own line; what follows are ranges.
    script = True
    line = b""
    while True:
        line += read(1)
        if line.endswith(b"\n"):
            pass_on(line, not script)
            script = script and line != b"}\n"
            line = b""
while True:
    head = read(4)
    body = read(struct.unpack(">I", head)[0])
    pass_on(head + body, is_change(body))
