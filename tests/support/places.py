"""Where things are in the repository: no test asks for its own place, so that it may stand in any folder."""

from pathlib import Path


SUPPORT = Path(__file__).resolve().parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent
PACKAGE = ROOT / "trl_ama"
DOCS = ROOT / "docs"
RECIPES = ROOT / "recipes"


def path_of(test: str) -> Path:
    """The test file of a name, in whichever folder it is."""
    (path,) = TESTS.rglob(test)
    return path
