"""What tests are given: tiny models, tokenizers, and a Hub of our own; no test needs the network."""

import gc
import os
import re
import sys

import pytest
from places import DOCS, SUPPORT, TESTS


# So that what a helper asserts says as much as in a test
pytest.register_assert_rewrite(*(path.stem for path in SUPPORT.glob("*.py") if path.stem != "places"))

from hypothesis import settings  # noqa: E402
from marks import SlowNoted, noted_slow, trains  # noqa: E402
from surroundings import forget_downloads, server  # noqa: E402 - before the libraries that read the environment
from tiny_runs import QUICK  # noqa: E402


# The same examples in every run, and none that fails because a machine is slow
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
_FILE = [""]  # of the tests that run
gc.disable()  # while everything is imported and collected
gc.set_threshold(20_000, 20, 20)  # a tenth of the time of a short run, as it is


def pytest_configure(config):
    if os.environ.get("TRL_AMA_NOTE_SLOW") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SlowNoted())


def pytest_sessionstart(session):
    """What runs tests imports all that is heavy; what only hands them out to others does not."""
    if hasattr(session.config, "workerinput") or not session.config.getoption("numprocesses", None):
        from kept import keep

        keep()


@pytest.hookimpl(tryfirst=True)  # before the marks are asked for
def pytest_collection_modifyitems(items):
    """Files that take long come first, so that no worker is left with one of them at the end."""
    ranks: dict = {}
    slow = noted_slow()
    for item in items:
        if trains(item):
            item.add_marker(pytest.mark.trains)
        rank = 2 if item.get_closest_marker("slow") else 1 if item.get_closest_marker("trains") else 0
        ranks[item.path] = max(rank, ranks.get(item.path, 0))
        if item.nodeid.partition("[")[0] in slow:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: -ranks[item.path])


def pytest_collection_finish(session):
    """Before a test computes anything; for those that ask for it."""
    if "ready" in sys.modules and session.items and not session.config.option.collectonly:
        from ready import make_ready

        gc.collect()
        gc.freeze()
        make_ready()


def pytest_runtest_logstart(nodeid, location):
    """Modules are for ever: every Trainer collects garbage before it trains, and half of its time went into looking at them.
    What was imported before the first test, and what the tests of a file have imported, is left out from then on."""
    if location[0] != _FILE[0]:
        _FILE[0] = location[0]
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A touch point that broke is named in its failure as docs/touch_points.md names it."""
    report = yield
    match = re.match(r"test_(\d+)_", item.name)
    if report.failed and match and "touch_points" in str(item.path.relative_to(TESTS)):
        page = (DOCS / "touch_points.md").read_text(encoding="utf-8")
        row = re.search(rf"^\| {match[1]} \| (.*) \|$", page, flags=re.MULTILINE)
        what = row[1] if row else "not in docs/touch_points.md"
        report.longrepr = f"{report.longreprtext}\n\nTouch point {match[1]} is broken: {what}"
    return report


@pytest.fixture
def hub(monkeypatch):
    """An empty Hub, this process logged in as `alice`; the test fails if a request was one that the Hub here does not
    know."""
    server.reset()
    forget_downloads()
    monkeypatch.setenv("HF_TOKEN", server.WRITE_TOKEN)
    yield server
    problems = server.problems()
    server.reset()
    assert not problems, "\n".join(f"{one.method} {one.path}: {one.status} {one.error or ''}" for one in problems)


@pytest.fixture
def restored_environment():
    """`env:` of a config file is written to `os.environ`, for the launched script to inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def hub_home(tmp_path):
    """A fresh `HF_HOME` for a process of its own, see `client_env`."""
    path = tmp_path / "hf_home"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def tokenizer():
    from tiny_models import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tokenizer, tmp_path_factory):
    """A saved tiny model with its tokenizer."""
    from tiny_models import make_model, save

    path = tmp_path_factory.mktemp("model")
    return save(make_model(len(tokenizer)), tokenizer, path)


@pytest.fixture(scope="session")
def letters():
    """A tokenizer to which no text is unknown, with a template that hides nothing."""
    from tiny_models import make_letters

    return make_letters()


@pytest.fixture(scope="session")
def letters_dir(letters, tmp_path_factory):
    """A saved tiny model with that tokenizer."""
    from tiny_models import make_model, save

    path = tmp_path_factory.mktemp("letters")
    return save(make_model(len(letters), max_position_embeddings=2048), letters, path)


@pytest.fixture
def quick_args(tmp_path):
    """Builds an `AMAConfig` (or another class) for a quick, silent CPU run."""

    def build(config_class=None, **overrides):
        from trl_ama import AMAConfig

        settings = {
            **QUICK,
            "output_dir": str(tmp_path / "run"),
            "per_device_eval_batch_size": 16,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "seed": 7,
        }
        return (config_class or AMAConfig)(**{**settings, **overrides})

    return build


@pytest.fixture(scope="session")
def whole_recipe(model_dir, tmp_path_factory):
    """Builds the parsed arguments of a whole run, see whole_runs."""
    from whole_runs import make_recipe, write_data

    return make_recipe(
        tmp_path_factory.mktemp("recipe") / "config.yaml", model_dir, write_data(tmp_path_factory.mktemp("data"))
    )


@pytest.fixture(scope="session")
def whole_run(whole_recipe, tmp_path_factory):
    """The folder and results of that run, which takes seconds; whoever changes it copies it first."""
    from trl_ama import run_pipeline

    output_dir = tmp_path_factory.mktemp("run")
    return output_dir, run_pipeline(*whole_recipe(output_dir))


@pytest.fixture(scope="session")
def qlora_base(tokenizer, tmp_path_factory):
    from qlora_runs import make_base

    return make_base(tokenizer, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def qlora_recipe(qlora_base, tmp_path_factory):
    from qlora_runs import make_recipe

    return make_recipe(qlora_base, tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def qlora_run(qlora_recipe, tmp_path_factory):
    """A finished run in 4 bits, see qlora_runs."""
    from qlora_runs import make_run

    return make_run(qlora_recipe, tmp_path_factory.mktemp("run"))
