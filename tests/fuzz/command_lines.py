"""Targets for what users type: KEY VALUE overrides, config files, and the options of the programs."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from classification.options import parse_base, parse_mgd
from d2_mgd.errors import UserError
from tests.fuzz.target import Target, check_sentence

ROOT = Path(__file__).resolve().parents[2]
# the tiny detectors are those of the tests
sys.path[:0] = [path for path in (str(ROOT / "tools"), str(ROOT / "tests" / "detection")) if path not in sys.path]

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
_WORDS = st.one_of(
    st.sampled_from(
        ["0", "1", "-1", "2", "1e-9", "nan", "inf", "-inf", "True", "None", "", " ", "[]", "()", "{}", "[1", "'", "\0"]
    ),
    st.sampled_from(["mse", "amp", "cosine", "pass", "online", "even", "gn", "res4", "p3", "zoo", "untrained", "kd"]),
    st.sampled_from(
        ["['p3', 'res4']", "[1.0, 'x']", "[[1]]", "[None]", "(3,)", "['p3', 'p3']", "{'a': 1}", "[10**400]"]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.recursive(
        st.one_of(st.integers(), st.floats(), st.text(max_size=3), st.booleans(), st.none()),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=4,
    ).map(repr),
    _TEXT,
)


# --- classification ---


@cache
def _options(parse: Callable[[Sequence[str]], Any]) -> list[str]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        parse(["--help"])
    words = (word.strip("[],=") for word in shown.getvalue().split())
    return sorted({word for word in words if word.startswith("-") and word not in ("-h", "--help", "-", "--")})


@st.composite
def _classification(draw: st.DrawFn) -> tuple[Callable[[Sequence[str]], Any], list[str]]:
    parse = draw(st.sampled_from([parse_base, parse_mgd]))
    words = ["DATA"] if draw(st.integers(0, 9)) else []
    for _ in range(draw(st.integers(0, 4))):
        words.append(draw(st.one_of(st.sampled_from(_options(parse)), _TEXT.map(lambda text: f"--{text}"))))
        words += draw(st.lists(_WORDS, max_size=2))
    return parse, words


def _check_classification(value: tuple[Callable[[Sequence[str]], Any], list[str]]) -> None:
    parse, words = value
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            parse(words)
    except UserError as error:
        check_sentence(str(error))
    except SystemExit as error:
        assert error.code == 0 and any(word.startswith(("-h", "--h")) for word in words)


# --- detection: the MGD node ---


@cache
def _keys() -> list[str]:
    from detectron2.config import CfgNode, get_cfg

    from d2_mgd.detection import add_mgd_config

    def leaves(node: CfgNode, prefix: str) -> Iterator[str]:
        for key, value in node.items():
            if isinstance(value, CfgNode):
                yield from leaves(value, f"{prefix}.{key}")
            else:
                yield f"{prefix}.{key}"

    cfg = get_cfg()
    add_mgd_config(cfg)
    return sorted(leaves(cfg.MGD, "MGD"))


@st.composite
def _overrides(draw: st.DrawFn) -> list[str]:
    words = []
    for _ in range(draw(st.integers(1, 3))):
        words += [draw(st.sampled_from(_keys())), draw(_WORDS)]
    return words


@cache
def _distilled() -> Any:
    from tiny_detectors import distilled_config  # type: ignore[import-not-found]

    return distilled_config()


def _check_overrides(words: list[str]) -> None:
    """They are accepted, or one sentence names one of the keys."""
    from d2_mgd.detection.config_checks import validate_config
    from d2_mgd.detection.config_files import merge_overrides

    cfg = _distilled().clone()
    try:
        merge_overrides(cfg, words, what="KEY VALUE overrides")
        validate_config(cfg)
    except UserError as error:
        check_sentence(str(error))
        names = {*words[::2], *(key.rpartition(".")[0] for key in words[::2])} - {"MGD"}
        names |= {"MGD.FEATURES", "MGD.WEIGHTS"} if "MGD.FEATURES" in names else set()
        assert any(name in str(error) for name in names), f"names none of {sorted(names)}: {error}"


# --- detection: config files and train_net.py ---

_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
_NODES = st.sampled_from(["MODEL", "MGD", "SOLVER", "VERSION", "_BASE_", "MGD.TEACHER", "INPUT", "OUTPUT_DIR", "X"])
_YAML = st.one_of(
    st.dictionaries(_NODES, _VALUES, max_size=3).map(yaml.safe_dump),
    _VALUES.map(yaml.safe_dump),
    _TEXT,
    st.sampled_from(
        [
            "",
            "# nothing",
            "_BASE_: config.yaml",
            "_BASE_: 3",
            "_BASE_: []",
            "- 1",
            "VERSION: 1\nMODEL: {}",
            "VERSION: x",
        ]
    ),
    st.sampled_from(["!!python/object/apply:os.getcwd []", "MODEL: !!python/name:os.system ''", "a: &a [*a]"]),
    st.binary(max_size=12),
).map(lambda text: text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))


def _check_config_file(content: bytes) -> None:
    """As --config-file and as the teacher's config: accepted, or one sentence that names the file."""
    import train_net

    from d2_mgd.detection.config import teacher_config

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(content)
        cfg = _distilled().clone()
        cfg.MGD.TEACHER.CONFIG_FILE, cfg.MGD.TEACHER.OPTS = str(path), []
        for read in (
            lambda: teacher_config(cfg),
            lambda: train_net.build_config(train_net.parser().parse_args(["--config-file", str(path), "--eval-only"])),
        ):
            try:
                read()
            except UserError as error:
                check_sentence(str(error))
                assert "config.yaml" in str(error)


_FLAGS = [
    "--resume", "--eval-only", "--eval-teacher", "--num-gpus", "--num-machines", "--machine-rank", "--dist-url",
    "--config-file", "--register-coco", "--trust-weights", "--with-baseline", "--no-such-flag",
]  # fmt: skip


@st.composite
def _train_net(draw: st.DrawFn) -> list[str]:
    """Words that never train: the last of them name data sets that there are not."""
    words = []
    for _ in range(draw(st.integers(0, 3))):
        words.append(draw(st.sampled_from(_FLAGS)))
        words += draw(st.lists(_WORDS, max_size=3))
    keys = st.one_of(
        st.sampled_from(_keys()),
        st.sampled_from(["MODEL.DEVICE", "SOLVER.MAX_ITER", "MODEL", "MGD", "SOLVER", "X", "_BASE_", ""]),
    )
    for _ in range(draw(st.integers(0, 2))):
        words += [draw(keys), draw(_WORDS)][: draw(st.integers(1, 2))]
    return [*words, "DATASETS.TRAIN", "('unheard_of',)", "DATASETS.TEST", "('unheard_of',)"]


def _check_train_net(words: list[str]) -> None:
    """Ends with status 2 and one sentence after at most argparse's usage."""
    import train_net

    if _would_wait(words):
        return
    shown = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(shown), _working_directory(folder):
        try:
            train_net.main(words)
            raise AssertionError("it ended as if all were well")
        except SystemExit as end:
            assert end.code == 2, f"status {end.code}"
    errors = [line for line in shown.getvalue().splitlines() if "error:" in line]
    assert len(errors) == 1, f"{len(errors)} sentences: {shown.getvalue()!r}"
    check_sentence(errors[0])


def _would_wait(words: list[str]) -> bool:
    """Several machines, which wait for one another, and several processes, which take seconds to start."""
    from train_net import parser

    with contextlib.redirect_stderr(io.StringIO()):
        try:
            args = parser().parse_args(words)
        except SystemExit:
            return False
    return args.num_gpus * args.num_machines > 1 and (args.num_machines == 1 or args.dist_url != "auto")


@contextlib.contextmanager
def _working_directory(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _check_dataset(words: list[str]) -> None:
    """tools/check_dataset.py: some status, at most one sentence where there is nothing to report."""
    import check_dataset

    out, err = io.StringIO(), io.StringIO()
    shown = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with tempfile.TemporaryDirectory() as folder, shown[0], shown[1], _working_directory(folder):
        try:
            status = check_dataset.main(words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    assert status in (0, 1, 2)
    errors = [line for line in (out.getvalue() + err.getvalue()).splitlines() if "error:" in line]
    assert status == 0 or errors
    for line in errors:
        check_sentence(line)


_CHECKED = st.lists(
    st.one_of(st.sampled_from(["--workers", "--config-file", "--register-coco", "--allow-outside-root"]), _WORDS),
    max_size=6,
).filter(lambda words: not any(word.startswith(("-h", "--h")) for word in words))

TARGETS = [
    Target("classification's options", st.deferred(_classification), _check_classification, cost=2),
    Target("check_dataset.py's options", _CHECKED, _check_dataset, cost=2),
]
DETECTRON2_TARGETS = [
    Target("config: MGD overrides", st.deferred(_overrides), _check_overrides, cost=8),
    Target("config: files", _YAML, _check_config_file, cost=8),
    Target("train_net.py's arguments", st.deferred(_train_net), _check_train_net, cost=16),
]
