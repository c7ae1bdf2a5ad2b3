#!/usr/bin/env python3
"""The lease (crates/store/src/lock.rs) as an executable specification: explicit states, standard library only.

    python3 lease_model.py [SECONDS] [CONFIG...] [--seed=N] [--without=RULE]  explores, then walks; prints the first violation's steps
    python3 lease_model.py mutate [SECONDS] [--rule=RULE...]                  takes each rule away: an invariant must break

It has more than the code has so far: the comparison of what arrived late (`late`, `watch`, `dig`) is a rule
here and not yet a program there.

One container on a server that has only exclusive creation, rename, removal, writes through handles and fsync. Every
request is carried out when the scheduler likes, in order per connection only, also after its sender died (a machine
that sleeps and a server process that hangs are a request that is carried out late). Machines lose their line, die
with or without their state folder, and are cloned with their memory; the server loses what was not synced, and may
show a listing of a moment ago. One tick of the clock stands for an hour and more.

Invariants: never two sessions whose next look both would pass; no write of an earlier lease arrives beside a later
session that does not watch for it; no opening is silent about a reported snapshot that was overwritten, and none is
gone; no removal of a lease that counts; nobody loses a lease to one who did not mean to take it; when all are dead, a
stranger gets in by way d, and a machine that kept its record finds its own lease. Assumption K: nothing arrives
DOOR ticks after it was sent. Not in it: the renewing thread and the counter of a cloned disk.

It is a search, no proof: let it run with new seeds. Residual by design: what one twin wrote under
its last look before it ended without a word (`telling` in `opened`), and what arrives after assumption K.
"""
import json
import random
import sys
import time
from collections import deque

INF = 99  # a door that nobody has closed yet
DOOR = 2  # ticks after which the server's kernel has dropped a silent connection (assumption K)
KEEP = 1  # ticks for which a lease stays behind its successor; more than a listing can be stale
NONE = frozenset()

# Rule -> the configuration that shows it, and what is done where it is taken away (an invariant must break then).
RULES = {
    "chain": ("race", "release removes the lease; numbers begin at 1 again"),
    "second": ("race", "no second look"),
    "keep": ("stale", "the predecessor is removed as soon as the lease is held"),
    "known-free": ("guess", "N+1 is made on the guess that N has ended, not on the knowledge"),
    "take": ("kill", "unlock removes the old lease instead of making the next one"),
    "inherit": ("two unlocks", "who takes over from an unlock that waits does not wait for what that one waited for"),
    "relook": ("two unlocks", "no look between the end of the waiting and the first write"),
    "drained": ("answer", "'free' is written while requests are unanswered"),
    "doors": ("word", "'free' drops the doors: only the first session after a takeover is watched"),
    "watch": ("word", "ways d and e count as proof"),
    "watch-own": ("own", "the quiet time after a dead session of this machine counts as proof"),
    "until": ("early", "the watch ends with the next opening, however soon it is"),
    "marks": ("word", "only the machine that is to compare knows that it is to"),
    "late": ("twin", "the loser leaves no list of what may arrive late"),
    "since-look": ("twin", "the loser lists what is unanswered, not all since its last good look"),
    "counter": ("twin", "a look does not compare the renewal counter with what was written last"),
    "again": ("twin", "a reconnect goes on with its number instead of making the next one"),
    "other twin": ("twin", "a copy that loses by the counter writes 'free' into the lease that its twin holds"),
    "final": ("twin", "success is reported by a look before 'free' is written, not by one behind it"),
    "empty": ("race", "an empty lease is stepped over without reading it again once N+2 is there"),
    "sync": ("power", "a lease is not synced before it counts"),
    "record": ("power", "the local record forgets a lease when 'free' was answered, not when it is known to last"),
}


class Violation(Exception):
    pass


class World:
    """Server, line and machines. Everything in it is hashable or a dict of hashables."""

    def __init__(self, config, without=()):
        self.cfg = config
        self.off = frozenset(without)
        self.clock = 0
        self.dir, self.ino = {}, {}  # number -> inode; inode -> (content or None, mtime)
        self.ddir, self.dino = {}, {}  # the same, as it survives a crash of the server
        self.hist = ()  # listings that were true in this tick: a stale one may be shown
        self.blocks = {}  # block -> who wrote it last
        self.vol = ()  # the volume's snapshots: (block, who made it), one block each
        self.fin = NONE  # those that were reported as finished
        self.late = NONE  # lists on the server: (block, bytes that may come late)
        self.told = NONE  # damage that some opening has told
        self.cloned = NONE  # tokens that two processes have
        self.high = ()  # (token, counter) under which something was sent last
        self.chain = ()  # who made which number last
        self.adm = ()  # sessions that were let write: (number, session, doors)
        self.forgot = NONE  # sessions whose machine lost its state folder
        self.zomb = ()  # requests of the gone, in order per connection, that may be carried out yet
        self.ses = {}  # session -> its state (a dict)
        self.ms = tuple((NONE, NONE, (0, False)) for _ in range(config["machines"]))
        #            takings of the local record, digests kept, (last number seen, was it free)
        self.next = 1
        self.left = tuple(sorted(config["budget"].items()))
        self.trace = ()

    def copy(self):
        w = World.__new__(World)
        w.__dict__.update(self.__dict__)
        for name in ("dir", "ino", "ddir", "dino", "blocks"):
            setattr(w, name, dict(getattr(self, name)))
        w.ses = {sid: dict(s) for sid, s in self.ses.items()}
        return w

    def key(self):
        maps = tuple(tuple(sorted(m.items())) for m in (self.dir, self.ino, self.ddir, self.dino, self.blocks))
        ses = tuple(tuple(s.values()) for _, s in sorted(self.ses.items()))
        return hash((maps, ses, self.clock, self.hist, self.vol, self.fin, self.late, self.told, self.chain, self.high, self.adm,
                     self.zomb, self.forgot, self.ms, self.left))

    def rule(self, name):
        return name not in self.off

    def has(self, what):
        return dict(self.left).get(what, 0) > 0

    def spend(self, what):
        left = dict(self.left)
        left[what] -= 1
        self.left = tuple(sorted(left.items()))

    def machine(self, m, takings=None, dig=None, last=None):
        old = self.ms[m]
        new = (old[0] if takings is None else takings, old[1] if dig is None else dig, last or old[2])
        self.ms = self.ms[:m] + (new,) + self.ms[m + 1:]


# ---------------------------------------------------------------- the server


def carry_out(w, req, s=None, stale=0):
    """One request. `s` is the session that gets the answer; None where nobody does any more."""
    kind = req[0]
    if kind == "list":
        names = set(w.hist[stale - 1] if stale else w.dir)
        if s and s["n"] in w.dir:
            names.add(s["n"])  # one's own new name is never missing
        return tuple((n,) + w.ino[w.dir[n]] for n in sorted(names) if n in w.dir)
    if kind == "make":
        n, via = req[1], req[2]
        if n in w.dir:
            return None
        below = w.ino[w.dir[n - 1]][0] if n - 1 in w.dir else None
        if below and not below[1] and via not in ("unlock", "own", "empty"):
            raise Violation("a living session lost its lease to somebody who did not mean to take it over")
        changing(w)
        w.dir[n] = w.next
        w.chain = tuple(x for x in w.chain if x[0] != n) + ((n, s["tok"] if s else 0),)
        w.ino[w.next] = (None, w.clock)
        w.next += 1
        return w.dir[n]
    if kind == "put":
        if req[1] in w.ino:
            w.ino[req[1]] = (req[2], w.clock)
            if s:
                s["nonce"] = req[2][2]
        return None
    if kind == "sync":
        if w.dir.get(req[1]) == req[2]:
            w.ddir[req[1]] = req[2]
            w.dino[req[2]] = w.ino[req[2]]
        return None
    if kind == "look":
        n = req[1]
        return (w.ino[w.dir[n]][0] if n in w.dir else None, n + 1 in w.dir)
    if kind == "read":
        return w.ino[w.dir[req[1]]] if req[1] in w.dir else None
    if kind == "rm":
        return remove(w, req[1])
    if kind == "late":
        w.late |= req[1]
        return None
    if kind == "open":
        return (tuple(sorted(w.blocks.items())), w.late, w.vol)
    raise AssertionError(kind)


def changing(w):
    if w.cfg.get("stale"):
        w.hist = (tuple(w.dir),) + w.hist[:4]


def remove(w, n):
    if n not in w.dir:
        return None
    if any(s["n"] == n and passes(w, s) for s in w.ses.values()):
        raise Violation("the lease of a living holder was removed")
    if n == max(w.dir) and w.rule("chain") and w.rule("take"):
        raise Violation("the highest lease was removed: its number could be given twice")
    changing(w)
    del w.dir[n]
    w.ddir.pop(n, None)
    return None


def data(w, req):
    """A write into the container arrives."""
    _, block, who, n, stamp = req
    if w.clock - stamp >= DOOR:
        return  # assumption K: the connection is gone
    said = w.ino[w.dir[n]][0] if n in w.dir else None
    listed = (block, who) in w.late and not (said and said[1])  # who says free says that all was answered
    if w.blocks.get(block) != who and not listed and w.adm:
        top_n, top, doors = max(w.adm)
        made = dict(w.chain)
        known = any(made[door] == made.get(n) and until > w.clock for door, until in doors)
        twins = made.get(n) in w.cloned or made.get(top_n) == made.get(n)  # see the openings
        if top_n > n and not known and not twins:
            raise Violation(f"a write of lease {n} arrived beside session {top}, which watches no door of it")
    w.blocks[block] = who


def passes(w, s):
    """Whether the next look of a session that may write would let it go on."""
    return s["pc"] in MAY_WRITE and holds(w, s)


def holds(w, s):
    return good(w, dict(s), carry_out(w, ("look", s["n"])))


def check_state(w):
    if sum(passes(w, s) for s in w.ses.values()) > 1:
        raise Violation("two sessions may write, and neither would see the other at its next look")


# ---------------------------------------------------------------- a session

MAY_WRITE = ("work", "looked", "renewed")


def good(w, s, answer):
    content, next_there = answer
    s["twin"] = bool(content) and content[0] == s["tok"] and content[2] != s["nonce"]
    if content is None or content[0] != s["tok"] or content[1] or next_there:
        return False
    return content[2] == s["nonce"] or not w.rule("counter")


def begin(w, m, unlock, guess=False):
    sid = w.next
    w.next += 1
    s = dict(sid=sid, m=m, tok=sid, n=0, ino=-1, pc="first", ctl=(("list",),), ans=(), data=(), via="", pred=0,
             doors=NONE, watch=NONE, nonce=0, permit=-1, sent=NONE, doubt=NONE, block=-1, wrote=False,
             unlock=unlock, sends=0, twin=False)
    w.ses[sid] = s
    if guess:
        n = w.ms[m][2][0]
        take(w, s, n, "free", NONE, NONE)


def content(w, s, free, renew=False):
    doors = frozenset(d for d in s["doors"] if d[1] > w.clock or d[0] == s["pred"])
    if free and not w.rule("doors"):
        doors = NONE
    return (s["tok"], free, s["nonce"] + renew, doors, s["watch"] if w.rule("marks") else NONE)


def hold(w, s):
    sync = (("sync", s["n"], s["ino"]),) if w.rule("sync") and w.cfg["budget"]["power"] else ()
    return (("put", s["ino"], content(w, s, False)),) + sync


def take(w, s, pred, via, doors, watch):
    """Makes lease pred + 1; the record says so first."""
    doors = frozenset(d for d in doors if d[1] > w.clock or d[0] == pred)
    s.update(pred=pred, n=pred + 1, via=via, doors=doors, watch=watch, pc="made", ctl=(("make", pred + 1, via),))
    takings = w.ms[s["m"]][0]
    w.machine(s["m"], takings=takings | {(s["n"], s["tok"])})


def closed(w, doors):
    return all(until != INF for _, until in doors)


def go(w, s, choice=None):
    """The session goes on: everything that it asked for was answered."""
    pc, ans = s["pc"], s["ans"]
    s["ans"] = ()
    if pc == "first":
        listing = ans[0]
        if not listing:
            return take(w, s, 0, "free", NONE, NONE)
        top, found, _ = listing[-1]
        takings = w.ms[s["m"]][0]
        if not w.rule("record"):
            takings = frozenset(t for t in takings if t[0] >= top)
        w.machine(s["m"], takings=takings, last=(top, bool(found and found[1])))
        if found is None:  # made and never filled: what counts is the one below
            n, below = ([(0, (0, True, 0, NONE, NONE))] + [(n, c) for n, c, _ in listing if c])[-1]
            own = (w.clock + DOOR if w.rule("watch-own") else 0) if (n, below[0]) in takings else INF
            doors = below[3] | (NONE if below[1] else {(n, own)}) | ({(top, INF)} if w.rule("empty") else NONE)
            return take(w, s, top, "empty", doors, below[4])
        tok, free, _, doors, watch = found
        if free:
            return take(w, s, top, "free", doors, watch)
        if (top, tok) in takings:
            until = w.clock + DOOR if w.rule("watch-own") else 0  # after the quiet time
            return take(w, s, top, "own", doors | {(top, until)}, watch)
        if s["unlock"] and not w.rule("take"):
            s.update(pred=top, n=top, via="unlock", pc="doors", doors=frozenset({(top, INF)}))
            return None
        if s["unlock"]:
            doors = doors if w.rule("inherit") else NONE
            return take(w, s, top, "unlock", doors | {(top, INF)}, watch)
        return end(w, s)
    elif pc == "made":
        if ans[0] is None:
            w.machine(s["m"], takings=w.ms[s["m"]][0] - {(s["n"], s["tok"])})
            return end(w, s)
        s["ino"] = ans[0]
        if any(until > w.clock for _, until in s["doors"]):
            s["watch"] |= {(s["m"], s["sid"])}
        s.update(pc="second", permit=w.clock, ctl=hold(w, s) + (("list",), ("look", s["n"]), ("read", s["pred"])))
    elif pc == "second":
        listing, look, below = ans[-3:]
        mine = listing and listing[-1][0] == s["n"] and listing[-1][1] is not None and listing[-1][1][0] == s["tok"]
        pred = below[0] if below else None
        gone = s["pred"] and not below
        if w.rule("second") and (not mine or look[1] or gone):
            return withdraw(w, s)
        # What is lower than a synced lease of ours counts no more, whatever a crash of the server brings back.
        w.machine(s["m"], takings=frozenset(t for t in w.ms[s["m"]][0] if t[0] >= s["n"]))
        if s["via"] == "empty" and w.rule("empty"):
            if pred is not None:  # it was filled meanwhile: somebody may hold it
                s["doors"] |= pred[3]
                return withdraw(w, s)
            s["doors"] -= {(s["pred"], INF)}
            if not closed(w, s["doors"]):  # struck out, and looked once more, before the waiting begins
                s.update(pc="struck", permit=w.clock, ctl=hold(w, s) + (("look", s["n"]),))
                return None
            return doors_or_enter(w, s, waited=True)
        if s["via"] == "free" and s["pred"] and w.rule("second") and not (pred is None or pred[1]):
            s["doors"] |= pred[3] | {(s["pred"], INF)}
            return withdraw(w, s)
        if pred is not None and s["via"] != "empty":
            if w.rule("inherit") or s["via"] != "unlock":
                s["doors"] |= pred[3]
            s["watch"] |= pred[4]
        return doors_or_enter(w, s)
    elif pc == "struck":
        if w.rule("relook") and not good(w, s, ans[-1]):
            return withdraw(w, s)
        return doors_or_enter(w, s)
    elif pc == "doors":
        if choice == "a":
            s.update(pc="asked", ctl=(("read", min(n for n, until in s["doors"] if until == INF)),))
            return None
        if choice == "b":
            kill(w, s)
            s["doors"] = NONE
        elif choice in ("d", "e"):
            until = w.clock + DOOR if w.rule("watch") else 0
            s["doors"] = frozenset((n, until if u == INF else u) for n, u in s["doors"])
        elif choice == "leave":
            return withdraw(w, s)
        return doors_or_enter(w, s, waited=True)
    elif pc == "asked":
        door = min(n for n, until in s["doors"] if until == INF)
        found = ans[0]
        if found and found[0] and found[0][1]:  # it says free: all of it was answered
            s["doors"] = (s["doors"] - {(door, INF)}) | found[0][3]
            s["watch"] |= found[0][4]
        return doors_or_enter(w, s, waited=True)
    elif pc == "entered":
        if w.rule("relook") and not good(w, s, ans[-1]):
            return withdraw(w, s)
        s.update(pc="opened", ctl=(("open",),))
    elif pc == "opened":
        return opened(w, s, ans[-1])
    elif pc == "work":
        if choice == "look":
            s.update(pc="looked", ctl=(("look", s["n"]),), permit=w.clock)
        elif choice == "send":
            s["data"] += (("data", s["block"], s["sid"], s["n"], w.clock),)
            s["sent"] |= {(s["block"], s["sid"])}
            s.update(wrote=True, sends=s["sends"] + 1)
            w.high = tuple(sorted({**dict(w.high), s["tok"]: s["nonce"]}.items()))
        elif choice == "finish":
            if dict(w.vol).get(s["block"], s["sid"]) == s["sid"] or s["n"] >= max(w.adm)[0]:
                w.vol = tuple(sorted([x for x in w.vol if x[0] != s["block"]] + [(s["block"], s["sid"])]))
            else:  # another has named its own meanwhile: this is one more late write
                s["sent"] |= {(s["block"], s["sid"])}
                data(w, ("data", s["block"], s["sid"], s["n"], w.clock))
            if any(until > w.clock for _, until in s["doors"]):
                w.machine(s["m"], dig=w.ms[s["m"]][1] | {s["sid"]})
            if not w.rule("final"):
                s.update(pc="final look", ctl=(("look", s["n"]),))
            else:
                s.update(pc="closing", ctl=release(w, s) + (("look", s["n"]), ("list",)))
        elif choice == "give up":
            lists = (("late", s["doubt"]),) if s["doubt"] and w.rule("late") else ()
            if s["doubt"]:
                s["doors"] |= {(s["n"], w.clock + DOOR)}  # its own door, watched through the list
            s.update(pc="end", ctl=lists + release(w, s))
        elif choice == "remove":
            w.spend("remove")
            s["ctl"] = tuple(("rm", k) for k in removable(w, s)[:1])
            s["pc"] = "renewed"
    elif pc == "looked":
        if not good(w, s, ans[0]):
            s["pc"] = "lost"
            return None
        s["sent"] = frozenset((q[1], q[2]) for q in s["data"])
        if w.cfg.get("renew"):
            s.update(pc="renewed", ctl=(("put", s["ino"], content(w, s, False, renew=True)),))
        else:
            s["pc"] = "work"
    elif pc == "renewed":
        s["pc"] = "work"
    elif pc in ("closing", "final look"):
        own, next_there = ans[-2] if pc == "closing" else ans[-1]
        # Who took the lease as free, still waits for it or has not filled its own began after all of this.
        above = [c for n, c, _ in ans[-1] if n > s["n"] and c] if pc == "closing" else []
        past = any(c[0] == s["tok"] or any(n == s["n"] and until != INF for n, until in c[3]) for c in above)
        if past or pc == "final look" and next_there or w.rule("chain") and (own is None or own[0] != s["tok"]):
            s["pc"] = "lost"
            return None
        w.fin |= {s["sid"]}
        w.machine(s["m"], last=(s["n"], True))
        s.update(pc="end", ctl=() if pc == "closing" else release(w, s))
    elif pc == "again":  # a new connection: a takeover from oneself
        if not good(w, s, ans[0]):
            s["pc"] = "lost"
        elif w.rule("again"):
            w.machine(s["m"], takings=w.ms[s["m"]][0] | {(s["n"] + 1, s["tok"])})
            s.update(pc="again made", ctl=(("make", s["n"] + 1, "own"),))
        else:
            s["pc"] = "work"
    elif pc == "again made":
        if ans[0] is None:
            s["pc"] = "lost"
            return None
        s.update(pc="again held", permit=w.clock, pred=s["n"], n=s["n"] + 1, ino=ans[0])
        s["ctl"] = hold(w, s) + (("look", s["n"]), ("read", s["pred"]))
    elif pc == "again held":
        before = ans[-1] and ans[-1][0]
        same = before and before[:2] == (s["tok"], False) and (before[2] == s["nonce"] or not w.rule("counter"))
        if not same or not good(w, s, ans[-2]):
            if not same:
                s["doors"] |= {(s["pred"], INF)}
            s["pc"] = "lost"
            return None
        if dict(w.high).get(s["tok"], 0) > s["nonce"]:
            raise Violation("a copy goes on from a state that its twin has left behind")
        w.adm += ((s["n"], s["sid"], frozenset(d for d in s["doors"] if d[1] > w.clock)),)
        s["pc"] = "work"
    elif pc == "lost":
        unanswered = frozenset((q[1], q[2]) for q in s["data"]) | s["doubt"]
        listed = unanswered | (s["sent"] if w.rule("since-look") else NONE)
        lists = (("late", listed),) if listed and w.rule("late") else ()
        drained = not s["data"] and not s["doubt"] or not w.rule("drained")
        if drained and not (s["twin"] and w.rule("other twin")):
            lists += (("put", s["ino"], content(w, s, True)),)
        s.update(pc="end", ctl=lists)
        return None
    else:
        end(w, s)


def doors_or_enter(w, s, waited=False):
    if not closed(w, s["doors"]):
        s["pc"] = "doors"
        return None
    if s["via"] == "unlock" and not w.rule("take"):
        s.update(pc="end", ctl=(("rm", s["n"]),))
        return None
    if waited:
        if any(until > w.clock for _, until in s["doors"]):
            s["watch"] |= {(s["m"], s["sid"])}
        s.update(pc="entered", permit=w.clock, ctl=hold(w, s) + (("look", s["n"]),))
        return None
    s.update(pc="opened", ctl=(("open",),))
    if not w.rule("keep") and s["pred"]:
        s["ctl"] = (("rm", s["pred"]),) + s["ctl"]
    return None


def opened(w, s, answer):
    """The comparison at an opening: what is wrong with a finished snapshot must be told here."""
    blocks, late, vol = dict(answer[0]), answer[1], answer[2]
    if not w.fin <= {who for _, who in vol}:
        raise Violation("a reported snapshot is gone")
    digests, over = w.ms[s["m"]][1], not any(until > w.clock for _, until in s["doors"])
    for i, who in vol:
        found = blocks.get(i)
        if who not in w.fin or found == who or i in w.told:
            continue
        listed = (i, found) in late and w.rule("late")
        compared = who in digests
        marked = any(sid == who for _, sid in s["watch"]) and w.rule("marks")
        telling = found in w.ses and w.ses[found]["tok"] in w.cloned  # a twin that will tell when it finds that it lost
        if not (listed or compared or marked or telling):
            raise Violation(f"a block of snapshot {i} is wrong and this opening says nothing")
        if listed or compared:
            w.told |= {i}
    if over or not w.rule("until"):  # compared for the last time: what this machine has digests of is settled
        settled = digests | {sid for _, sid in s["watch"] if sid not in w.fin and sid != s["sid"]}
        s["watch"] = frozenset(x for x in s["watch"] if x[0] != s["m"] or x[1] not in settled)
        w.machine(s["m"], dig=NONE)
    w.adm += ((s["n"], s["sid"], frozenset(d for d in s["doors"] if d[1] > w.clock)),)
    s.update(pc="work", block=1 + max((i for i, _ in vol), default=-1))


def withdraw(w, s):
    s.update(pc="end", ctl=(("put", s["ino"], content(w, s, True)),))


def release(w, s):
    """What is asked for to give the lease back; everything sent was answered."""
    if not w.rule("record"):
        w.machine(s["m"], takings=w.ms[s["m"]][0] - {(s["n"], s["tok"])})
    return (("put", s["ino"], content(w, s, True)),) if w.rule("chain") else (("rm", s["n"]),)


def removable(w, s):
    """Numbers below one that has ended, and was changed last so long ago that no listing lacks it."""
    below = [k for k in sorted(w.dir) if k < s["n"]]
    ended = [k for k in below if w.ino[w.dir[k]][0] and w.ino[w.dir[k]][0][1] and w.clock - w.ino[w.dir[k]][1] >= KEEP]
    return [k for k in below if ended and k < ended[-1]]


def end(w, s):
    gone(w, s, False)


def gone(w, s, ctl=True):
    """The session is no more (or its line): what is on its way may arrive."""
    queues = (s["data"],) + ((s["ctl"],) if ctl else ())
    w.zomb = tuple(sorted(w.zomb + tuple(q for q in queues if q), key=repr))
    if s["sid"] in w.ses:
        del w.ses[s["sid"]]


def kill(w, s):
    """Way b: every older process of the server that has the container open is ended."""
    w.zomb = tuple(q for q in w.zomb if q[0][0] != "data") if not w.cfg.get("nodes") else w.zomb
    for other in list(w.ses.values()):
        if other["n"] < s["n"] and not w.cfg.get("nodes"):
            other["data"] = ()
            lose_line(w, other, arrives=False)


def lose_line(w, s, arrives=True):
    if arrives:
        queues = tuple(q for q in (s["data"], s["ctl"]) if q)
        w.zomb = tuple(sorted(w.zomb + queues, key=repr))
    if s["pc"] in MAY_WRITE + ("again", "closing"):
        s["doubt"] |= frozenset((q[1], q[2]) for q in s["data"])
        s.update(data=(), ctl=(("look", s["n"]),), ans=(), pc="again", wrote=False, permit=w.clock)
    elif s["pc"] == "lost":
        s["doubt"] |= frozenset((q[1], q[2]) for q in s["data"])
        s["data"] = ()
    else:
        del w.ses[s["sid"]]


# ---------------------------------------------------------------- what may happen next


def actions(w):
    out = []
    busy = {s["m"] for s in w.ses.values()}
    for m in range(len(w.ms)):
        if m not in busy and w.has("start"):
            out.append(("start", m))
            if w.has("unlock"):
                out.append(("unlock", m))
            if w.cfg.get("guess") and w.ms[m][2][0] and (w.ms[m][2][1] or not w.rule("known-free")):
                out.append(("guess", m))
    for sid, s in w.ses.items():
        if s["ctl"]:
            out.append(("serve", sid, 0))
            if s["ctl"][0][0] == "list":
                out += [("serve", sid, k + 1) for k in range(len(w.hist))]
        elif s["pc"] == "doors":
            ways = ["a", "leave"] + (w.cfg["ways"] if s["unlock"] else [])
            for way in ways:
                doors = [n for n, until in s["doors"] if until == INF]
                old = all(n not in w.dir or w.clock - w.ino[w.dir[n]][1] >= DOOR for n in doors)
                if way != "d" or old:
                    out.append(("go", sid, way))
        elif s["pc"] == "work":
            out.append(("go", sid, "look"))
            if s["permit"] == w.clock and s["sends"] < w.cfg.get("sends", 1) + (1 if s["doubt"] else 0):
                out.append(("go", sid, "send"))
            if s["wrote"] and not s["data"] and s["permit"] == w.clock:
                out.append(("go", sid, "finish"))
            if not s["data"] and (w.cfg.get("giving up") or s["doubt"]):
                out.append(("go", sid, "give up"))
            if w.has("remove") and removable(w, s):
                out.append(("go", sid, "remove"))
        elif s["pc"] == "lost":
            out.append(("go", sid, None))
        if s["data"]:
            dead = w.clock - s["data"][0][4] >= DOOR  # assumption K
            out.append(("dropped", sid) if dead else ("arrive", sid))
        if w.has("crash"):
            out += [("crash", sid, True)] + ([("crash", sid, False)] if w.cfg.get("lose record") else [])
        if w.has("loss"):
            out.append(("loss", sid))
        if w.has("clone") and s["pc"] == "work":
            out.append(("clone", sid))
    out += [("ghost", i) for i in range(len(w.zomb))]
    if w.has("tick"):
        out.append(("tick",))
    if w.has("power"):
        differ = [i for i in w.ino if w.dino.get(i) != w.ino[i]][:3]
        out += [("power", mask) for mask in range(1 << len(differ))]
    return out


def apply(w, act):
    kind = act[0]
    if kind in ("start", "unlock", "guess"):
        w.spend("start")
        if kind == "unlock":
            w.spend("unlock")
        begin(w, act[1], kind == "unlock", kind == "guess")
    elif kind == "serve":
        s = w.ses[act[1]]
        req, s["ctl"] = s["ctl"][0], s["ctl"][1:]
        s["ans"] += (carry_out(w, req, s, act[2]),)
    elif kind == "go":
        go(w, w.ses[act[1]], act[2])
    elif kind == "arrive":
        s = w.ses[act[1]]
        req, s["data"] = s["data"][0], s["data"][1:]
        data(w, req)
    elif kind == "ghost":
        queue = w.zomb[act[1]]
        rest = (queue[1:],) if queue[1:] else ()
        w.zomb = tuple(sorted(w.zomb[:act[1]] + w.zomb[act[1] + 1:] + rest, key=repr))
        if queue[0][0] == "data":
            data(w, queue[0])
        else:
            carry_out(w, queue[0])
    elif kind == "crash":
        w.spend("crash")
        s = w.ses[act[1]]
        gone(w, s)
        if not act[2]:
            w.forgot |= {tok for _, tok in w.ms[s["m"]][0]}
            w.machine(s["m"], takings=NONE, dig=NONE, last=(0, False))
    elif kind in ("loss", "dropped"):
        if kind == "loss":
            w.spend("loss")
        lose_line(w, w.ses[act[1]])
    elif kind == "clone":
        w.spend("clone")
        s = dict(w.ses[act[1]])
        w.cloned |= {s["tok"]}
        w.ms += (w.ms[s["m"]],)
        s.update(sid=w.next, m=len(w.ms) - 1, data=(), ctl=(("look", s["n"]),), ans=(), pc="again", permit=w.clock,
                 wrote=False, sends=0, doubt=s["doubt"] | frozenset((q[1], q[2]) for q in s["data"]))
        w.next += 1
        w.ses[s["sid"]] = s
    elif kind == "tick":
        w.spend("tick")
        w.clock += 1
        w.hist = ()
    elif kind == "power":
        w.spend("power")
        differ = [i for i in w.ino if w.dino.get(i) != w.ino[i]][:3]
        for bit, i in enumerate(differ):
            if act[1] >> bit & 1:  # by chance it had reached the disk
                w.dino[i] = w.ino[i]
                w.ddir.update({n: j for n, j in w.dir.items() if j == i})
        w.dir, w.ino, w.zomb = dict(w.ddir), dict(w.dino), ()
        for s in list(w.ses.values()):
            lose_line(w, s, arrives=False)
    # A client that sleeps between an answer and its next request is one whose request arrives late: no state of its own.
    for sid in list(w.ses):
        while sid in w.ses and not w.ses[sid]["ctl"] and w.ses[sid]["pc"] not in ("work", "doors", "lost"):
            go(w, w.ses[sid])
    check_state(w)


def rescue(w):
    """All are dead: with patience alone (way d) a new machine must get in, and the last holder's without."""
    w = w.copy()
    w.cfg = dict(w.cfg, ways=["d"], stale=False)
    w.hist = ()
    for s in list(w.ses.values()):
        gone(w, s)
    w.clock += DOOR + 1
    w.zomb, w.fin = (), NONE
    top = w.ino[w.dir[max(w.dir)]][0] if w.dir else None
    owners = [m for m in range(len(w.ms)) if top and (max(w.dir), top[0]) in w.ms[m][0]]
    if top and not top[1] and top[0] not in w.forgot and not owners:
        raise Violation("a lease of a machine that kept its record is a stranger's to it")
    w.ms += ((NONE, NONE, (0, False)),)
    w.left = tuple(sorted({"start": 9, "unlock": 9}.items()))
    apply(w, ("unlock", len(w.ms) - 1))
    for _ in range(60):
        if any(s["m"] == len(w.ms) - 1 and s["pc"] == "work" for s in w.ses.values()):
            return
        acts = [a for a in actions(w) if a[0] in ("serve", "go") and a[-1] not in ("leave", "a")]
        if not acts:
            break
        apply(w, acts[0])
    if not w.rule("take"):
        return
    raise Violation("all are dead and nobody can ever get in")


# ---------------------------------------------------------------- exploration


def config(machines, ways=(), **more):
    budget = {k: more.pop(k, 0) for k in ("start", "unlock", "crash", "loss", "tick", "power", "clone", "remove")}
    return dict(machines=machines, ways=list(ways), budget=budget, **more)


CONFIGS = {
    # small enough for all of their states
    "all: race": config(2, start=2),
    "all: word": config(2, ("e",), start=2, unlock=1, tick=1),
    "all: kill": config(2, ("b",), start=2, unlock=1),
    "all: answer": config(2, ("a",), start=2, unlock=1),
    "all: own": config(1, start=3, crash=1, tick=1),
    "all: power": config(2, start=2, power=1),
    # two openings at once, an opening that sleeps longer than a lease is kept, stale listings, late requests of the dead
    "race": config(3, start=4, crash=1, tick=1, remove=1),
    "stale": config(2, start=4, stale=True),
    "stale later": config(2, start=4, tick=1, remove=2, stale=True),
    "guess": config(2, start=4, tick=1, remove=1, guess=True, crash=1),
    # a holder sleeps, another takes over, a third comes later
    "answer": config(2, ("a",), start=3, unlock=1, sends=2),
    "kill": config(2, ("b",), start=3, unlock=1, loss=1),
    "word": config(3, ("e",), start=4, unlock=1, tick=3, sends=1),
    "age": config(2, ("d",), start=3, unlock=1, tick=4, sends=1),
    "two unlocks": config(3, ("a", "e"), start=3, unlock=2),
    "early": config(3, ("e",), start=4, unlock=1),
    "waiters": config(3, ("a", "e"), start=4, unlock=2, tick=2, crash=1),
    # a machine that died or lost its line, and goes on
    "own": config(2, start=4, crash=1, tick=2, loss=1, **{"giving up": True}),
    "twin": config(2, start=2, clone=1, renew=True, loss=1, sends=1),
    # the server loses what was not synced
    "power": config(2, ("e",), start=4, unlock=1, power=1, tick=2),
    "lost record": config(2, ("d", "e"), start=3, unlock=1, crash=2, tick=2, **{"lose record": True}),
}
def explore(cfg, without=(), states_max=200_000, seconds=60.0):
    """Breadth first over all states; returns (states, whole, violation and its trace)."""
    until = time.time() + seconds
    first = World(cfg, without)
    seen, front = {first.key()}, deque([first])
    while front:
        if len(seen) > states_max or time.time() > until:
            return len(seen), False, None
        w = front.popleft()
        for act in actions(w):
            after = w.copy()
            after.trace = (w.trace, act)
            try:
                apply(after, act)
                key = after.key()
                if key in seen:
                    continue
                if len(seen) % 16 == 0:
                    rescue(after)
            except Violation as violation:
                return len(seen), False, (str(violation), after.trace)
            seen.add(key)
            front.append(after)
    return len(seen), True, None


def walk(cfg, without=(), seconds=30.0, seed=1):
    """Random walks; returns (steps, violation and its trace)."""
    chance, until, steps = random.Random(seed), time.time() + seconds, 0
    while time.time() < until:
        w = World(cfg, without)
        trace, last = (), None
        for _ in range(chance.randrange(30, 140)):
            todo = actions(w)
            if not todo:
                break
            same = [a for a in todo if a[0] in ("serve", "arrive", "go") and a[1] == last]
            act = chance.choice(same if same and chance.random() < 0.6 else todo)
            last = act[1] if act[0] in ("serve", "arrive", "go") else max(w.ses, default=None)
            trace = (trace, act)
            steps += 1
            try:
                apply(w, act)
            except Violation as violation:
                return steps, (str(violation), trace)
        try:
            rescue(w)
        except Violation as violation:
            return steps, (str(violation), trace)
    return steps, None


def unroll(trace):
    out = []
    while trace:
        trace, act = trace
        out.append(act)
    return out[::-1]


def drive(w, act, stop=None):
    """Starts a session (or goes on with one) until it is at `stop`, or has ended."""
    if isinstance(act, tuple):
        apply(w, act)
    sid = max(w.ses) if isinstance(act, tuple) else act
    while sid in w.ses and not (stop == w.ses[sid]["pc"] or stop == "sent" and w.ses[sid]["data"]):
        s = w.ses[sid]
        if s["ctl"]:
            apply(w, ("serve", sid, 0))
        elif s["data"]:
            apply(w, ("arrive", sid))
        else:
            work = "finish" if s["wrote"] else "send"
            apply(w, ("go", sid, {"doors": "e", "work": work}.get(s["pc"])))
    return sid


def scripts(without):
    """Ways that random walks find seldom."""
    cfg = config(3, ("e",), start=9, unlock=9)
    try:
        w = World(cfg, without)  # compared too early, damaged later, opened by another machine
        asleep = drive(w, ("start", 0), "sent")
        drive(w, ("unlock", 1))
        drive(w, ("unlock", 1))
        apply(w, ("arrive", asleep))
        drive(w, ("unlock", 2))
        w = World(cfg, without)  # what the predecessor noted between the first and the second look
        asleep = drive(w, ("start", 0), "sent")
        waiter = drive(w, ("unlock", 1), "doors")
        third = drive(w, ("unlock", 2), "made")
        drive(w, waiter)
        apply(w, ("arrive", asleep))
        drive(w, third)
        w = World(config(2, start=2, clone=1, renew=True), without)  # a copy gets in where its twin closes
        twin = drive(w, ("start", 0), "work")
        apply(w, ("clone", twin))
        copy = max(w.ses)
        for act in (("go", twin, "send"), ("arrive", twin), ("go", twin, "finish"), ("serve", twin, 0)):
            apply(w, act)
        drive(w, copy)
        drive(w, twin)
        drive(w, ("start", 1))
    except Violation as violation:
        return str(violation)
    return None


def mutate(seconds, rules):
    """Takes each rule away and looks for what breaks then."""
    fine = 0
    for rule in rules or RULES:
        name, what = RULES[rule]
        begun = time.time()
        bad = scripts((rule,)) or (walk(CONFIGS[name], (rule,), seconds)[1] or [None])[0]
        fine += bad is None
        print(f"{rule:11} {name:12} {time.time() - begun:5.1f} s  {what}: {bad or 'NOTHING BREAKS'}", flush=True)
    return fine


def trace_allows(w, act):
    """What the real code is driven through: takings, looks, takeovers, losses, deaths and late requests."""
    kind = act[0]
    if kind == "go":
        s = w.ses[act[1]]
        if s["pc"] == "doors":
            return act[2] == "e" or act[2] == "a" and sum(until == INF for _, until in s["doors"]) == 1
        return act[2] not in ("give up", "remove")
    if kind == "loss":
        return w.ses[act[1]]["pc"] not in ("closing", "lost", "end", "first")
    return kind != "crash" or act[2]


def refused(w, sid):
    """The real code makes no lease where it would have to wait for a door that nobody asked it to wait for."""
    s = w.ses.get(sid)
    if not s or s["unlock"] or s["pc"] != "made":
        return False
    return any(until == INF and not (s["via"] == "empty" and n == s["pred"]) for n, until in s["doors"])


def one_trace(chance):
    """A random walk, each act with what becomes of its session; and how it ends."""
    cfg = config(chance.choice((2, 3)), ("e",), start=4, unlock=2, crash=1, loss=1)
    w, acts, last = World(cfg), [], None
    for _ in range(chance.randrange(20, 90)):
        closing = [s["sid"] for s in w.ses.values() if s["pc"] == "closing" and s["ctl"][0][0] == "list"]
        todo = [("serve", closing[0], 0)] if closing else [a for a in actions(w) if trace_allows(w, a)]
        if not todo:
            break
        same = [a for a in todo if a[0] in ("serve", "arrive", "go") and a[1] == last]
        act = chance.choice(same if same and chance.random() < 0.6 else todo)
        sid = None if act[0] in ("start", "unlock", "ghost") else act[1]
        before = dict(w.ses[sid]) if sid else {}
        about = {"do": act[0], "choice": act[2] if act[0] == "go" else None}
        if act[0] == "serve":
            about.update(what=before["ctl"][0][0], lease=before["n"], pred=before["pred"])
        if act[0] == "ghost":
            late = w.zomb[act[1]][0]
            names = {ino: n for n, ino in w.dir.items()}
            about.update(what=late[0], lease=late[1] if late[0] == "make" else names.get(late[1], 0) if late[0] == "put" else 0)
        after = w.copy()
        apply(after, act)
        if sid and before["pc"] == "first" and refused(after, sid):
            break
        w = after
        if act[0] in ("start", "unlock"):
            sid = max(w.ses)
            about["machine"] = act[1]
        now = w.ses.get(sid, {})
        about.update(sid=sid, was=before.get("pc"), pc=now.get("pc"), free=any(q[0] == "put" for q in now.get("ctl", ())))
        acts.append(about)
        last = sid
    leases = {n: w.ino[ino][0] for n, ino in w.dir.items()}
    end = {n: "empty" if not c else ("free " if c[1] else "held ") + str(c[0]) for n, c in leases.items()}
    return {"acts": acts, "leases": end, 
            "writers": sorted(s["sid"] for s in w.ses.values() if s["pc"] in ("opened", "work") and holds(w, s))}


def traces(count, seed):
    chance = random.Random(seed)
    for _ in range(count):
        print(json.dumps(one_trace(chance)))
    return 0


def main(args):
    if args[:1] == ["traces"]:
        return traces(int(args[1]), int(args[2]))
    if args[:1] == ["mutate"]:
        rules = [a[len("--rule="):] for a in args if a.startswith("--rule=")]
        return mutate(float(next((a for a in args if a.replace(".", "").isdigit()), 4)), rules)
    without = [a[len("--without="):] for a in args if a.startswith("--without=")]
    seed = next((int(a[len("--seed="):]) for a in args if a.startswith("--seed=")), 1)
    names = [a for a in args if a in CONFIGS] or list(CONFIGS)
    seconds = float(next((a for a in args if a.replace(".", "").isdigit()), 20))
    for name in names:
        begun = time.time()
        states, whole, bad = explore(CONFIGS[name], without, seconds=seconds, states_max=10**7)
        steps = 0
        if not bad:
            steps, bad = walk(CONFIGS[name], without, seconds, seed)
        print(f"{name:12} {states:8} states {'all' if whole else 'cut'} {steps:8} steps {time.time() - begun:5.1f} s",
              bad[0] if bad else "", flush=True)
        if bad:
            for act in unroll(bad[1]):
                print("   ", act)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
