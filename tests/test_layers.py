"""The code keeps to the layers of docs/architecture.md, and importing a file does nothing but define."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gemlet"
FRONTS = {"__init__", "__main__", "export/__init__", "kernels/__init__"}  # doors to the layers, part of none


def table() -> dict[str, tuple[int, set[str]]]:
    """{file: (layer, what it may import from gemlet)} as the page says."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| `([\w/]+)\.py` \| [^|]+\|([^|]*)\|$", page, re.MULTILINE)
    assert len({name for _, name, _ in rows}) == len(rows), "a file has two rows"
    return {name: (int(layer), set(re.findall(r"[\w/]+", imports))) for layer, name, imports in rows}


TABLE = table()
TREES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(tree: ast.Module) -> set[str]:
    """Every module that is imported anywhere in the file, `from package import module` spelt out."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def from_gemlet(tree: ast.Module) -> set[str]:
    """The files of gemlet among them, other than errors.py."""
    paths = {module.removeprefix("gemlet.").replace(".", "/") for module in imported(tree) if "gemlet." in module}
    return {path for path in paths if path in TREES} - {"errors"}


IMPORTS = {name: from_gemlet(tree) for name, tree in TREES.items()}


def test_every_file_has_its_row_and_every_row_its_file():
    assert set(TABLE) == set(TREES) - FRONTS


@pytest.mark.parametrize("name", sorted(set(TREES) & set(TABLE)))
def test_a_file_imports_what_its_row_says_and_from_no_layer_above(name):
    layer, listed = TABLE[name]
    assert IMPORTS[name] == listed, "mend the import or the row in docs/architecture.md"
    assert [other for other in listed if TABLE[other][0] > layer] == []


def test_no_file_imports_itself_by_a_detour():
    cleared: set[str] = set()  # nothing that is reached from there leads back

    def reach(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in cleared:
            for other in IMPORTS[name]:
                reach(other, (*path, name))
            cleared.add(name)

    for name in set(TREES) - FRONTS:
        reach(name, ())


@pytest.mark.parametrize("name", sorted(name for name in set(TREES) & set(TABLE) if TABLE[name][0] == 0))
def test_the_lowest_layer_knows_nothing_of_torch(name):
    assert {module for module in imported(TREES[name]) if module.split(".")[0] == "torch"} == set()


@pytest.mark.parametrize("name", sorted(TREES))
def test_importing_defines_and_does_nothing_else(name):
    def does(node: ast.stmt) -> bool:
        if isinstance(node, ast.If):  # `if TYPE_CHECKING` and `if __name__ == "__main__"`
            return not {"TYPE_CHECKING", "__name__"} & {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
        if isinstance(node, ast.Expr):  # a docstring
            return not isinstance(node.value, ast.Constant)
        definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
        return not isinstance(node, definitions)

    assert [ast.unparse(node) for node in TREES[name].body if does(node)] == []
