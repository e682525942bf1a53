"""What a study computed as one file: `results/<study>/store.zip`, to go on from on another machine.

The archive holds the trained dense networks, the connectivity, SNACS's scores and every small result (JSON), not the
fine-tuned networks and masks of the cells: those are computed again where something asks for them. The large files that
the archive of another study holds are left to it: the archive names that study, and both are unpacked.
"""

from __future__ import annotations

import json
import re
import zipfile
from itertools import chain
from pathlib import Path

from gcnet import paths
from gcnet.store import atomic_write
from gcnet.study import Study
from gcnet.sweep import entries, stages

WHOLE = ("dense", "connectivity", "snacs_scores", "snacs_mint")  # kinds that are packed with every file
LEFT_OUT = ("corrupted",)  # kinds that are made again in seconds from the images
_DATE = (1980, 1, 1, 0, 0, 0)  # the same content gives the same archive


def path(study: str) -> Path:
    return paths.results(study) / "store.zip"


def pack(study: Study) -> tuple[Path, list[str]]:
    """Write the archive of what a study's sweep has computed so far; (its path, what is missing in words).

    Raises ValueError when there is nothing at all.
    """
    of_stage = {name: [entries(task) for task in tasks] for name, tasks in stages(study)}
    open_tasks = {name: sum(not whole for _, whole in found) for name, found in of_stage.items()}
    missing = [f"{count} of {len(of_stage[name])} {name}" for name, count in open_tasks.items() if count]
    folders = sorted(set().union(*(found for found, _ in chain.from_iterable(of_stage.values()))))
    if not folders:
        raise ValueError(f"nothing of study '{study.study}' is computed yet: make sweep first")
    held, also = _held_elsewhere(study.study), set()
    with atomic_write(path(study.study)) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder in folders:
            entry = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
            if entry["kind"] in LEFT_OUT:
                continue
            if entry["kind"] in WHOLE and folder.name in held:
                also.add(held[folder.name])
                continue
            kept = [n for n in entry["files"] if entry["kind"] in WHOLE or n.endswith(".json")]
            entry["without"] = sorted(set(entry["files"]) - set(kept))
            _add(archive, f"{folder.name}/entry.json", (json.dumps(entry, indent=1, sort_keys=True) + "\n").encode())
            for name in kept:
                _add(archive, f"{folder.name}/{name}", (folder / name).read_bytes())
        archive.comment = " ".join(sorted(also)).encode()
    return path(study.study), missing


def _held_elsewhere(study: str) -> dict[str, str]:
    """{store entry: another study whose archive has it}"""
    held = {}
    for file in sorted(paths.results("").glob("*/store.zip")):
        if file != path(study):
            with zipfile.ZipFile(file) as archive:
                held |= {name.partition("/")[0]: file.parent.name for name in archive.namelist()}
    return held


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, _DATE), content, zipfile.ZIP_DEFLATED)


def unpack(study: str) -> tuple[int, int]:
    """Put the archive's entries into the store; (added, there before). An entry that is there is left alone.

    So are those of the archives that it names. Raises FileNotFoundError where one of the studies has no archive,
    ValueError for a damaged one.
    """
    added = there = 0
    wanted = [study]
    for name in wanted:  # which grows
        new, old, also = _unpack_one(name)
        added, there = added + new, there + old
        wanted += [other for other in also if other not in wanted]
    return added, there


def _unpack_one(study: str) -> tuple[int, int, list[str]]:
    """(added, there before, the studies whose archives it needs)"""
    if not path(study).exists():
        raise FileNotFoundError(f"study '{study}' has no {path(study).name} below results/{study}/")
    added = there = 0
    try:
        with zipfile.ZipFile(path(study)) as archive:
            also = archive.comment.decode().split()
            folders: dict[str, list[str]] = {}
            for name in archive.namelist():
                if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
                    raise ValueError(f"{path(study)} holds '{name}', which is no part of a store entry")
                folder, _, file = name.partition("/")
                folders.setdefault(folder, []).append(file)
            for folder, files in folders.items():
                if (paths.runs() / folder / "entry.json").exists():
                    there += 1
                    continue
                # entry.json last: a folder without it does not count
                for file in sorted(files, key="entry.json".__eq__):
                    with atomic_write(paths.runs() / folder / file) as temporary:
                        temporary.write_bytes(archive.read(f"{folder}/{file}"))
                added += 1
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path(study)} is damaged ({error}): git restores it") from None
    return added, there, also
