"""Who imports whom: no circle anywhere, and every import looks down its floor or further: guard, export, validators,
pipeline, command line.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import guardfold

PACKAGE = "guardfold"
FLOORS = ("_version", "guard", "export", "validators", "pipeline", "options", "cli", "__main__", "__init__")
"""From the ground up; the package itself, which hands on what lies in all of it, is the roof."""

Graph = Mapping[str, set[str]]


def modules_in(root: Path) -> dict[str, Path]:
    """Dotted name inside the package -> file, for all of it but its tests; a package is called NAME.__init__."""
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return {
        ".".join(path.with_suffix("").parts): root / path
        for path in files
        if path.parts[0] != "tests" and path.parts[0].partition(".")[0] in FLOORS
    }


def imports_of(name: str, source: str, modules: Mapping[str, object]) -> Iterator[str]:
    """The modules that `name` imports, wherever in it, for types alone too, and the packages that importing them runs
    first, those that `name` itself lies in aside.
    """
    here = name.split(".")[:-1]
    own = {".".join([*here[:end], "__init__"]) for end in range(len(here) + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
            outside = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            assert PACKAGE not in {each.partition(".")[0] for each in outside}, f"{name}: import it relatively"
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) + 1 - node.level], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                meant = ([*base, alias.name], [*base, alias.name, "__init__"], base, [*base, "__init__"])
                yield next(each for each in map(".".join, meant) if each in modules)
                outer = ([*base[:end], "__init__"] for end in range(1, len(base) + 1))
                yield from (each for each in map(".".join, outer) if each in modules and each not in own)


def graph_of(sources: Mapping[str, str]) -> Graph:
    return {name: set(imports_of(name, source, sources)) for name, source in sources.items()}


@pytest.fixture(scope="module")
def graph() -> Graph:
    assert guardfold.__file__
    return graph_of({name: path.read_text() for name, path in modules_in(Path(guardfold.__file__).parent).items()})


def floor(name: str) -> int:
    return FLOORS.index(name.partition(".")[0])


def circle(graph: Graph) -> list[str]:
    """One circle of imports; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_the_whole_package_is_seen(graph: Graph) -> None:
    assert len(graph) > 80 and {name.partition(".")[0] for name in graph} == set(FLOORS)
    assert "guard.guard" in graph["guard.hooks"] and "cli" in graph["__main__"]


def test_no_imports_form_a_circle(graph: Graph) -> None:
    assert circle(graph) == []


def test_every_import_points_down(graph: Graph) -> None:
    up = [f"{name} -> {other}" for name, others in graph.items() for other in others if floor(other) > floor(name)]
    assert up == []


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"guard.a": "from .b import x", "guard.b": "def f():\n    from . import a"}, True),
        ({"guard.a": "if TYPE_CHECKING:\n    from .b import x", "guard.b": "from .a import y"}, True),
        ({"guard.a": "from .p.b import x", "guard.p.__init__": "from ..a import y", "guard.p.b": ""}, True),
        ({"guard.p.__init__": "from .b import x", "guard.p.b": "from .c import y", "guard.p.c": ""}, False),
        ({"guard.p.__init__": "from .b import x\ny = 1", "guard.p.b": "from . import y"}, True),
    ],
    ids=["in a function", "for types", "through a package", "a registry", "of its registry"],
)
def test_a_circle_is_seen(sources: dict[str, str], found: bool) -> None:
    assert bool(circle(graph_of(sources))) == found
