"""The lock holds all that pyproject.toml asks for, with hashes, and nothing of the machine that made it."""

import re
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = [ROOT / "requirements" / name for name in ("ci.lock", "tools.lock")]
HERE = {"python_version": "3.11", "sys_platform": "linux", "platform_machine": "x86_64"}


def locked(path: Path) -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in re.findall(r"^(\S+?)==(\S+)", path.read_text(), re.M)}


def asked(extra: str) -> list[Requirement]:
    """Requirements of an extra, with those of the extras that it names."""
    found = []
    for text in requires("unflaw") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate(HERE | {"extra": extra}):
            continue
        if requirement.name == "unflaw":
            found += [inner for name in requirement.extras for inner in asked(name)]
        else:
            found.append(requirement)
    return found


def test_the_lock_has_all_that_is_asked_for():
    versions = locked(LOCKS[0])
    wanted = asked("dev")
    wanted += [Requirement(line) for line in (ROOT / "requirements/ci.in").read_text().splitlines() if line[:1] != "#"]
    assert len(wanted) > 30
    for requirement in wanted:
        version = versions.get(canonicalize_name(requirement.name))
        assert version and requirement.specifier.contains(version), f"{requirement} is not locked; run make lock"


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_everything_locked_has_a_hash_and_nothing_tells_of_a_machine(path):
    text = path.read_text()
    entries = re.split(r"\n(?=\S)", re.sub(r"^\s*#.*\n", "", text, flags=re.M).strip())
    assert len(entries) > 20
    for entry in entries:
        assert re.match(
            r"[\w.\-]+(\[[\w,]+\])?==[^\s\\]+( ;[^\\]*)? \\\n( +--hash=sha256:[0-9a-f]{64}( \\\n|$))+$", entry
        ), entry
    assert not re.search(r"://|--index|--find-links|file:|(^|\s)/", text)
