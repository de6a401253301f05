"""Which tests `make quick` leaves out, and that what is kept between tests is what would be worked out anew."""

import importlib.metadata
from types import SimpleNamespace

import jinja2
import pytest
import tiny_runs
from dill.detect import nestedglobals
from marks import SLOW, SlowNoted, noted_slow, trains
from places import ROOT


def begin(trainer):
    trainer.train()


class Runs:
    def both(self):
        return [begin(one) for one in self.trainers]


def by_itself(trainer):
    trainer.train(resume_from_checkpoint=True)


def through_a_function(trainer):
    begin(trainer)


def through_a_class_in_a_function():
    def run():
        return Runs().both()

    return run()


def through_a_module():
    tiny_runs.assert_learns(None)


def not_at_all(train):
    """A name of its own, a word in a text and a function that is patched are no training."""
    return train, "trainer.train()", SimpleNamespace(training=train)


def item(function, *fixtures):
    known = {str(number): [SimpleNamespace(func=one)] for number, one in enumerate(fixtures)}
    return SimpleNamespace(function=function, _fixtureinfo=SimpleNamespace(name2fixturedefs=known))


@pytest.mark.parametrize("function", [by_itself, through_a_function, through_a_class_in_a_function, through_a_module])
def test_a_training_is_found_wherever_it_is_called(function):
    assert trains(item(function)) and trains(item(not_at_all, not_at_all, function))


def test_nothing_else_is_taken_for_one():
    assert not trains(item(not_at_all, not_at_all))


def test_what_took_long_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr("marks.SLOW", tmp_path / "slow.txt")
    noted = SlowNoted()
    for name, seconds in (
        ("a.py::test_a[x]", 0.3),
        ("a.py::test_a[x]", 0.3),
        ("a.py::test_b", 0.4),
        ("b.py::test_c", 2.0),
    ):
        noted.pytest_runtest_logreport(SimpleNamespace(nodeid=name, duration=seconds))
    noted.pytest_sessionfinish(1)  # not of a run that failed
    assert not (tmp_path / "slow.txt").exists()
    noted.pytest_sessionfinish(0)
    assert noted_slow() == {"a.py::test_a", "b.py::test_c"}


def test_what_is_noted_is_there():
    for line in SLOW.read_text().split():
        file, _, name = line.partition("::")
        assert f"def {name.rpartition('::')[2]}(" in (ROOT / file).read_text(), line


def test_metadata_are_read_again_when_they_change(tmp_path):
    folder = tmp_path / "mine.dist-info"
    folder.mkdir()
    for version in ("1", "2.0"):
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mine\nVersion: {version}\n")
        assert importlib.metadata.Distribution.at(folder).version == version


def test_a_template_is_that_of_its_environment():
    """Two environments read the same text differently."""
    for opening, expected in (("{{", "7"), ("[[", "{{ 7 }}")):
        closing = {"{{": "}}", "[[": "]]"}[opening]
        settings = {"variable_start_string": opening, "variable_end_string": closing}
        assert jinja2.Template("{{ 7 }}", **settings).render() == expected


def test_globals_are_those_of_the_functions_code():
    assert set(nestedglobals(through_a_class_in_a_function)) == {"Runs"}
    assert set(nestedglobals(through_a_function)) == {"begin"} and nestedglobals(through_a_module) == ["tiny_runs"]
