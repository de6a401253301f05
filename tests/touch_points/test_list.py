"""The places where trl-ama leans on the inside of TRL, transformers, accelerate and others: a test each, in a file a package.

docs/touch_points.md lists them. If an upgrade breaks one, the test that fails says which.
"""

import re

from places import DOCS, TESTS


def test_every_touch_point_is_documented():
    page = (DOCS / "touch_points.md").read_text(encoding="utf-8")
    numbered = [int(number) for number in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)]
    files = [path for path in TESTS.rglob("test_*.py") if "touch_points" in str(path.relative_to(TESTS))]
    tested = [int(number) for path in files for number in re.findall(r"def test_(\d+)_", path.read_text())]
    assert sorted(numbered) == sorted(tested) and len(set(tested)) == len(tested)
