"""Compute once, never read half a result, continue after an interruption."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcnet import paths, store
from gcnet.store import Store, atomic_write, read_json, write_json

INPUTS = {"seed": 0, "width": 0.25}
FORK = multiprocessing.get_context("fork")  # the children touch files alone


def writes(text: str, calls: list[str] | None = None) -> Callable[[Path], None]:
    def compute(folder: Path) -> None:
        if calls is not None:
            calls.append(text)
        (folder / "result.txt").write_text(text, encoding="utf-8")

    return compute


def never(folder: Path) -> None:
    raise AssertionError("this result is in the store already")


def text(folder: Path) -> str:
    return (folder / "result.txt").read_text(encoding="utf-8")


# --- atomic writes ---------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.txt"
    for content in ("old", "new"):
        with atomic_write(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
            assert path.exists() == (content == "new")  # not yet, or still the old one
            assert temporary.suffix == ".txt" and temporary.parent == path.parent
        assert path.read_text(encoding="utf-8") == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_stays_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(type(error)), atomic_write(path) as temporary:
        temporary.write_text('{"half', encoding="utf-8")
        raise error
    assert read_json(path) == {"old": 1} and list(tmp_path.glob("*a.json*")) == [path]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".a.json")]


def test_a_disk_that_is_full_only_when_synchronising(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.json"
    write_json(path, 1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, 2)
    assert read_json(path) == 1 and [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.json"]


# --- keys -----------------------------------------------------------------------------------------------------------


def test_the_key_is_frozen() -> None:
    # If this fails, everything that was ever computed would be computed again.
    assert Store.key("dense", {"dataset": "digits", "seed": 0, "width": 0.25, "tap": None}) == GOLDEN_KEY
    assert Store.key("cell", {"sparsities": [0.8, 0.95], "name": "é", "flip": True}) == GOLDEN_KEY_2


GOLDEN_KEY = "dense-a75af64d1cd57f54"
GOLDEN_KEY_2 = "cell-3254e57c8d03af60"

values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
inputs = st.dictionaries(st.text(min_size=1).filter(lambda name: name != "kind"), values)


@given(inputs, st.text(min_size=1))
def test_none_does_not_count_and_order_neither(given: dict, name: str) -> None:
    key = Store.key("dense", given)
    assert Store.key("dense", dict(reversed(given.items()))) == key
    if name not in given and name != "kind":
        assert Store.key("dense", {**given, name: None}) == key
        assert Store.key("dense", {**given, name: 0}) != key
    assert Store.key("cell", given).split("-")[1] != key.split("-")[1]


def test_a_key_of_a_value_that_is_no_json_is_refused() -> None:
    with pytest.raises(ValueError):
        Store.key("dense", {"lr": float("nan")})
    with pytest.raises(TypeError):
        Store.key("dense", {"path": Path("x")})


# --- once -----------------------------------------------------------------------------------------------------------


def test_computed_once_and_found_again() -> None:
    calls: list[str] = []
    first = Store().once("dense", INPUTS, writes("a", calls))
    assert Store().once("dense", dict(reversed(INPUTS.items())), writes("b", calls)) == first
    assert calls == ["a"] and text(first) == "a"
    assert first == paths.runs() / Store.key("dense", INPUTS) == Store().find("dense", INPUTS)
    assert text(Store().once("dense", {**INPUTS, "seed": 1}, writes("c", calls))) == "c"
    assert text(Store().once("cell", INPUTS, writes("d", calls))) == "d"


def test_an_entry_knows_where_it_is_from() -> None:
    folder = Store().once("dense", INPUTS, writes("a"))
    entry = read_json(folder / "entry.json")
    assert entry["inputs"] == INPUTS and entry["kind"] == "dense" and entry["wall_s"] >= 0
    assert entry["files"] == {"result.txt": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"}
    assert {"git_sha", "git_dirty", "versions", "platform", "device", "peak_memory_mib"} <= set(entry["provenance"])
    assert {"torch", "torchvision", "numpy", "python", "gcnet"} <= set(entry["provenance"]["versions"])
    assert sorted(p.name for p in folder.iterdir()) == ["entry.json", "result.txt"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_an_interruption_leaves_no_entry_and_what_was_kept_serves_to_resume(error: BaseException) -> None:
    def stops(folder: Path) -> None:
        (folder / "checkpoint").write_text("halfway", encoding="utf-8")
        raise error

    def goes_on(folder: Path) -> None:
        assert (folder / "checkpoint").read_text(encoding="utf-8") == "halfway"
        (folder / "checkpoint").unlink()
        writes("whole")(folder)

    with pytest.raises(type(error)):
        Store().once("dense", INPUTS, stops)
    assert Store().find("dense", INPUTS) is None
    assert not (paths.runs() / Store.key("dense", INPUTS)).exists()
    folder = Store().once("dense", INPUTS, goes_on)
    assert text(folder) == "whole" and sorted(p.name for p in folder.iterdir()) == ["entry.json", "result.txt"]
    assert list((paths.runs() / ".unfinished").glob("*-*")) == []


def test_the_unfinished_folder_of_another_entry_is_not_taken() -> None:
    def stops(folder: Path) -> None:
        (folder / "checkpoint").write_text("of seed 0", encoding="utf-8")
        raise KeyboardInterrupt

    def looks(folder: Path) -> None:
        assert not (folder / "checkpoint").exists()
        writes("b")(folder)

    with pytest.raises(KeyboardInterrupt):
        Store().once("dense", INPUTS, stops)
    Store().once("dense", {**INPUTS, "seed": 1}, looks)


def _damage(folder: Path, how: str) -> None:
    result, entry = folder / "result.txt", folder / "entry.json"
    if how == "changed":
        result.write_text("b", encoding="utf-8")
    elif how == "truncated":
        result.write_text("", encoding="utf-8")
    elif how == "missing":
        result.unlink()
    elif how == "entry truncated":
        entry.write_bytes(entry.read_bytes()[:-40])
    elif how == "entry empty":
        entry.write_bytes(b"")
    elif how == "entry without files":
        entry.write_text("{}", encoding="utf-8")
    elif how == "entry of zeros":
        entry.write_bytes(bytes(200))
    elif how == "entry not text":
        entry.write_bytes(b"\xff\xfe\xff" * 50)
    elif how == "entry is a list":
        entry.write_text("[]", encoding="utf-8")
    elif how == "entry null":
        entry.write_text("null", encoding="utf-8")
    elif how == "entry without provenance":
        entry.write_text(json.dumps({"files": read_json(entry)["files"]}), encoding="utf-8")
    elif how == "files is a list":
        entry.write_text('{"files": ["result.txt"]}', encoding="utf-8")


DAMAGES = [
    "changed", "truncated", "missing", "entry truncated", "entry empty", "entry without files", "entry of zeros",
    "entry not text", "entry is a list", "entry null", "entry without provenance", "files is a list",
]  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_entry_is_set_aside_and_computed_again(how: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = Store().once("dense", INPUTS, writes("a"))
    _damage(folder, how)
    again = Store().once("dense", INPUTS, writes("again"))
    assert again == folder and text(again) == "again"
    assert len(list(paths.runs().glob(f"{folder.name}.corrupt-*"))) == 1
    assert folder.name in caplog.text and "computing again" in caplog.text
    assert Store().once("dense", INPUTS, never) == folder


def test_a_folder_without_its_entry_does_not_count() -> None:
    folder = Store().once("dense", INPUTS, writes("a"))
    (folder / "entry.json").unlink()
    assert Store().find("dense", INPUTS) is None
    assert text(Store().once("dense", INPUTS, writes("again"))) == "again"


def test_the_store_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store().once("dense", INPUTS, writes("a"))
    shutil.move(paths.runs(), tmp_path / "elsewhere")
    monkeypatch.setenv("GCNET_RUNS", str(tmp_path / "elsewhere"))
    assert text(Store().once("dense", INPUTS, never)) == "a"


def test_a_temporary_file_of_a_killed_run_is_no_part_of_the_result() -> None:
    def killed(folder: Path) -> None:
        (folder / ".result.txt.0123abcd.txt").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store().once("dense", INPUTS, killed)
    folder = Store().once("dense", INPUTS, writes("a"))
    assert list(read_json(folder / "entry.json")["files"]) == ["result.txt"]


# --- several processes ----------------------------------------------------------------------------------------------


def _provenance() -> dict:
    return {"git_sha": "0" * 40, "git_dirty": False}  # the packages' versions would take seconds to import


def _racer(name: str, gate: multiprocessing.Barrier, results: multiprocessing.Queue) -> None:
    store.provenance = _provenance

    def compute(folder: Path) -> None:
        gate.wait(60)  # both are in the middle of it
        writes(name)(folder)

    results.put(text(Store().once("dense", INPUTS, compute)))


def test_two_processes_that_compute_the_same_return_the_same() -> None:
    gate, results = FORK.Barrier(2), FORK.Queue()
    racers = [FORK.Process(target=_racer, args=(name, gate, results)) for name in ("left", "right")]
    for racer in racers:
        racer.start()
    found = [results.get(timeout=20) for _ in racers]
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0, 0]
    assert found[0] == found[1] == text(Store().once("dense", INPUTS, never))
    assert list((paths.runs() / ".unfinished").glob("*-*")) == []
    assert not list(paths.runs().glob("*.corrupt-*"))


def _slow_disk() -> None:
    """Every small file takes a moment to be written, so that whoever looks in between sees that it is not there."""
    write = Path.write_text

    def slowly(path: Path, *what: object, **how: object) -> int:
        time.sleep(0.002)
        return write(path, *what, **how)

    Path.write_text = slowly


def _crowd(gate: multiprocessing.Barrier, count: int) -> None:
    store.provenance = _provenance
    _slow_disk()
    try:
        for number in range(count):
            gate.wait(60)
            assert text(Store().once("dense", {"number": number}, writes(str(number)))) == str(number)
    except BaseException:
        gate.abort()  # the others need not wait
        raise


def test_a_crowd_that_starts_at_the_same_moment() -> None:
    gate = FORK.Barrier(4)
    crowd = [FORK.Process(target=_crowd, args=(gate, 40)) for _ in range(4)]
    for process in crowd:
        process.start()
    for process in crowd:
        process.join(100)
    assert [process.exitcode for process in crowd] == [0] * 4
    assert len(list(paths.runs().glob("dense-*"))) == 40 and list((paths.runs() / ".unfinished").glob("*-*")) == []


def _killed(root: str) -> None:
    def compute(folder: Path) -> None:
        (folder / "checkpoint").write_text("halfway", encoding="utf-8")
        os.kill(os.getpid(), signal.SIGKILL)

    Store(Path(root)).once("dense", INPUTS, compute)


def test_what_a_killed_process_left_is_continued() -> None:
    process = FORK.Process(target=_killed, args=(str(paths.runs()),))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and Store().find("dense", INPUTS) is None

    def goes_on(folder: Path) -> None:
        assert (folder / "checkpoint").read_text(encoding="utf-8") == "halfway"
        writes("whole")(folder)

    assert text(Store().once("dense", INPUTS, goes_on)) == "whole"


def test_the_unfinished_folder_of_a_living_process_is_left_to_it() -> None:
    def goes_on(folder: Path) -> None:
        assert not (folder / "theirs").exists()
        writes("mine")(folder)

    theirs = paths.runs() / ".unfinished" / f"{Store.key('dense', INPUTS)}.00000000"
    theirs.mkdir(parents=True)
    (theirs / "theirs").write_text("at work", encoding="utf-8")
    (theirs / "owner").write_text(f"{store.platform.node()} {os.getppid()}", encoding="utf-8")
    assert text(Store().once("dense", INPUTS, goes_on)) == "mine"
    assert (theirs / "theirs").exists()


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    value = {"b": [1, 0.1, None, True], "a": {"ü": "é"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert list(json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))) == ["a", "b"]


def test_an_entry_that_another_process_took_over_is_not_published(tmp_path: Path) -> None:
    def robbed(folder: Path) -> None:
        (folder / "early.txt").write_text("early", encoding="utf-8")
        folder.rename(folder.with_name("taken"))  # by a host that saw no sign of life
        folder.mkdir()
        (folder / "late.txt").write_text("late", encoding="utf-8")

    with pytest.raises(OSError, match=r"another process took .* over"):
        Store(tmp_path).once("robbed", INPUTS, robbed)
    assert Store(tmp_path).find("robbed", INPUTS) is None


def test_a_long_computation_gives_signs_of_life(tmp_path: Path) -> None:
    owner = tmp_path / "owner"
    owner.write_text("host 1", encoding="utf-8")
    os.utime(owner, (0, 0))
    with store._sign_of_life(owner, every_s=0.01):
        until = time.monotonic() + 10
        while owner.stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.01)
    assert time.time() - owner.stat().st_mtime < 60


def test_a_process_on_another_host_is_alive_for_a_day_after_its_last_sign(tmp_path: Path) -> None:
    owner = tmp_path / "owner"
    owner.write_text("another-host 1", encoding="utf-8")
    assert store._alive(owner)
    os.utime(owner, (time.time() - 90000, time.time() - 90000))
    assert not store._alive(owner)
