"""Looks for known vulnerabilities in what constraints.txt pins.

    python .ci/audit.py PIP_AUDIT                # asks PyPI, through pip-audit
    python .ci/audit.py PIP_AUDIT --database DB  # reads OSV records: a checkout of pypa/advisory-database, or the `all.zip` of OSV for PyPI

Exit code 0: every pin was looked up and none is affected. 1: some are. 2: some could not be looked up, so nothing is proved.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parents[1]
_FEWEST = 1000  # records of a whole database; fewer are a part of it, which proves nothing


class Unknown(Exception):
    """What could not be looked up, and why."""


def pins(path: Path) -> dict[str, str]:
    """The versions of a constraints file, by canonical name."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def ask_pypi(pip_audit: str, constraints: Path) -> dict[str, set[str]]:
    """Vulnerabilities by package, from PyPI.

    Raises:
        Unknown: PyPI does not answer, or does not know a pin.
    """
    command = [pip_audit, "-r", str(constraints), "--no-deps", "--disable-pip", "-s", "pypi", "-f", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        answered = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        lines = done.stderr.strip().splitlines()
        raise Unknown(f"pip-audit ended with exit code {done.returncode}: {lines[-1] if lines else 'it printed no reason'}") from None
    if skipped := [one["name"] for one in answered if "skip_reason" in one]:
        raise Unknown(f"the vulnerability service of PyPI answers for {len(answered) - len(skipped)} of {len(answered)} packages.")
    return {one["name"]: {vulnerability["id"] for vulnerability in one["vulns"]} for one in answered}


def read_database(database: Path, pinned: dict[str, str]) -> dict[str, set[str]]:
    """Vulnerabilities by package, from OSV records in a folder or an archive.

    Raises:
        Unknown: the database is none, or a part of one.
    """
    found: dict[str, set[str]] = {name: set() for name in pinned}
    count = 0
    for record in records(database):
        count += 1
        if record.get("withdrawn"):
            continue
        for affected in record.get("affected", []):
            package = affected.get("package", {})
            name = canonicalize_name(package.get("name", ""))
            if package.get("ecosystem") == "PyPI" and name in pinned and is_affected(pinned[name], affected):
                found[name].add(record["id"])
    if count < _FEWEST:
        raise Unknown(f"{database} has {count} OSV records, which is no whole database.")
    return found


def records(database: Path) -> Iterator[dict[str, Any]]:
    if database.is_dir():
        for path in sorted(database.rglob("*")):
            if path.suffix in (".yaml", ".json"):
                yield _record(path.name, path.read_bytes())
    elif zipfile.is_zipfile(database):
        with zipfile.ZipFile(database) as archive:
            for name in archive.namelist():
                if name.endswith((".yaml", ".json")):
                    yield _record(name, archive.read(name))


def _record(name: str, data: bytes) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    record = json.loads(data) if name.endswith(".json") else yaml.load(data, loader)
    return record if isinstance(record, dict) else {}


def is_affected(version: str, affected: dict[str, Any]) -> bool:
    """Whether a version is listed, or lies in a range of the record: from "introduced" on, until "fixed" or including "last_affected"."""
    if version in affected.get("versions", []):
        return True
    asked = Version(version)
    for span in affected.get("ranges", []):
        if span.get("type") != "ECOSYSTEM":
            continue
        inside = False
        events = [(_version(limit), kind) for event in span["events"] for kind, limit in event.items()]
        for limit, kind in sorted(events):
            if kind == "introduced" and asked >= limit:
                inside = True
            elif (kind == "fixed" and asked >= limit) or (kind == "last_affected" and asked > limit):
                inside = False
        if inside:
            return True
    return False


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        return Version("0")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("pip_audit")
    parser.add_argument("--database", type=Path)
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    words = parser.parse_args()
    pinned = pins(words.constraints)
    try:
        found = read_database(words.database, pinned) if words.database else ask_pypi(words.pip_audit, words.constraints)
    except Unknown as error:
        print(f"The audit proves nothing: {error} `make audit DATABASE=PATH` reads a database from the disk.", file=sys.stderr)
        return 2
    affected = {name: sorted(ids) for name, ids in found.items() if ids}
    for name, ids in affected.items():
        print(f"{name} {pinned[canonicalize_name(name)]}: {', '.join(ids)}")
    print(f"{len(found)} packages, {len(affected)} with known vulnerabilities")
    return bool(affected)


if __name__ == "__main__":
    sys.exit(main())
