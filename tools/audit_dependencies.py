#!/usr/bin/env python
"""Asks whether vulnerabilities are known of the packages of this environment (`make audit`).

    python tools/audit_dependencies.py

pip-audit looks every installed version up in PyPI's advisories, or, where that service does not answer, in OSV's. The
exit status is 0 where nothing is known, 1 where something is, and 2 where it could not be found out: no answer is no
clean bill. What was not installed from an index (Detectron2, this project) has no entry there, and is named as not
looked up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NamedTuple

CLEAN, VULNERABLE, UNKNOWN = 0, 1, 2  # exit statuses
_SERVICES = ("pypi", "osv")


class Verdict(NamedTuple):
    """Exit status, and what to print: where it is UNKNOWN, one reason without a full stop."""

    status: int
    lines: list[str]


def outside_index() -> set[str]:
    """Installed packages that come from a folder or a repository, by name."""
    found = metadata.distributions()
    return {_canonical(one.metadata["Name"]) for one in found if one.read_text("direct_url.json") is not None}


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def verdict(report: dict[str, Any], outside: set[str]) -> Verdict:
    """What a report of pip-audit means.

    Args:
        report: its json: ``dependencies``, each with a name and either a version and ``vulns``, or a ``skip_reason``.
        outside: names that no index knows.
    """
    dependencies = report.get("dependencies", [])
    looked_up = [one for one in dependencies if "skip_reason" not in one]
    skipped = sorted(_canonical(one["name"]) for one in dependencies if "skip_reason" in one)
    unknown = [name for name in skipped if name not in outside]
    lines = []
    for one in looked_up:
        for known in one["vulns"]:
            mended = ", ".join(known.get("fix_versions", ())) or "no version yet"
            lines.append(f"{one['name']} {one['version']}: {known['id']}, mended in {mended}")
    if not lines and (unknown or not looked_up):
        return Verdict(UNKNOWN, [f"answers for {len(looked_up)} of {len(dependencies)} packages"])
    if skipped:
        lines.append(f"not looked up: {', '.join(skipped)}")
    if len(lines) > bool(skipped):
        return Verdict(VULNERABLE, lines)
    return Verdict(CLEAN, [*lines, f"audit: nothing is known of the {len(looked_up)} packages that were looked up."])


def audit(service: str) -> Verdict:
    """What one service says."""
    command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", service]
    command += ["--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        last = next(reversed(done.stderr.strip().splitlines()), f"exit status {done.returncode}")
        return Verdict(UNKNOWN, [f"cannot be asked ({last.partition(':')[0]})"])
    return verdict(report, outside_index())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    reasons = []
    for service in _SERVICES:
        found = audit(service)
        if found.status != UNKNOWN:
            print("\n".join(found.lines))
            return found.status
        reasons.append(f"{service} {found.lines[0]}")
    print(f"audit: could not be done: {'; '.join(reasons)}.", file=sys.stderr)
    return UNKNOWN


if __name__ == "__main__":
    sys.exit(main())
