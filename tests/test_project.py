"""What a user relies on around the code: how to install, what imports what, and that the documents tell the truth."""

from __future__ import annotations

import ast
import graphlib
import io
import json
import keyword
import os
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import d2_mgd
from d2_mgd._install import DETECTRON2_INSTALL, DETECTRON2_URL

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])


def _setup() -> dict:
    """The arguments that setup.py hands to setuptools."""
    code = (
        "import json, runpy, setuptools; said = {}; setuptools.setup = said.update;"
        "runpy.run_path('setup.py'); print(json.dumps(said, default=str))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return json.loads(out)


def _imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, at its top or inside its functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


def _python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


# --- installing ---


@pytest.mark.parametrize("name", ["docs/install.md", "Makefile"])
def test_the_line_that_installs_detectron2_is_the_same_everywhere(name: str) -> None:
    lines = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if "detectron2.git" in line]
    assert lines, f"{name} does not say how to install Detectron2"
    assert all(DETECTRON2_INSTALL in line for line in lines)


def test_setup_offers_the_same_detectron2_and_the_version_of_the_package() -> None:
    said = _setup()
    assert f"detectron2 @ {DETECTRON2_URL}" in said["extras_require"]["detectron2"]
    assert said["version"] == d2_mgd.__version__
    assert {"d2_mgd", "d2_mgd.matching", "d2_mgd.distill", "d2_mgd.detection"} <= set(said["packages"])


def test_every_direct_dependency_has_a_lower_bound_and_a_pin_within_it() -> None:
    said = _setup()
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {pin.name.lower(): next(iter(pin.specifier)) for pin in pins}
    assert all(pin.operator == "==" for pin in pinned.values())
    wanted = [*said["install_requires"], *(line for extra in said["extras_require"].values() for line in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.url:
            continue
        assert requirement.specifier, f"setup.py names no version of {requirement.name}"
        assert requirement.name.lower() in pinned, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pinned[requirement.name.lower()].version), (
            f"{requirement} excludes its pin"
        )


# --- importing ---


def test_importing_the_package_is_light() -> None:
    assert _python("import sys, d2_mgd; print(d2_mgd.__version__, 'torch' in sys.modules)").split() == [
        d2_mgd.__version__,
        "False",
    ]


def test_the_core_imports_without_detectron2() -> None:
    _python("import sys; sys.modules['detectron2'] = None; import d2_mgd.matching, d2_mgd.distill")


def test_detection_without_detectron2_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['detectron2'] = None; import d2_mgd.detection"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    assert DETECTRON2_INSTALL in run.stderr


def test_train_net_without_detectron2_is_one_sentence() -> None:
    code = "import runpy, sys; sys.modules['detectron2'] = None; runpy.run_path('tools/train_net.py')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stderr.strip() == f"train_net.py needs Detectron2, which is not installed: {DETECTRON2_INSTALL}"


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        (
            "d2_mgd/data",
            ["d2_mgd.matching", "d2_mgd.distill", "d2_mgd.detection", "classification", "detectron2", "torch"],
        ),
        ("d2_mgd/matching", ["d2_mgd.distill", "d2_mgd.detection", "classification", "detectron2", "torchvision"]),
        ("d2_mgd/distill", ["d2_mgd.detection", "classification", "detectron2"]),
        ("d2_mgd/export", ["d2_mgd.detection", "classification", "detectron2", "torchvision"]),
        ("d2_mgd/detection", ["classification", "tools"]),
        ("classification", ["d2_mgd.detection", "detectron2", "tools"]),
    ],
)
def test_imports_point_one_way(folder: str, forbidden: list[str]) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"there is no code in {folder}"
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in sorted(_imports(path))
        if any(name == part or name.startswith(f"{part}.") for part in forbidden)
    ]
    assert not wrong


# --- structure ---

CODE = ("d2_mgd", "classification", "tools", "examples", "benchmarks")
LONGEST = 400
SHARED = 6  # lines of one shape that no two places share


def _files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    """Dotted name; commands under tools/ and examples/ import each other without the folder's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] in ("tools", "examples") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path, modules: set[str]) -> set[str]:
    """The project's modules that a file imports, for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(
                whole if (whole := f"{node.module}.{alias.name}") in modules else node.module for alias in node.names
            )
    return (found & modules) - {_name(path)}


def test_there_is_no_import_circle() -> None:
    files = _files(*CODE)
    modules = {_name(path) for path in files}
    graph = {_name(path): _imported(path, modules) for path in files}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(f"import circle: {' <- '.join(error.args[1])}") from None


def test_no_file_is_two_ideas() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in _files(*CODE)
    }
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}


def _shapes(path: Path) -> list[tuple[int, str]]:
    """Number and shape of each line of code: names are n, numbers and strings v.

    Left out are what cannot be shared or need not be: imports, docstrings, closing brackets, and lines that only list
    (signatures, fields, arguments of a parser, rows of a table).
    """
    text = path.read_text(encoding="utf-8")
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            skipped.update(range(node.lineno - len(node.decorator_list), node.body[0].lineno))
        elif isinstance(node, (ast.Import, ast.ImportFrom, ast.AnnAssign)) or _is_parser_call(node):
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: dict[int, list[str]] = defaultdict(list)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            lines[token.start[0]].append(token.string if keyword.iskeyword(token.string) else "n")
        elif token.type in (tokenize.NUMBER, tokenize.STRING):
            lines[token.start[0]].append("v")
        elif token.type == tokenize.OP:
            lines[token.start[0]].append(token.string)
    found = []
    for number, parts in sorted(lines.items()):
        lists = parts[-1] == "," and set(parts) <= set("nv.,:=|[]()-") | {"None", "True", "False"}
        if number not in skipped and not lists and parts != ["v"] and not set(parts) <= set("()[]{},:"):
            found.append((number, " ".join(parts)))
    return found


def _is_parser_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"


def test_no_two_places_share_six_lines_of_one_shape() -> None:
    places = defaultdict(list)
    for path in _files("d2_mgd", "classification", "tools"):
        shapes = _shapes(path)
        for index in range(len(shapes) - SHARED + 1):
            window = tuple(shape for _, shape in shapes[index : index + SHARED])
            if len(set(window)) > SHARED // 2:  # a table's rows are alike
                places[window].append(f"{path.relative_to(ROOT)}:{shapes[index][0]}")
    assert sorted(where for where in places.values() if len(where) > 1) == []


# --- documents ---


def _anchor(heading: str) -> str:
    """The link target that GitHub and MkDocs make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(_anchor, headings), f"{target}: no such heading"


@pytest.mark.parametrize("name", ["Makefile", *(str(path.relative_to(ROOT)) for path in DOCUMENTS)])
def test_the_programs_that_are_named_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    called = re.findall(r"(?:python|\$\(PY\)|torchrun\S*(?: --\S+)*)\s+((?:[\w-]+/)+[\w-]+\.py)", text)
    called += [
        f"{module.replace('.', '/')}.py" for module in re.findall(r"-m ((?:benchmarks|classification)\.[\w.]+)", text)
    ]
    missing = [
        path for path in called if not (ROOT / path).exists() and not (ROOT / path[:-3] / "__main__.py").exists()
    ]
    assert not missing


@pytest.mark.parametrize("name", ["README.md", "docs/core.md"])
def test_the_examples_in_the_documentation_run(name: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    script = tmp_path / "example.py"  # one script: a block may use what the ones before it made
    script.write_text("\n".join(blocks), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "student.pth").exists() == (name == "docs/core.md")
