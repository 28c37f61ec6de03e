"""Configs by name, from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2_mgd import configs
from d2_mgd.errors import UserError

NAME = "RetinaNet/mgd_levels_R_50_R_18_FPN_1x.yaml"


@pytest.mark.parametrize("name", [NAME, NAME.removesuffix(".yaml")])
def test_a_name_gives_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(configs.get(name)).is_file() and configs.get(name).endswith(NAME)
    assert configs.find(f"configs/{name}") == configs.find(name) == configs.get(name)
    assert NAME in configs.names()


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RetinaNet").mkdir()
    (tmp_path / NAME).touch()
    assert configs.find(NAME) == NAME
    assert configs.find("https://example.org/a.yaml") == "https://example.org/a.yaml"


@pytest.mark.parametrize(
    ("name", "near"),
    [("RetinaNet/mgd_level_R_50_R_18_FPN_1x", NAME), ("mgd_levels_R_50_R_18_FPN_1x", NAME), ("x", "Available: Base-")],
)
def test_the_nearest_names_of_a_wrong_one(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"there is no config {name}. .*{near}"):
        configs.find(name)
