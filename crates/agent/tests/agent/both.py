# Stands in for ssh: each request of sprat goes to sprat-agent and to sftp-server, one after the other, each for a
# folder of its own. Their answers must be the same; sprat gets the agent's.
# usage: both.py AGENT AGENT-ROOT SFTP-SERVER OTHER-ROOT …
# OTHER-ROOT/../differences: a line for each answer that differs.
import os, struct, subprocess, sys

agent_program, root, server_program, other_root = sys.argv[1:5]
STATUS, HANDLE, DATA, ATTRS = 101, 102, 103, 105
OPEN, CLOSE, READ, WRITE, LSTAT, FSTAT, FSETSTAT, OPENDIR, READDIR = 3, 4, 5, 6, 7, 8, 10, 11, 12
BY_PATH = {OPEN, LSTAT, 9, OPENDIR, 13, 16, 17, 18}
BY_HANDLE = {CLOSE, READ, WRITE, FSTAT, FSETSTAT, READDIR}
EXTENDED = 200
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
agent = subprocess.Popen([agent_program, "serve", "--root", root], **pipes)
other = subprocess.Popen([server_program, "-d", other_root], **pipes)
handles = {}


def packet(pipe):
    head = pipe.read(4)
    return head + pipe.read(struct.unpack(">I", head)[0]) if len(head) == 4 else None


def ask(server, request):
    server.stdin.write(request)
    server.stdin.flush()
    return packet(server.stdout)


def text(data, at):
    end = at + 4 + struct.unpack(">I", data[at : at + 4])[0]
    return data[at + 4 : end], end


def packed(words):
    return struct.pack(">I", len(words)) + words


def there(path):
    path = path.decode()
    path = path[len(root) :] if (path + "/").startswith(root + "/") else path
    return os.path.join(other_root, path.lstrip("/")).encode()


def for_other(request):
    """The same request for the other server. None: it is the agent's own."""
    kind, at = request[4], 9
    body = request[4:at]
    if kind == EXTENDED:
        name, at = text(request, at)
        body += packed(name)
        if name.endswith(b"@sprat"):
            return None
        kind = {b"fsync@openssh.com": CLOSE, b"fstatvfs@openssh.com": CLOSE, b"limits@openssh.com": 0, b"posix-rename@openssh.com": 18}.get(name, LSTAT)
    if kind in BY_HANDLE:
        handle, at = text(request, at)
        body += packed(handles[handle])
    elif kind in BY_PATH:
        path, at = text(request, at)
        body += packed(there(path))
        if kind == 18:
            path, at = text(request, at)
            body += packed(there(path))
    return packed(body + request[at:])


def shape(answer):
    """What must be the same: statuses, data, lengths of files, and whether it is a folder."""
    kind = answer[4]
    if kind == STATUS:
        return kind, answer[9:13]
    if kind == ATTRS:
        flags, size = struct.unpack(">IQ", answer[9:21])
        mode = struct.unpack(">I", answer[29:33])[0] >> 12 if flags & 6 == 6 else None
        return kind, size if mode == 8 else None, mode
    return kind, answer[9:] if kind == DATA else None


while request := packet(sys.stdin.buffer):
    kind = request[4]
    answer = ask(agent, request)
    also = request if kind == 1 else for_other(request)
    if also and kind != 1:
        second = ask(other, also)
        if kind not in (READDIR,) and shape(answer) != shape(second):
            with open(os.path.join(other_root, "../differences"), "a") as file:
                file.write(f"{request[4:60]!r}: {answer[4:40]!r} and {second[4:40]!r}\n")
        if answer[4] == HANDLE == second[4]:
            handles[text(answer, 9)[0]] = text(second, 9)[0]
    elif also:
        ask(other, also)
    sys.stdout.buffer.write(answer)
    sys.stdout.buffer.flush()
for server in (agent, other):
    server.stdin.close()
    server.wait()
