"""A service that does not answer is no clean bill."""

from __future__ import annotations

from typing import Any

from audit_dependencies import CLEAN, UNKNOWN, VULNERABLE, outside_index, verdict

FINE = {"name": "numpy", "version": "2.0", "vulns": []}
BAD = {"name": "pillow", "version": "1.0", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1"]}, {"id": "CVE-2"}]}


def skipped(name: str) -> dict[str, Any]:
    return {"name": name, "skip_reason": "not found"}


def test_nothing_known() -> None:
    found = verdict({"dependencies": [FINE, skipped("d2_mgd")]}, {"d2-mgd"})
    assert found.status == CLEAN
    assert found.lines == [
        "not looked up: d2-mgd",
        "audit: nothing is known of the 1 packages that were looked up.",
    ]


def test_something_known() -> None:
    found = verdict({"dependencies": [FINE, BAD, skipped("torch")]}, set())
    assert found.status == VULNERABLE
    assert found.lines[0] == "pillow 1.0: CVE-1, mended in 1.1"
    assert found.lines[1] == "pillow 1.0: CVE-2, mended in no version yet"


def test_no_answer() -> None:
    for dependencies in ([], [skipped("numpy")], [FINE, skipped("torch")], [skipped("d2_mgd")]):
        found = verdict({"dependencies": dependencies}, {"d2-mgd"})
        assert found.status == UNKNOWN
        assert found.lines == [f"answers for {FINE in dependencies:d} of {len(dependencies)} packages"]


def test_what_was_not_installed_from_an_index_is_known() -> None:
    assert "numpy" not in outside_index()
