"""Where things are in the repository: no test asks for its own place, so that it may stand in any folder."""

from pathlib import Path


SUPPORT = Path(__file__).resolve().parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent
PACKAGE = ROOT / "trl_ama"
DOCS = ROOT / "docs"
RECIPES = ROOT / "recipes"
