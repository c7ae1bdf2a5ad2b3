"""The tools that are measured: how each is set up, backs up and restores."""
import json
import os
import shutil
import subprocess
from pathlib import Path

from loads import ONE_FILE
from server import HOST

PASSPHRASE = "not a secret: made for a benchmark"
JOB = "bench"


def output_of(*words, begins=""):
    """The first line of a command's output that begins so."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines() if done.returncode == 0 else []
    return next((" ".join(line.split()) for line in lines if line.startswith(begins)), "unknown")


class Tool:
    """One tool with one repository on one line. Commands are measured; `prepare` is not.

    Above: run.py. Each command is a list of words; `environment` holds for all of them; whatever the
    tool keeps on the client lies in `home`, whatever it keeps on the server in `folder`.
    """

    name = ""
    # Keeps something on the client that a lost client would not have.
    has_cache = True

    def __init__(self, programs, wire, home, folder, container_bytes):
        self.programs, self.wire, self.home, self.folder = programs, wire, home, folder
        self.container_bytes = container_bytes
        self.ssh = f"ssh -F {wire.config}"
        self.environment = {
            "PATH": os.environ["PATH"], "HOME": str(home), "LC_ALL": "C.UTF-8", "TZ": "UTC",
            "XDG_CACHE_HOME": str(home / "cache"), "XDG_CONFIG_HOME": str(home / "config"),
            "TMPDIR": str(home / "tmp"),
        }
        for below in (home / "tmp", home / "cache", folder):
            below.mkdir(parents=True)

    @classmethod
    def missing(cls, programs):
        """Why this tool can't be measured here, or None."""
        return None if programs.get(cls.name) else f"{cls.name} is not installed"

    def run(self, *words, cwd=None):
        """Runs a command that isn't measured."""
        command = [str(word) for word in words]
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()[-400:]}")
        return done.stdout

    def forget_cache(self):
        """Deletes what the tool keeps only to be faster."""
        shutil.rmtree(self.home / "cache")
        (self.home / "cache").mkdir()

    def restored(self, to, source):
        """Where `restore` has put the tree that was backed up from `source`."""
        return Path(f"{to}{source}")

    def restored_one(self, to, source):
        return self.restored(to, source) / ONE_FILE

    def requests(self, _output):
        """Read and write requests on the wire, as the tool tells in its output."""
        return None, None


class Sprat(Tool):
    """sprat with a container of the same size as the sshfs stack's."""

    name = "sprat"
    program = "sprat"
    container = "bench.luks"

    def __init__(self, *given):
        super().__init__(*given)
        self.environment |= {
            "SPRAT_STATE_DIR": str(self.home / "state"),
            "SPRAT_RUNTIME_DIR": str(self.home / "run"),
            "SPRAT_CACHE_DIR": str(self.home / "cache"),
            "SPRAT_CONFIG_DIR": str(self.home / "config"),
        }
        self.target = f"ssh://{HOST}{self.folder}/{self.container}"

    @classmethod
    def missing(cls, programs):
        return None if programs.get("sprat") else "sprat is not built"

    @staticmethod
    def version(programs):
        return output_of(programs["sprat"], "--version")

    def words(self, *words):
        return [
            self.programs["sprat"], "--json", "--quiet", "--ssh-command", self.ssh,
            "--key-file", self.home / "bench.key", *words,
        ]

    def prepare(self):
        self.run(*self.words("init", "--size", str(self.container_bytes), self.target))

    def backup(self, source):
        return self.words("backup", self.target, "--name", JOB, source)

    def restore(self, to, _source):
        return self.words("restore", self.target, JOB, "--to", to)

    def restore_one(self, to, source):
        return self.words("restore", self.target, f"{JOB}:{source}/{ONE_FILE}", "--to", to)

    def restored(self, to, source):
        # Below the folder, or with the source's whole path: as this version of sprat has it.
        whole = Path(f"{to}{source}")
        return whole if whole.exists() else to

    def restored_one(self, to, source):
        places = (Path(f"{to}{source}") / ONE_FILE, to / Path(ONE_FILE).name, to / ONE_FILE)
        return next((place for place in places if place.exists()), places[0])

    def requests(self, output):
        for line in reversed(output.splitlines()):
            try:
                told = json.loads(line)
            except ValueError:
                continue
            volumes = [session["volume"] for session in told.get("sessions", []) if session.get("volume")]
            volumes += [told["volume"]] if told.get("volume") else []
            if volumes:
                return tuple(sum(volume[name] for volume in volumes) for name in ("read_requests", "write_requests"))
        return None, None


class SpratLarge(Sprat):
    """sprat with the container of 5 TiB that `init` makes by itself: does memory stay the same?"""

    name = "sprat-5t"

    def __init__(self, programs, wire, home, folder, _container_bytes):
        super().__init__(programs, wire, home, folder, 5 << 40)


class SpratBtrfs(Sprat):
    """sprat with btrfs instead of ext4 in the container."""

    name = "sprat-btrfs"

    def prepare(self):
        self.run(*self.words("init", "--file-system", "btrfs", "--size", str(self.container_bytes), self.target))


class SshfsStack(Tool):
    """The seed's stack without its encryption: sshfs, loop, ext4, rsync --link-dest."""

    name = "sshfs-stack"
    has_cache = False
    script = Path(__file__).with_name("sshfs-stack")

    @classmethod
    def missing(cls, programs):
        return None if programs.get("sshfs") else "sshfs is not installed"

    @staticmethod
    def version(_programs):
        return f"{output_of('sshfs', '--version', begins='SSHFS')}, {output_of('rsync', '--version')}"

    def prepare(self):
        image = self.folder / "volume.img"
        with image.open("wb") as file:
            file.truncate(self.container_bytes)
        # The seed's recipe; on the server's disk directly, as nothing of it is measured.
        self.run("mkfs.ext4", "-q", "-m0", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)

    def words(self, *words):
        return [self.script, self.wire.config, HOST, self.folder, self.home / "mounts", *words]

    def backup(self, source):
        return self.words("backup", source)

    def restore(self, to, _source):
        return self.words("restore", to)

    def restore_one(self, to, _source):
        return self.words("restore-one", ONE_FILE, to)

    def restored(self, to, _source):
        return to

    def restored_one(self, to, _source):
        return to / Path(ONE_FILE).name


class Restic(Tool):
    """restic over SFTP, with its defaults."""

    name = "restic"

    def __init__(self, *given):
        super().__init__(*given)
        self.environment |= {
            "RESTIC_REPOSITORY": f"sftp:{HOST}:{self.folder}/repository",
            "RESTIC_PASSWORD": PASSPHRASE,
            "RESTIC_CACHE_DIR": str(self.home / "cache" / "restic"),
        }

    @staticmethod
    def version(programs):
        return output_of(programs["restic"], "version")

    def words(self, *words):
        return [self.programs["restic"], "-o", f"sftp.command={self.ssh} {HOST} -s sftp", *words]

    def prepare(self):
        self.run(*self.words("init"))

    def backup(self, source):
        return self.words("backup", "--quiet", source)

    def restore(self, to, _source):
        return self.words("restore", "latest", "--target", to)

    def restore_one(self, to, source):
        return self.words("restore", "latest", "--target", to, "--include", f"{source}/{ONE_FILE}")


class Borg(Tool):
    """borg with a key in the repository, and its other defaults."""

    name = "borg"

    def __init__(self, *given):
        super().__init__(*given)
        self.archives = 0
        self.environment |= {
            "BORG_REPO": f"ssh://{HOST}{self.folder}/repository",
            "BORG_RSH": self.ssh,
            "BORG_REMOTE_PATH": str(self.programs["borg"]),
            "BORG_PASSPHRASE": PASSPHRASE,
            "BORG_BASE_DIR": str(self.home),
            "BORG_CACHE_DIR": str(self.home / "cache" / "borg"),
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }

    @staticmethod
    def version(programs):
        return output_of(programs["borg"], "--version")

    def prepare(self):
        self.run(self.programs["borg"], "init", "--encryption", "repokey")

    def backup(self, source):
        self.archives += 1
        return [self.programs["borg"], "create", f"::{JOB}-{self.archives}", source]

    # borg extracts into the current folder.
    def restore(self, to, _source):
        return ["env", "-C", to, self.programs["borg"], "extract", f"::{JOB}-{self.archives}"]

    def restore_one(self, to, source):
        return [*self.restore(to, source), f"{source}/{ONE_FILE}".lstrip("/")]


class Bupstash(Tool):
    """bupstash with its defaults."""

    name = "bupstash"

    def __init__(self, *given):
        super().__init__(*given)
        self.items = 0
        program = self.programs["bupstash"]
        self.environment |= {
            "BUPSTASH_REPOSITORY_COMMAND": f"{self.ssh} {HOST} {program} serve {self.folder}/repository",
            "BUPSTASH_KEY": str(self.home / "bench.key"),
        }

    @staticmethod
    def version(programs):
        return output_of(programs["bupstash"], "--version")

    def prepare(self):
        self.run(self.programs["bupstash"], "new-key", "-o", self.home / "bench.key")
        self.run(self.programs["bupstash"], "init")

    def backup(self, source):
        self.items += 1
        return [self.programs["bupstash"], "put", "--quiet", f"name={JOB}-{self.items}", "::", source]

    def restore(self, to, _source):
        return [self.programs["bupstash"], "restore", "--quiet", "--into", to, f"name={JOB}-{self.items}"]

    def restore_one(self, to, _source):
        return [*self.restore(to, None)[:-1], "--pick", Path(ONE_FILE).parent, f"name={JOB}-{self.items}"]

    def restored(self, to, _source):
        return to

    def restored_one(self, to, _source):
        return to / Path(ONE_FILE).name


TOOLS = {tool.name: tool for tool in (Sprat, SshfsStack, Restic, Borg, Bupstash, SpratBtrfs, SpratLarge)}
DEFAULT_TOOLS = ("sprat", "sshfs-stack", "restic", "borg", "bupstash")


def find_programs(sprat, peers):
    """Where each program is: sprat as built, the others in the bench's own folder or the PATH."""
    programs = {name: shutil.which(name, path=f"{peers}:{os.environ['PATH']}") for name in
                ("sshfs", "restic", "borg", "bupstash")}
    programs["sprat"] = str(sprat) if sprat.is_file() else None
    return programs
