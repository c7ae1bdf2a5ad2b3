"""Turns a run's result into Markdown: the goals and what sprat reached, then every figure."""

MEMORY_BYTES_MAX = 512 << 20
MEASURES = ("first", "unchanged", "unchanged, no cache", "1 % changed", "restore all", "restore one")
# The round trip of each line and its rate where limited, as in server.LINES.
RTT_S = {"loopback": 0, "20ms": 0.02, "50ms": 0.05, "100ms": 0.1, "50ms-100mbit": 0.05}
LIMITED_BYTES_PER_S = {"50ms-100mbit": 100e6 / 8}


class Figures:
    """The rows of a run, by line, load, tool and measure."""

    def __init__(self, result):
        self.result = result
        self.rows = {
            (row["line"], row["load"], row["tool"], row["measure"]): row for row in result["rows"] if "load" in row
        }

    def row(self, *key):
        row = self.rows.get(key)
        return row if row and not row["error"] else None

    def wall(self, *key):
        row = self.row(*key)
        return row and row["wall_s"]

    def streams(self, line, streams):
        for entry in self.result["yardstick"]:
            if entry["line"] == line and entry["streams"] == streams:
                return entry["bytes_per_s"]
        return None


class Criterion:
    """One thing that was asked for: a value of this run, its bound, and whether it holds."""

    def __init__(self, what, value, bound, at_most=True, unit="x"):
        self.what, self.value, self.bound, self.at_most, self.unit = what, value, bound, at_most, unit

    def cells(self):
        if self.value is None or self.bound is None:
            return [self.what, "not measured", "", ""]
        holds = self.value <= self.bound if self.at_most else self.value >= self.bound
        word = "at most" if self.at_most else "at least"
        show = "{:.0f}" if self.value >= 100 or self.unit == "requests" else "{:.2f}"
        return [self.what, f"{show.format(self.value)} {self.unit}", f"{word} {self.bound:g} {self.unit}",
                "yes" if holds else "**no**"]


def ratio(over, under):
    return over / under if over and under else None


def criteria(figures):
    """The goals, all from one run; at 50 ms where nothing else is said."""
    wall, line = figures.wall, "50ms"
    loads = figures.result["loads"]
    large_bytes = loads.get("large", {}).get("bytes")
    streams = figures.result["sprat_streams"]
    rate = ratio(large_bytes, wall(line, "large", "sprat", "first"))
    limited_rate = ratio(large_bytes, wall("50ms-100mbit", "large", "sprat", "first"))
    found = [
        Criterion("first backup, large: rate against the sshfs stack's",
                  ratio(wall(line, "large", "sshfs-stack", "first"), wall(line, "large", "sprat", "first")), 3, False),
        Criterion(f"first backup, large: rate against {streams} plain ssh streams",
                  ratio(rate, figures.streams(line, streams)), 0.8, False),
        Criterion("first backup, large, at 100 Mbit/s: share of the connection",
                  ratio(limited_rate, LIMITED_BYTES_PER_S["50ms-100mbit"]), 0.9, False),
    ]
    for peer in ("borg", "bupstash"):
        found.append(Criterion(f"first backup, source: time against {peer}'s",
                               ratio(wall(line, "source", "sprat", "first"), wall(line, "source", peer, "first")), 1))
    for load in loads:
        mine = wall(line, load, "sprat", "unchanged")
        without = wall(line, load, "sprat", "unchanged, no cache")
        stack = wall(line, load, "sshfs-stack", "unchanged")
        found += [
            Criterion(f"unchanged, {load}: time against the sshfs stack's", ratio(mine, stack), 0.25),
            Criterion(f"unchanged, {load}: time against borg's", ratio(mine, wall(line, load, "borg", "unchanged")), 1),
            Criterion(f"unchanged without cache, {load}: time against the sshfs stack's", ratio(without, stack), 0.33),
        ]
    row = figures.row(line, "small", "sprat", "unchanged")
    found.append(Criterion("unchanged, 100,000 files: read requests", row and row["read_requests"], 60, unit="requests"))
    for load in loads:
        found.append(Criterion(
            f"restore of all, {load}: rate against the sshfs stack's",
            ratio(wall(line, load, "sshfs-stack", "restore all"), wall(line, load, "sprat", "restore all")), 3, False))
    for name, rtt_s in RTT_S.items():
        if any(key[0] == name for key in figures.rows):
            found.append(Criterion(f"restore of one file of 100,000 ({name}): 1.5 s and 25 round trips",
                                   wall(name, "small", "sprat", "restore one"), 1.5 + 25 * rtt_s, unit="s"))
    for tool in ("sprat", "sprat-5t"):
        used = [row["memory_bytes"] for key, row in figures.rows.items() if key[2] == tool]
        if used or tool == "sprat":
            found.append(Criterion(f"{tool}: peak memory of all processes, on every load",
                                   max(used) / (1 << 20) if used else None, MEMORY_BYTES_MAX / (1 << 20), unit="MiB"))
    return found


def table(heads, rows, numbers_from=1):
    lines = ["| " + " | ".join(heads) + " |"]
    lines.append("| " + " | ".join("---" if place < numbers_from else "---:" for place in range(len(heads))) + " |")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def number(value, scale=1.0, form="{:.1f}"):
    return "" if value is None else form.format(value / scale)


def seconds(row):
    if row is None:
        return ""
    return "failed" if row["error"] else f"{row['wall_s']:.1f}"


def summary(figures, line, load, tools):
    rows = []
    for tool in tools:
        cells = [figures.rows.get((line, load, tool, measure)) for measure in MEASURES]
        rows.append([tool, *map(seconds, cells)])
    return table(["seconds", *MEASURES], rows)


def details(figures, line, load, tools):
    rows = []
    for measure in MEASURES:
        for tool in tools:
            row = figures.rows.get((line, load, tool, measure))
            if not row:
                continue
            if row["error"]:
                said = " ".join(row["error"].replace("|", "/").split())[:120]
                rows.append([measure, tool, "failed: " + said, *[""] * 7])
                continue
            rows.append([
                measure, tool, number(row["wall_s"], form="{:.2f}"), number(row["up_bytes"], 1e6),
                number(row["down_bytes"], 1e6), number(row["read_requests"], form="{:.0f}"),
                number(row["write_requests"], form="{:.0f}"), number(row["memory_bytes"], 1 << 20, "{:.0f}"),
                number(row["cpu_s"], form="{:.2f}"), number(row["load_before"]),
            ])
    heads = ["", "", "s", "MB sent", "MB received", "reads", "writes", "MiB memory", "s processor", "load before"]
    return table(heads, rows, 2)


def markdown(result):
    """The whole report of one run."""
    figures = Figures(result)
    tools, machine = list(result["versions"]), result["machine"]
    scaled = "" if result["scale"] == 1 else f" · **every load at {result['scale']:g} of its size**"
    text = [
        f"{result['began'][:16].replace('T', ' ')} UTC · `{result['command']}` · commit {result['commit']} · "
        f"{machine['cores']} cores, {machine['processor']}, {machine['memory_bytes'] / (1 << 30):.0f} GiB, kernel "
        f"{machine['kernel']} · seed {result['seed']} · took {result.get('took_s', 0) // 60} min{scaled}\n",
        "Versions: " + " · ".join(f"{name}: {said}" for name, said in result["versions"].items()) + "\n",
        "### Goals, and what this run reached\n",
        table(["", "this run", "goal", "reached"], [criterion.cells() for criterion in criteria(figures)]),
    ]
    lines = list(dict.fromkeys(entry["line"] for entry in result["yardstick"]))
    rates = {(entry["line"], entry["streams"]): entry["bytes_per_s"] for entry in result["yardstick"]}
    streams = sorted({key[1] for key in rates})
    rows = [[line, *(number(rates.get((line, count)), 1e6) for count in streams)] for line in lines]
    text += ["### The connection itself: parallel plain `ssh … cat > /dev/null`, MB/s\n",
             table(["", *(f"{count} streams" if count > 1 else "1 stream" for count in streams)], rows)]
    for line in lines:
        for load, made in result["loads"].items():
            if not any(key[:2] == (line, load) for key in figures.rows):
                continue
            text += [f"### {line}, {load}: {made['files']:,} files, {made['bytes'] / 1e6:,.0f} MB\n",
                     summary(figures, line, load, tools), details(figures, line, load, tools)]
    return "\n".join(text)


def write_docs(page, part, text):
    """Puts the report between the page's two marks of this part."""
    begin, end = f"<!-- {part}: written by make bench -->\n", f"<!-- {part}: end -->\n"
    old = page.read_text()
    head, _, rest = old.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f"{page}: the marks of the part {part!r} are missing")
    page.write_text(f"{head}{begin}\n{text}\n{end}{tail}")
