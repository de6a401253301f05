"""Tests stand alone: what they share is in tests/support, and none of them asks where it is itself."""

import ast

from places import SUPPORT, TESTS


OF_TESTS = sorted(TESTS.rglob("test_*.py"))
ALL = sorted({*OF_TESTS, *SUPPORT.glob("*.py"), TESTS / "conftest.py"})


def name(path) -> str:
    return path.relative_to(TESTS).as_posix()


def imported(tree) -> set[str]:
    """The first name of every module that is imported, wherever in the file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, node.module
            names.add(node.module.split(".")[0])
    return names


def test_nothing_is_imported_from_a_test():
    tests = {"conftest", "tests", *(path.stem for path in OF_TESTS)}
    found = {name(path): imported(ast.parse(path.read_text(encoding="utf-8"))) & tests for path in ALL}
    assert {path: names for path, names in found.items() if names} == {}


def test_only_one_file_says_where_tests_are():
    """Else a test could not move. The names of modules of ours are another thing, and so are scripts that a test writes."""
    asking = []
    for path in ALL:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name) and node.id == "__file__":
                asking.append(name(path))
    assert asking == ["support/places.py"]


def test_conftest_has_fixtures_and_hooks_alone():
    for node in ast.parse((TESTS / "conftest.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("pytest_"):
            assert any("pytest.fixture" in ast.unparse(mark) for mark in node.decorator_list), node.name
        assert not isinstance(node, ast.ClassDef), ast.unparse(node)
        if isinstance(node, ast.Assign):
            assert ast.unparse(node).startswith("_"), ast.unparse(node)


def test_no_two_tests_of_a_file_have_one_name():
    """The second would be run in place of the first."""
    for path in OF_TESTS:
        names = [node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "name")]
        assert len(names) == len(set(names)), name(path)
