"""The house keeps its floors: imports parsed from the source with ast, against the table of the design.

A module imports only from lower floors, or siblings of its own folder; no cycles; data, masks, backbones and heads do
not
know one another; torch.distributed and the heavy optional libraries stay where they are allowed.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "visard"

FLOORS = {
    "__init__": 0, "errors": 0, "records": 0, "config": 0, "config_augment": 0, "config_backbones": 0,
    "config_distill": 0, "config_heads": 0, "config_json": 0, "config_masks": 0,
    "console": 0, "signals": 0, "wording": 0, "device": 0, "dist": 0, "pages": 0, "functional": 0, "completion": 0,
    "kept_work": 1,
    "kernels": 1, "data": 1, "masks": 1, "backbones": 1,
    "embed_files": 2, "embed_journal": 2,
    "align": 2, "heads": 2, "runtime": 2,  # align writes the prepared data set that data defines
    "embed": 3, "checkpoint": 3,
    "training": 4, "protocols": 4, "deploy": 4, "cleaning": 4,
    "report": 5, "search": 5, "recipes": 5,
    "cli": 6,
    "quickstart": 7,
}  # fmt: skip
STRANGERS = {"data", "masks", "backbones", "heads"}
DISTRIBUTED = {"dist", "heads", "checkpoint", "embed", "training"}
LAZY = {
    "onnxruntime",
    "openvino",
    "nncf",
    "faiss",
    "optuna",
    "matplotlib",
    "triton",
    "onnx",
    "onnxscript",
    "tensorboard",
    "rich",
    "tyro",
    "wandb",
}
LAZY_ALLOWED = {"tyro": {"align", "data", "deploy", "embed", "protocols", "recipes", "report"}, "triton": {"kernels"}}
MODULES = sorted(ROOT.rglob("*.py"))


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Full names of everything that the module imports; with `top_level_only` what importing it executes."""
    tree = ast.parse(path.read_text(), str(path))
    if top_level_only:
        nodes = list(_executed(tree))
    else:
        nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _executed(child)


def room(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def target(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "visard":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "__init__"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    here = room(path)
    assert here in FLOORS, f"{here} has no floor in the design"
    if here == "__init__":  # visard.load is a lazy door to runtime
        return
    for name in imports(path):
        there = target(name)
        if there is None or there == here:
            continue
        assert FLOORS[there] < FLOORS[here] or FLOORS[there] == FLOORS[here] == 0, f"{path}: {here} imports {name}"
        assert not (here in STRANGERS and there in STRANGERS), f"{path}: {here} must not know {there}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_stay_in_their_rooms(path: Path) -> None:
    here = room(path)
    for name in imports(path):
        if name.startswith("torch.distributed"):
            assert here in DISTRIBUTED, f"{path}: torch.distributed outside {sorted(DISTRIBUTED)}"
    for name in imports(path, top_level_only=True):
        library = name.split(".")[0]
        if library in LAZY and here not in LAZY_ALLOWED.get(library, set()):
            pytest.fail(
                f"{path}: {library} is imported when the module is; import it inside the function that needs it"
            )


def test_no_cycles() -> None:
    names = {
        ".".join(("visard", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): p for p in MODULES
    }
    edges = {
        name: {
            t
            for imported in imports(path, top_level_only=True)
            for t in (imported, imported.rpartition(".")[0])
            if t in names
        }
        - {name, "visard"}
        for name, path in names.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in edges[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in names:
        visit(name, ())


def test_protocols_take_embeddings_and_reports_take_results() -> None:
    for path in MODULES:
        if room(path) == "protocols" and not path.name.endswith(("command.py", "inputs.py")):  # these compose
            assert not [n for n in imports(path) if target(n) in {"runtime", "backbones", "heads"}], path
        if room(path) == "report":
            assert not [n for n in imports(path) if target(n) in {"embed", "runtime", "backbones"}], path


def _modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_help_does_not_import_torch() -> None:
    loaded = _modules_after("from visard.cli import main; main(['--help'])")
    assert not loaded & {"torch", "numpy", "cv2", "tyro", "rich"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not _modules_after("import visard") & (LAZY | {"torch"})


def test_files_stay_readable() -> None:
    long = {str(p.relative_to(ROOT)): n for p in MODULES if (n := len(p.read_text().splitlines())) > 450}
    assert not long, f"a room should be readable in one sitting (about 400 lines): {long}"
