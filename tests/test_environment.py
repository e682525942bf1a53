"""pyproject.toml, requirements.lock and environment.yml say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
DIRECT = [
    Requirement(line)
    for line in [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]]
]
PLATFORMS = [("linux", "Linux", "x86_64"), ("linux", "Linux", "aarch64"), ("darwin", "Darwin", "arm64")]


def pins(python: str = "3.11", platform: tuple[str, str, str] = PLATFORMS[0]) -> dict[str, Version]:
    """What pip installs from requirements.lock on a platform: {name: version}."""
    where = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": platform[0],
        "platform_system": platform[1],
        "platform_machine": platform[2],
    }
    found: dict[str, Version] = {}
    for line in LOCK.splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(where):
            assert pin.name not in found, f"{pin.name} is pinned twice for python {python} on {platform}"
            (one,) = pin.specifier
            assert one.operator == "==", line
            found[canonicalize_name(pin.name)] = Version(one.version)
    return found


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda p: "-".join(p[1:]))
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_direct_dependency_is_locked_within_its_bounds(python: str, platform: tuple[str, str, str]) -> None:
    locked = pins(python, platform)
    for requirement in DIRECT:
        version = locked[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement} but the lock has {version}"


def test_torch_and_torchvision_are_a_pair() -> None:
    # torchvision 0.N goes with torch 2.(N - 15), since 0.15 with 2.0
    torch, torchvision = pins()["torch"], pins()["torchvision"]
    assert (torch.major, torchvision.major) == (2, 0)
    assert torch.minor == torchvision.minor - 15


def test_the_build_backend_is_locked_too() -> None:
    # the package is installed without build isolation, so nothing unpinned is fetched
    (backend,) = (Requirement(line) for line in PROJECT["build-system"]["requires"])
    assert pins()[backend.name] in backend.specifier


def test_the_lock_names_no_index_and_no_local_path() -> None:
    assert not re.search(r"https?:|file:|--|@|(?<!\w)/", LOCK)
    assert LOCK.splitlines()[1].strip() == "#    make lock"


def test_make_lock_holds_the_locked_pair() -> None:
    pair = re.search(r"^PAIR := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pair is not None
    assert pair.group(1).split() == [f"{name}=={pins()[name]}" for name in ("torch", "torchvision")]


def test_environment_yml_pins_the_direct_dependencies_as_the_lock_does() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    by_pip = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    python = next(e for e in conda["dependencies"] if str(e).startswith("python=")).removeprefix("python=")
    locked = pins(python)
    assert python in PROJECT["project"]["requires-python"]
    assert by_pip == [f"{r.name}=={locked[canonicalize_name(r.name)]}" for r in DIRECT]


def test_the_citation_names_this_version_and_every_system() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == re.search(r'__version__ = "(.*)"', (ROOT / "gcnet/__init__.py").read_text())[1]
    assert citation["license"] == PROJECT["project"]["license"]
    assert f"## {citation['version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert len(citation["references"]) == 4
