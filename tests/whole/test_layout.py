"""Who may import whom. Imports inside of functions and for type checkers count too: nothing may hide a circle."""

import ast
from graphlib import TopologicalSorter
from importlib import import_module

import pytest
from places import PACKAGE


MAY_IMPORT = {  # a room → the rooms that it may import; itself and `common` always
    "common": "",
    "evaluate_modules": "",
    "metrics": "evaluate_modules",
    "mixing": "",
    "tasks": "",
    "policies": "",
    "fast_path": "",
    "report": "",
    "sampling": "tasks mixing",
    "reference_losses": "tasks report",
    "training": "metrics tasks mixing sampling",
    "dpo": "metrics evaluate_modules tasks policies fast_path report mixing sampling reference_losses training",
    "recipe": "tasks policies mixing reference_losses training dpo",
    "check": "evaluate_modules tasks policies report dpo recipe",
    "plan": "tasks policies fast_path dpo recipe",
    "merge": "policies report",
    "pipeline": "metrics tasks policies report sampling reference_losses training dpo recipe",
    "scripts": "tasks policies mixing report dpo recipe pipeline check plan merge",
    "cli": "scripts recipe",
    "registration": "cli",
    "__main__": "cli",
}
FACES = {*MAY_IMPORT} - {"mixing", "scripts", "evaluate_modules", "metrics", "cli", "registration", "__main__"}
LONGEST = 350  # lines
# Where an import may wait until it is needed: the doors, for their start-up
DOORS = ("scripts", "cli", "registration")
FILES = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
MODULES = {parts[:-1] if parts[-1] == "__init__" else parts: path for parts, path in FILES.items()}
TREES = {parts: ast.parse(path.read_text(encoding="utf-8")) for parts, path in MODULES.items()}


def named_by(parts, node):
    """The dotted names that an import statement names, as tuples; of other nodes none."""
    if isinstance(node, ast.Import):
        return [tuple(alias.name.split(".")) for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = ("trl_ama", *(parts if MODULES[parts].name == "__init__.py" else parts[:-1]))
    start = package[: len(package) - node.level + 1] if node.level else ()
    base = (*start, *(node.module.split(".") if node.module else ()))
    return [(*base, alias.name) for alias in node.names]


def imports_of(parts):
    """The modules of the package that a module names, wherever in it."""
    names = [name[1:] for node in ast.walk(TREES[parts]) for name in named_by(parts, node) if name[0] == "trl_ama"]
    return {name if name in MODULES else name[:-1] for name in names} - {parts}


GRAPH = {parts: imports_of(parts) for parts in MODULES if parts}  # without trl_ama itself


def test_rooms_import_only_what_is_below_them():
    wrong = [
        f"{'.'.join(parts)} imports {'.'.join(other) or 'trl_ama'}"
        for parts, others in GRAPH.items()
        for other in others
        if not other or other[0] not in {parts[0], "common", *MAY_IMPORT[parts[0]].split()}
    ]
    assert not wrong


def test_every_folder_is_a_room_and_every_room_is_there():
    assert {parts[0] for parts in GRAPH} == set(MAY_IMPORT)


def test_no_circle_of_files():
    list(TopologicalSorter(GRAPH).static_order())  # raises CycleError, which names it


@pytest.mark.parametrize(
    ("room", "never"),
    [
        ("mixing", {"torch", "transformers", "trl", "peft", "accelerate", "datasets"}),
        ("report", {"torch", "transformers", "trl", "peft", "accelerate", "datasets"}),
        ("common", {"peft", "trl"}),
    ],
)
def test_rooms_without_heavy_packages(room, never):
    named = {
        name[0]
        for parts, tree in TREES.items()
        if parts[:1] == (room,)
        for node in ast.walk(tree)
        for name in named_by(parts, node)
    }
    assert not named & never


def test_training_knows_no_objective():
    """Neither by an import nor by a name: another objective is to be built of the same parts."""
    words = ("dpo", "chosen", "rejected")
    found = [
        f"{'.'.join(parts)}: {name}"
        for parts, tree in TREES.items()
        if parts[:1] == ("training",)
        for name in _names(tree)
        if any(word in name.lower() for word in words)
    ]
    assert not found


def _names(tree):
    """Of a module's code: its variables, attributes and arguments, and its texts but for docstrings and sentences."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and " " not in node.value:
                yield node.value
        else:
            yield from (getattr(node, field) for field in ("id", "attr", "arg") if getattr(node, field, None))


def test_imports_stand_at_the_top():
    """But for the doors', and for what is optional or slow in a file that need not be: then the line says why."""
    late = []
    for parts, tree in TREES.items():
        if parts[:1] and parts[0] in (*DOORS, "evaluate_modules"):
            continue
        lines = MODULES[parts].read_text(encoding="utf-8").splitlines()
        for function in ast.walk(tree):
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            for node in ast.walk(function):
                named = named_by(parts, node)
                if not named:
                    continue
                line = lines[node.lineno - 1].strip()
                if "  # " not in line or any(name[0] == "trl_ama" for name in named):
                    late.append(f"{'.'.join(parts)}.{function.name}: {line}")
    assert not late


def test_no_private_name_crosses_files():
    wrong = [
        f"{'.'.join(parts)}: {'.'.join(name)}"
        for parts, tree in TREES.items()
        for node in ast.walk(tree)
        for name in named_by(parts, node)
        if name[0] == "trl_ama" and name[-1].startswith("_") and not name[-1].startswith("__")
    ]
    assert not wrong


def test_files_are_short():
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text("utf-8").splitlines()) for path in MODULES.values()}
    assert not {name: count for name, count in lines.items() if count > LONGEST}


def test_a_room_has_a_face_of_one_sentence():
    for parts, path in MODULES.items():
        if parts and parts[0] in FACES and path.name == "__init__.py":
            sentence = ast.get_docstring(TREES[parts])
            assert sentence.count("\n") == 0 and sentence.endswith("."), parts
            room = import_module(f"trl_ama.{parts[0]}")
            assert room.__all__ and all(getattr(room, name).__name__ == name for name in room.__all__)
