"""What is backed up: trees made from a seed, and the change of one percent."""
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

# In every tree, for the restore of one file.
ONE_FILE = "one/ten-kilobytes.bin"
ONE_FILE_BYTES = 10 * 1024
# Times of files lie before this moment (2026-01-01), so that no tool sees a file as just written.
NEWEST_S = 1_767_225_600
CHANGED_SHARE = 0.01


def made(path, data, dice):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    moment = NEWEST_S - dice.randrange(3 * 365 * 86_400)
    os.utime(path, (moment, moment))


def small(root, dice, scale):
    """100,000 files of 50 to 4,000 random bytes, 100 in a folder."""
    for number in range(int(100_000 * scale)):
        folder = root / f"{number // 10_000:02}" / f"{number // 100 % 100:02}"
        made(folder / f"{number:06}.dat", dice.randbytes(dice.randint(50, 4000)), dice)


def lines_of_text(dice):
    """Lines as in source text: compressible, and no two the same."""
    words = ["".join(dice.choices("etaoinshrdlucmfwypvbgkjqxz_", k=dice.randint(2, 11))) for _ in range(4000)]
    shapes = ["{0} = {1}({2}, {3});", "if {0}.{1} < {2} {{", "// {0} {1} {2} {3} {4}", "return {0}({1})?;", "}}"]
    lines = []
    for _ in range(100_000):
        line = dice.choice(shapes).format(*dice.choices(words, k=5))
        lines.append(" " * (4 * dice.randint(0, 4)) + line + "\n")
    return lines


def source(root, dice, scale):
    """About 5,000 files and 150 MB in folders of uneven depth: nine of ten of text, the rest random."""
    lines = lines_of_text(dice)
    folders = [root / "top"]
    while len(folders) < max(2, int(400 * scale)):
        folders.append(dice.choice(folders) / f"folder-{len(folders)}")
    for number in range(int(5_000 * scale)):
        # Most are small, a few large: a log-normal of median 9 KB and mean 30 KB.
        size = min(int(dice.lognormvariate(9.1, 1.55)), 8 << 20)
        if number % 10 == 0:
            data, ending = dice.randbytes(size), "bin"
        else:
            data = "".join(dice.choices(lines, k=size // 32 + 1)).encode()[:size]
            ending = "rs"
        made(dice.choice(folders) / f"file-{number}.{ending}", data, dice)


def large(root, dice, scale):
    """Four files of 256 MiB each of random bytes: 1 GiB."""
    for number in range(4):
        path = root / f"large-{number}.bin"
        made(path, b"", dice)
        with path.open("wb") as file:
            for _ in range(int(256 * scale)):
                file.write(dice.randbytes(1 << 20))


def million(root, dice, scale):
    """1,000,000 files of 0 to 200 random bytes, 100 in a folder."""
    for number in range(int(1_000_000 * scale)):
        folder = root / f"{number // 10_000:03}" / f"{number // 100 % 100:02}"
        made(folder / f"{number:07}.dat", dice.randbytes(dice.randint(0, 200)), dice)


@dataclass(frozen=True)
class Load:
    """A kind of tree."""

    name: str
    make: Callable


LOADS = {
    load.name: load
    for load in (Load("small", small), Load("source", source), Load("large", large), Load("million", million))
}
DEFAULT_LOADS = ("small", "source", "large")


class Tree:
    """A load on disk."""

    def __init__(self, root, load, seed, scale=1.0):
        self.root, self.load, self.dice = root, load, random.Random(f"{load.name}-{seed}")
        root.mkdir(parents=True)
        load.make(root, self.dice, scale)
        made(root / ONE_FILE, self.dice.randbytes(ONE_FILE_BYTES), self.dice)
        files = self.files()
        self.count, self.bytes = len(files), sum(path.stat().st_size for path in files)

    def files(self):
        found = [Path(folder, name) for folder, _, names in os.walk(self.root) for name in names]
        return sorted(path for path in found if path != self.root / ONE_FILE)

    def change(self):
        """Changes one percent: of the files, whole; of a few large ones, of the bytes of one, in place."""
        files = self.files()
        if len(files) < 100:
            path = self.dice.choice(files)
            size = path.stat().st_size
            span = min(int(self.bytes * CHANGED_SHARE), size)
            with path.open("r+b") as file:
                file.seek(self.dice.randrange(size - span + 1))
                file.write(self.dice.randbytes(span))
            return
        for path in self.dice.sample(files, max(1, int(len(files) * CHANGED_SHARE))):
            path.write_bytes(self.dice.randbytes(path.stat().st_size))

    def remove(self):
        shutil.rmtree(self.root)
