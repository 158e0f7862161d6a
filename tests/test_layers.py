"""The house's order: who may import whom, and how large and how documented files may be."""

from __future__ import annotations

import ast
import statistics

from tests.conftest import REPO

PACKAGE = REPO / "proper_ds"
BELOW = {
    "data": {"data"},
    "model": {"model"},
    "observe": {"observe"},
    "store": {"store", "model"},
    "distributed": {"distributed", "model", "training"},  # training: only its configuration, see below
    "training": {"training", "distributed", "store", "observe", "model", "data"},
    "evaluation": {"evaluation", "training", "store", "observe", "model", "data"},
    "erasure": {"erasure", "evaluation", "training", "store", "model", "data"},
    "fleet": {"fleet", "distributed", "observe", "training"},
    "pipeline": None,
    "study": None,
    "bench": None,
    "cli": None,
}
ROOT = {"errors", "files", "section", "run_folder"}
PURE_CONFIG = {f"proper_ds.{name}.config" for name in BELOW}
DECLARATIVE = {"config", "checks", "__main__", "__init__"}  # the configuration of the whole, and the entry point


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imports_of(tree, runtime_only=True):
    """Absolute names imported anywhere in a module, type-checking blocks left out."""
    skipped = set()
    if runtime_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
                skipped.update(id(inner) for inner in ast.walk(node))
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


def test_packages_import_only_what_lies_below_them():
    checked = 0
    for path, tree in modules():
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if len(parts) == 1:
            if parts[0] not in DECLARATIVE:
                for name in imports_of(tree):
                    if name.startswith("proper_ds."):
                        assert name.split(".")[1] in ROOT, f"{path} imports {name}"
            continue
        allowed = BELOW[parts[0]]
        if allowed is None:
            continue
        for name in imports_of(tree):
            if not name.startswith("proper_ds.") or name in PURE_CONFIG:
                continue
            package = name.split(".")[1]
            fine = (
                package in ROOT
                or package in allowed - {"training"}
                or (package == "training" and parts[0] != "distributed" and "training" in allowed)
            )
            assert fine, f"{path.relative_to(REPO)} imports {name}"
            checked += 1
    assert checked > 50


def test_heavy_libraries_stay_where_they_belong():
    homes = {"deepspeed": {"distributed"}, "ray": {"fleet"}}
    found = {name: set() for name in homes}
    for path, tree in modules():
        package = path.relative_to(PACKAGE).parts[0]
        for name in imports_of(tree):
            top = name.split(".")[0]
            if top in homes:
                assert package in homes[top], f"{path} imports {name}"
                found[top].add(package)
    assert found == homes


def test_pure_configuration_needs_pydantic_alone():
    for path, tree in modules():
        if path.name == "config.py" and path.parent != PACKAGE:
            for name in imports_of(tree):
                assert (
                    name.split(".")[0] in {"__future__", "typing", "pydantic"}
                    or name == "proper_ds.section"
                    or name in PURE_CONFIG
                )


def test_files_are_short_and_say_what_they_are():
    lengths = []
    for path, tree in modules():
        lines = path.read_text(encoding="utf-8").count("\n")
        lengths.append(lines)
        assert lines <= 400, f"{path} has {lines} lines"
        assert ast.get_docstring(tree), f"{path} does not say what it is"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{path}: {node.name} has {length} lines"
    assert statistics.median(lengths) < 200


def test_nothing_pickles_and_nothing_prints():
    for path, tree in modules():
        for name in imports_of(tree):
            assert name.split(".")[0] not in {"pickle", "dill", "cloudpickle", "joblib"}, path
        text = path.read_text(encoding="utf-8")
        assert "torch.load(" not in text, path
        assert "torch.save(" not in text, path
