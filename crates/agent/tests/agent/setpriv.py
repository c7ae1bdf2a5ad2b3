#!/usr/bin/env python3
# Stands in for setpriv of util-linux 2.40 where this machine's is older: the same options, and the kernel's Landlock.
# usage: setpriv.py --no-new-privs --landlock-access fs [--landlock-rule path-beneath:RIGHTS:PATH]… -- PROGRAM …
import ctypes, os, struct, sys

RIGHTS = (
    "execute,write-file,read-file,read-dir,remove-dir,remove-file,make-char,make-dir,make-reg,make-sock,make-fifo,"
    "make-block,make-sym,refer,truncate"
).split(",")
PR_SET_NO_NEW_PRIVS, CREATE_RULESET, ADD_RULE, RESTRICT_SELF, PATH_BENEATH = 38, 444, 445, 446, 1
libc = ctypes.CDLL(None, use_errno=True)


def call(function, *arguments):
    done = function(*arguments)
    if done < 0:
        sys.exit(f"setpriv: {os.strerror(ctypes.get_errno())}")
    return done


def bits(rights):
    return sum(1 << RIGHTS.index(right) for right in rights)


options, program = sys.argv[1:], sys.argv[sys.argv.index("--") + 1 :]
assert options[:3] == ["--no-new-privs", "--landlock-access", "fs"], options
every = struct.pack("=Q", bits(RIGHTS))
rules = call(libc.syscall, CREATE_RULESET, every, len(every), 0)
for option, rule in zip(options[3 : options.index("--") : 2], options[4 : options.index("--") : 2]):
    kind, rights, path = rule.split(":", 2)
    assert (option, kind) == ("--landlock-rule", "path-beneath"), (option, kind)
    at = os.open(path, os.O_PATH | os.O_CLOEXEC)
    call(libc.syscall, ADD_RULE, rules, PATH_BENEATH, struct.pack("=Qi", bits(rights.split(",")), at), 0)
call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
call(libc.syscall, RESTRICT_SELF, rules, 0)
os.close(rules)
os.execv(program[0], program)
