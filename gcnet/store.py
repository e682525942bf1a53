"""Compute once: results live in `runs/<kind>-<hash>/`, written atomically, checksummed, with their provenance."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import resource
import shutil
import subprocess
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gcnet import paths

log = logging.getLogger("gcnet")

_USED: Counter[str] = Counter()
_LOOKING: ContextVar[set[Path] | None] = ContextVar("looking", default=None)


class MissingError(LookupError):
    """What was asked for has not been computed; raised instead of computing it, inside `looking()`."""


@contextlib.contextmanager
def looking() -> Iterator[set[Path]]:
    """Inside, the store only finds: what would have to be computed raises MissingError. Yields the folders found."""
    token = _LOOKING.set(found := set())
    try:
        yield found
    finally:
        _LOOKING.reset(token)


def used_code() -> dict[str, int]:
    """{git sha of the code that computed them (with "+dirty"): how many store entries this process has read}."""
    return dict(sorted(_USED.items()))


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed over it only on success: readers see the old file or the new.

    On any error (disk full, Ctrl-C) the old file stays and the temporary one is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git() -> tuple[str, bool]:
    folder = Path(__file__).resolve().parent.parent

    def run(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        # Only code and parameters can change a result; results/ and prose may be dirty while a study runs.
        return run("rev-parse", "HEAD"), bool(run("status", "--porcelain", "--", "gcnet", "notebooks", "params"))
    except (OSError, subprocess.SubprocessError):
        return "unknown", False


# Asked for when the code is loaded: the files may change while a long run goes on.
_CODE = _git()


def provenance() -> dict[str, Any]:
    """What produced a result: code version, package versions, machine, peak memory of this process (MiB)."""
    import numpy
    import torch

    from gcnet import __version__

    sha, dirty = _CODE
    return {
        "git_sha": sha,
        "git_dirty": dirty,
        "versions": {
            "gcnet": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),  # importing it takes seconds
            "numpy": numpy.__version__,
        },
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


class Store:
    """Results by what they were computed from.

    An entry is a folder of files plus `entry.json`, which is written last: a folder without it does not count.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or paths.runs()

    @staticmethod
    def key(kind: str, inputs: dict[str, Any]) -> str:
        """`<kind>-<16 hex digits>` of the canonical JSON of the inputs; inputs that are None do not count.

        So a new parameter whose neutral value is None renames nothing that was computed before it.
        """
        present = {name: value for name, value in inputs.items() if value is not None}
        canonical = json.dumps({"kind": kind, **present}, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return f"{kind}-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"

    def find(self, kind: str, inputs: dict[str, Any], needs: Sequence[str] | None = None) -> Path | None:
        """The entry's folder if it is complete and its checksums hold, else None (a corrupt one is set aside).

        needs: only these files are asked for and checked, for entries that came without the large ones.
        """
        folder = self.root / self.key(kind, inputs)
        if not (folder / "entry.json").exists():
            return None
        try:
            entry = read_json(folder / "entry.json")
            made_by = entry["provenance"]["git_sha"] + ("+dirty" if entry["provenance"]["git_dirty"] else "")
            files = entry["files"]
            wanted = files if needs is None else needs
            if not all((folder / name).exists() for name in wanted) and entry.get("without"):
                return None  # unpacked without the files that are wanted now
            intact = all(sha256_file(folder / name) == files[name] for name in wanted)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            intact = False
        if intact:
            _USED[made_by] += 1
            if (seen := _LOOKING.get()) is not None:
                seen.add(folder)
            return folder
        log.warning("store entry %s does not match its checksums: set aside, computing again", folder)
        self._set_aside(folder)
        return None

    @staticmethod
    def _set_aside(folder: Path) -> None:
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            folder.rename(folder.with_name(f"{folder.name}.corrupt-{uuid.uuid4().hex[:6]}"))

    def once(
        self, kind: str, inputs: dict[str, Any], compute: Callable[[Path], None], needs: Sequence[str] | None = None
    ) -> Path:
        """The entry's folder, computed by `compute(folder)` only if no earlier run left it.

        `compute` writes its files into the folder it is given; the same (unfinished) folder is given again after an
        interruption, so what it keeps there (a checkpoint) serves to resume. Where two processes compute the same
        entry, the first to finish wins and both return the same files. needs: see `find`.
        """
        found = self.find(kind, inputs, needs)
        if found:
            return found
        if _LOOKING.get() is not None:
            raise MissingError(self.key(kind, inputs))
        final = self.root / self.key(kind, inputs)
        partial = self._claim(final.name)
        started = time.perf_counter()
        with _sign_of_life(partial / "owner"):
            compute(partial)
        for leftover in partial.glob(".*"):  # a temporary file of a run that was killed
            leftover.unlink()
        files = {p.name: sha256_file(p) for p in sorted(partial.iterdir()) if p.is_file() and p.name != "owner"}
        entry = {"kind": kind, "inputs": inputs, "files": files, "provenance": provenance()}
        entry["wall_s"] = round(time.perf_counter() - started, 3)
        write_json(partial / "entry.json", entry)
        if _owner(partial) != _me():
            raise OSError(f"another process took {partial.name} over meanwhile: run again to find or finish its result")
        with self._alone():  # in between, the folder would look as if nobody owned it
            if final.exists() and self.find(kind, inputs) is None and final.exists():
                self._set_aside(final)  # half there, or unpacked without its large files
            try:
                partial.rename(final)
                (final / "owner").unlink(missing_ok=True)
            except OSError:  # somebody else finished first (their folder is there, not empty): theirs is the result
                shutil.rmtree(partial, ignore_errors=True)
        result = self.find(kind, inputs)
        if result is None:
            raise OSError(f"store entry {final} could not be written")
        return result

    def _claim(self, name: str) -> Path:
        """An unfinished folder of this entry: one that a dead process left, or a new one."""
        unfinished = self.root / ".unfinished"
        unfinished.mkdir(parents=True, exist_ok=True)
        mine = unfinished / f"{name}.{uuid.uuid4().hex[:8]}"
        with self._alone():
            left = [folder for folder in sorted(unfinished.glob(f"{name}.*")) if not _alive(folder / "owner")]
            if left:
                left[0].rename(mine)
            else:
                mine.mkdir()
            _own(mine)
        return mine

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process looks at unfinished folders meanwhile; the lock goes with the process if that dies."""
        with (self.root / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _me() -> str:
    return f"{platform.node()} {os.getpid()}"


def _own(folder: Path) -> None:
    (folder / "owner").write_text(_me(), encoding="utf-8")


def _owner(folder: Path) -> str:
    try:
        return (folder / "owner").read_text(encoding="utf-8")
    except OSError:
        return ""


@contextlib.contextmanager
def _sign_of_life(owner: Path, every_s: float = 300) -> Iterator[None]:
    """Meanwhile the owner's file is touched, so that other hosts see that its process still runs."""
    over = threading.Event()

    def touch() -> None:
        while not over.wait(every_s):
            with contextlib.suppress(OSError):
                os.utime(owner)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _alive(owner: Path) -> bool:
    """Whether the process that claimed an unfinished folder still runs (on another host: for a day after its last
    sign of life)."""
    try:
        host, pid = owner.read_text(encoding="utf-8").split()
        if host != platform.node():
            return time.time() - owner.stat().st_mtime < 86400
        if int(pid) == os.getpid():
            return False
        os.kill(int(pid), 0)
        return True
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
