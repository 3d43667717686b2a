"""The direction of imports and the habits that a short look at the source can hold."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted([*(ROOT / "jaxint8").rglob("*.py"), *(ROOT / "models").rglob("*.py")])
FLAX = {"jaxint8/dense.py", "jaxint8/nnx.py", "jaxint8/convert.py"}


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path):
    name = path.relative_to(ROOT).as_posix()
    found = imports(path)
    if name.startswith("jaxint8/") and not name.startswith("jaxint8/cli/"):
        assert not [i for i in found if i.startswith(("jaxint8.models", "jaxint8.cli"))]
        if not name.startswith("jaxint8/evaluation/"):
            assert not [i for i in found if i.startswith("jaxint8.evaluation")]
        if name not in FLAX:
            assert not [i for i in found if i.split(".")[0] == "flax"]
    if name.startswith("models/"):
        assert not [i for i in found if i.startswith(("jaxint8.cli", "jaxint8.evaluation"))]
    assert not [
        i for i in found if i.startswith("jax._src") or i in ("pickle", "torch", "transformers")
    ]


def test_models_are_there_once_they_are_asked_for():
    code = (
        "import sys, jaxint8; assert 'jaxint8.models' not in sys.modules; jaxint8.models.load; "
        "assert not hasattr(jaxint8, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ffi_call_stands_in_one_file():
    callers = [p for p in MODULES if "ffi_call(" in p.read_text()]
    assert [p.name for p in callers] == ["kernels.py"]


def test_reference_imports_numpy_only():
    found = {i.split(".")[0] for i in imports(ROOT / "jaxint8" / "reference.py")}
    assert found <= {"numpy", "typing"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_module_says_what_it_is_for(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    assert len(path.read_text().splitlines()) <= 400
