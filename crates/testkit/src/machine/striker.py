# Stands in for ssh: passes bytes between sprat and a real sftp-server, or a real sh, and keeps a list
# of what sprat asks to be changed (SFTP requests that make, write, flush, rename, remove or copy;
# lines for the shell). At the one asked for it cuts every channel, or kills sprat with -9, before that
# request is passed on or when it has been.
# usage: striker.py FOLDER SFTP-SERVER cut|lose|kill|act|acts before|after [KIND:]NTH …
# FOLDER/changes: the kind of each, a line each. FOLDER/struck is there once the blow has fallen, or is
# about to. After `cut` there is no line any more; after `lose` a new one may be taken. `act` strikes at
# nobody: half a second later, when other channels have had their answers, FOLDER/../act is run, with
# sprat's pid in $SPRAT. `acts` does that at each such change from the NTH on. `leave` runs it, and then loses the
# line. With KIND `read`, reads are counted. The host `other` is never struck, and nothing of it counts.
import fcntl, os, signal, struct, subprocess, sys, threading, time

folder, server, how, when = sys.argv[1:5]
*of_kind, nth = sys.argv[5].split(":")
shell = sys.argv[-1].split()[0] == "sh"
spared = sys.argv[-2] == "other"
WRITE = 6
CHANGES = {WRITE: "write", 9: "setstat", 10: "setstat", 13: "remove", 18: "rename"}
EXTENDED = {b"fsync@": "fsync", b"posix-rename@": "rename", b"copy-data": "copy"}
OPEN, READ, CREAT, EXTENDED_REQUEST = 3, 5, 8, 200


def of_process(pid, what):
    with open(f"/proc/{pid}/{what}", "rb") as file:
        return file.read()


def parent(pid):
    return int(of_process(pid, "stat").rsplit(b")", 1)[1].split()[1])


def count(kind):
    with open(f"{folder}/changes", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{kind}\n")
        file.flush()
        file.seek(0)
        return sum(1 for line in file if not of_kind or line.strip() in of_kind)


def sprats():
    """Our ancestors that are sprat, nearest first: the volume process and the session."""
    pid = os.getppid()
    while pid > 1:
        try:
            if os.path.basename(os.readlink(f"/proc/{pid}/exe")) == "sprat":
                yield pid
            pid = parent(pid)
        except OSError:
            return


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def act():
    surroundings = {**os.environ, "SPRAT": str(next(sprats()))}
    script = ["sh", f"{folder}/../act"]
    subprocess.run(script, stdin=subprocess.DEVNULL, env=surroundings, check=True)


def strike():
    if how in ("act", "acts"):
        time.sleep(0.5)
        return act()
    if how == "leave":
        act()
    if how == "kill":
        for pid in list(sprats()):
            kill(pid)
    for line in open(f"{folder}/pids"):
        if int(line) != os.getpid():
            kill(int(line))
    child.kill()
    os._exit(1)


def change(body):
    """What a request changes, if anything."""
    if body[0] == READ:
        return "read" if "read" in of_kind else None
    if body[0] == OPEN:
        (length,) = struct.unpack(">I", body[5:9])
        (flags,) = struct.unpack(">I", body[9 + length : 13 + length])
        return "make" if flags & CREAT else None
    if body[0] == EXTENDED_REQUEST:
        name = body[9:40]
        return next((EXTENDED[key] for key in EXTENDED if name.startswith(key)), None)
    if body[0] == WRITE and b'"free":true' in body[:400]:
        return "free"
    return CHANGES.get(body[0])


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


def pass_on(data, kind):
    kind = None if spared else kind
    nth_now = count(kind) if kind else 0
    due = nth_now == int(nth) or (how == "acts" and nth_now > int(nth))
    due = due and kind and (not of_kind or kind in of_kind)
    if due:
        # Before the request may be carried out: the command can end at once when it has been.
        open(f"{folder}/struck", "w").close()
    if due and when == "before":
        strike()
    child.stdin.write(data)
    child.stdin.flush()
    if due and when == "after":
        # Carried out, as far as a moment shows; the answer may have arrived or not.
        time.sleep(0.02)
        strike()


if how == "cut" and os.path.exists(f"{folder}/struck") and not spared:
    sys.exit("the line is cut")
if not spared:
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
            pass_on(line, None if script else "punch")
            script = script and line != b"}\n"
            line = b""
while True:
    head = read(4)
    body = read(struct.unpack(">I", head)[0])
    pass_on(head + body, change(body))
