# Runs a program on a terminal of its own, as a person would sit before it.
# usage: terminal.py '[["what it shows","what is typed then"], …]' PROGRAM ARGUMENT…
# In what is typed, {group 3} is the third group of the recovery key on the sheet that was shown.
# Typed as HANG UP, the terminal goes away, and only the exit code is known afterwards.
# Prints as JSON: its exit code, what the terminal showed, whether it echoed when each answer was
# typed, and whether it does so after the program's end.
import fcntl, json, os, pty, re, select, subprocess, sys, termios, time

dialogue = json.loads(sys.argv[1])
ours, theirs = pty.openpty()


def echoes():
    return bool(termios.tcgetattr(ours)[3] & termios.ECHO)


def filled(typed):
    key = re.search(rb"(?:[a-z0-9]{4}-){9}[a-z0-9]{4}", shown)
    group = lambda number: key[0].decode().split("-")[int(number[1]) - 1]
    return re.sub(r"\{group (\d+)\}", group, typed)


def begin():
    os.setsid()
    fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)


child = subprocess.Popen(
    sys.argv[2:], stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=begin
)
shown, seen, echoed = b"", 0, []
until = time.monotonic() + 120
while time.monotonic() < until:
    ended = child.poll() is not None
    if select.select([ours], [], [], 0.05)[0]:
        shown += os.read(ours, 65536)
    elif ended:
        break
    if dialogue:
        prompt, typed = dialogue[0]
        at = shown.find(prompt.encode(), seen)
        if at >= 0:
            seen = at + len(prompt)
            dialogue.pop(0)
            echoed.append(echoes())
            if typed == "HANG UP":
                os.close(ours)
                ours = None
                break
            os.write(ours, filled(typed).encode())
if ours is None:
    os.close(theirs)
    try:
        child.wait(timeout=30)
    except subprocess.TimeoutExpired:
        pass
if child.poll() is None:
    child.kill()
code = child.wait()
said = shown.decode("utf-8", "replace").replace("\r\n", "\n")
after = ours is None or echoes()
print(json.dumps({"code": code, "said": said, "echoed": echoed, "echoes_after": after}))
