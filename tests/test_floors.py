"""The house stands: imports go down the floors, never in circles; nothing read from a file is executed."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

FLOORS = [  # ground first; a room may use the floors below its own, not its neighbours
    {"errors"},
    {"apportion", "files", "progress", "tables"},
    {"page"},
    {"svg"},
    {"model", "fleet"},
    {"data", "plan"},
    {"train", "infer"},
    {"parallel"},
    {"reason", "evaluate", "launch"},
    {"emulation", "serve"},
    {"assistant"},
    {"demo"},
    {"cli"},
]
MODEL_MAY_USE = {"errors", "files"}  # the network reads as a paper does: alone
MAY_PRINT = {"cli", "demo", "progress"}
CODE_IN_DISGUISE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def room(module: str) -> str:
    """`motley.model.moe` → `model`; the package itself has no room."""
    return module.split(".")[1] if "." in module else ""


def floor(name: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if name in rooms:
            return number
    raise AssertionError(f"motley.{name} has no floor: give it one in tests/test_floors.py")


def imported_modules(module: str) -> Iterator[str]:
    """motley's own modules that `module` imports, wherever in the file the import stands."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if FILES[module].stem == "__init__" else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            # `from motley.data import pack` means the module where there is one, else the package's own name
            names = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name if name in FILES else base for name in names]
        else:
            continue
        yield from (target for target in targets if target.split(".")[0] == "motley")


def calls(module: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a module with the written name of what is called: `torch.load`, `print`."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func), node


def place(module: str, node: ast.AST) -> str:
    return f"{FILES[module].relative_to(SOURCE.parent)}:{getattr(node, 'lineno', '?')}"


def test_there_is_a_house():
    assert "motley.model.config" in FILES
    assert len(FILES) > 10


@pytest.mark.parametrize("module", [name for name in FILES if room(name) not in ("", "__main__")])
def test_imports_go_down_the_floors(module: str):
    own = room(module)
    for target in imported_modules(module):
        other = room(target)
        if other in ("", own):
            continue
        assert floor(other) < floor(own), f"{module} imports {target}, which is not on a floor below"
        if own == "model":
            assert other in MODEL_MAY_USE, f"{module} imports {target}; the model stands alone"


def test_no_module_imports_itself_in_a_circle():
    graph = {module: set(imported_modules(module)) - {module} for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("modules import each other in a circle: " + " → ".join(error.args[1]))


@pytest.mark.parametrize("module", FILES)
def test_nothing_read_from_a_file_is_executed(module: str):
    for node in ast.walk(TREES[module]):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] not in CODE_IN_DISGUISE, f"{place(module, node)} imports {name}"
    for name, call in calls(module):
        assert name not in ("torch.load", "torch.save", "eval", "exec", "os.system"), place(module, call)
        for keyword in call.keywords:
            if keyword.arg in ("allow_pickle", "shell"):
                assert ast.unparse(keyword.value) == "False", f"{place(module, call)}: {keyword.arg}"
    assert "trust_remote_code" not in FILES[module].read_text(encoding="utf-8"), module


@pytest.mark.parametrize("module", [name for name in FILES if room(name) not in MAY_PRINT])
def test_libraries_do_not_print(module: str):
    printing = [place(module, call) for name, call in calls(module) if name == "print"]
    assert not printing, f"{printing} print; return values or use motley.progress"


@pytest.mark.parametrize("room_name", ["parallel", "emulation", "launch"])
def test_one_process_trains_without_importing_what_many_ranks_need(room_name: str):
    """Whoever trains alone loads `motley.train` and no rank; what the modules import when they are imported counts."""
    seen: set[str] = set()
    waiting = ["motley.cli", "motley.train.pretrain", "motley.train.sft", "motley.train.config"]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += [target for target in imported_modules(module) if room(target) != "demo"]
    assert "motley.train.trainer" in seen
    assert not [module for module in seen if room(module) == room_name]


def test_no_two_public_classes_share_a_name():
    found: dict[str, str] = {}
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert node.name not in found, f"{module} and {found[node.name]} both have a class {node.name}"
                found[node.name] = module
