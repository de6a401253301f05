"""A bad network while a model is trained, and while losses are pulled; see test_bad_network.py for the pushes of what is done."""

import re
import shutil
import threading

import pytest
from hub_server import FAULT_KINDS
from huggingface_hub import close_session, get_session
from pushed_runs import (  # noqa: F401 - fixtures
    REPOSITORIES,
    Run,
    finished_fixture,
    leave_out,
    nothing_computed_fixture,
    pushed_losses_fixture,
    read_once_fixture,
    waits_fixture,
)
from surroundings import forget_downloads

from trl_ama import AMAError
from trl_ama.common.hub import time_limit
from trl_ama.pipeline.generalists import train_generalist
from trl_ama.reference_losses.loading import load_reference_losses


pytestmark = pytest.mark.slow


@pytest.fixture
def fresh(finished, tmp_path):
    """A run of its own with specialists and losses, and no generalist."""
    run = Run(tmp_path, finished.recipe)
    for name in ("specialists", "reference_losses"):
        shutil.copytree(finished.output_dir / name, run.output_dir / name)
    return run


def as_pushed(folder, strategy):
    """What has to be in the generalist's repository: the folder as it is at the end, and its last checkpoint."""
    files = {path.name: path for path in folder.iterdir() if path.is_file() and path.name[0] not in "._"}
    del files["trainer_state.json"]
    if strategy == "checkpoint":
        files |= {f"last-checkpoint/{path.name}": path for path in (folder / "checkpoint-4").iterdir()}
        files.pop("last-checkpoint/README.md", None)
    return {name: path.read_bytes() for name, path in files.items()}


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize(
    ("strategy", "kind"),
    [(("every_save", "checkpoint")[number % 2], kind) for number, kind in enumerate([None, *FAULT_KINDS])],
)
def test_pushes_during_training(hub, fresh, waits, monkeypatch, strategy, kind, lasting):
    """A push in the background neither ends nor holds up the training, and at the end everything is there."""
    training, asked = [], []

    def train(*args):
        training.append(True)
        try:
            return train_generalist(*args)
        finally:
            training.clear()

    def in_training(method, path):
        if training:
            asked.append(path)
        return bool(training)

    monkeypatch.setattr("trl_ama.pipeline.run.train_generalist", train)
    monkeypatch.setattr("trl_ama.common.hub.TIMEOUT", 0.2 if kind == "timeout" else 60.0)
    number = FAULT_KINDS.index(kind) if kind else 0
    hub.fail(kind or "500", match=in_training, index=0 if lasting else number, times=10**6 if lasting else 1)
    if kind is None:
        hub._faults[0].index = 10**6  # which only counts
    else:
        leave_out(monkeypatch)
    fresh(("train", "eval") if kind is None else ("train",), hub_strategy=strategy)
    assert len(asked) == number + 1 if kind and not lasting else len(asked) >= (2 if kind else 6)
    tree = hub.tree("model", "org/mine")
    del tree[".gitattributes"]
    assert tree == as_pushed(fresh.output_dir / "generalists" / "ama_s", strategy)


def test_a_training_goes_on_when_no_push_succeeds(hub, finished, tmp_path, waits, request, capsys):
    run = Run(tmp_path, finished.recipe)
    hub.fail("reset", match=lambda method, path: "/commit/" in path, times=10**6)
    with pytest.raises(AMAError) as caught:
        run(hub_strategy="every_save")
    assert str(caught.value).count("could not be pushed") == 4 and len(str(caught.value).splitlines()) == 1
    assert hub.WRITE_TOKEN not in str(caught.value) + "".join(capsys.readouterr())
    # But for PEFT's stub of a card, which is taken out of what is pushed
    stubs = {name for name in finished.files() if re.fullmatch(r"generalists/ama_s/checkpoint-\d+/README.md", name)}
    assert set(run.files()) == set(finished.files()) - stubs
    assert all(len(hub.commits(*place)) == 1 for place in REPOSITORIES)
    hub._faults.clear()
    request.getfixturevalue("nothing_computed")
    run(hub_strategy="every_save")
    assert all(len(hub.commits(*place)) == 2 for place in REPOSITORIES)


def test_the_time_limit_holds_everywhere(hub, monkeypatch):
    """In other threads, and for a client that is made anew, as it is after a failure to connect."""
    monkeypatch.setattr("trl_ama.common.hub.TIMEOUT", 0.2)
    before = get_session().timeout
    assert before.read is None  # or this test is not needed any more
    hub.fail("timeout", times=10**6)

    def ask(errors):
        try:
            get_session().get(f"{hub.url}/api/whoami-v2")
        except Exception as error:
            errors.append(type(error).__name__)

    with time_limit():
        for _ in range(2):
            errors = []
            thread = threading.Thread(target=ask, args=(errors,))
            thread.start()
            thread.join(4)
            assert errors == ["ReadTimeout"]
            close_session()
        with time_limit():
            assert get_session().timeout.read == 0.2
        assert get_session().timeout.read == 0.2
    assert get_session().timeout == before
    close_session()
    assert get_session().timeout == before
    get_session().timeout = 7.0  # somebody's own
    with time_limit():
        assert get_session().timeout.read == 7.0
    assert get_session().timeout.read == 7.0
    close_session()


def limit_waiting(monkeypatch, kind, seconds):
    """For what never answers; nothing that does is in such a hurry."""
    own = seconds if kind == "timeout" else None
    monkeypatch.setattr("trl_ama.common.hub.TIMEOUT", own or 60.0)
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):  # downloads have limits of their own
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", own or 10.0)


def rows(losses):
    return {name: split.to_dict() for name, split in losses.items()}


@pytest.mark.parametrize("kind", FAULT_KINDS)
def test_pulling_losses(hub, pushed_losses, waits, read_once, monkeypatch, kind):
    """Once: a pull succeeds or says why not, and leaves nothing in the cache that the next one stumbles over."""
    forget_downloads()
    hub.clear_log()
    expected = rows(load_reference_losses("org/mine-losses"))
    count = len(hub.requests)
    assert count >= 8
    for index in range(count):
        retries = (index + FAULT_KINDS.index(kind)) % 2 * 3
        monkeypatch.setattr("trl_ama.common.hub.RETRIES", retries)
        limit_waiting(monkeypatch, kind, 0.15)
        forget_downloads()
        hub.fail(kind, index=index, seconds=0.5)
        try:
            assert rows(load_reference_losses("org/mine-losses")) == expected
        except AMAError as error:
            assert retries == 0 and len(str(error).splitlines()) == 1 and hub.WRITE_TOKEN not in str(error)
        hub._faults.clear()
        limit_waiting(monkeypatch, None, 0)
        assert rows(load_reference_losses("org/mine-losses")) == expected


@pytest.mark.parametrize("kind", FAULT_KINDS)
def test_the_hub_keeps_failing_while_losses_are_pulled(hub, pushed_losses, waits, read_once, monkeypatch, kind):
    expected = rows(load_reference_losses("org/mine-losses"))
    limit_waiting(monkeypatch, kind, 0.1)
    monkeypatch.setattr("trl_ama.common.hub.RETRIES", 1)
    for part in ("/api/", "/resolve/"):
        forget_downloads()
        hub.fail(
            kind, match=lambda method, path, part=part: part in path and method == "GET", times=10**6, seconds=0.5
        )
        with pytest.raises(AMAError, match="'org/mine-losses'") as caught:
            load_reference_losses("org/mine-losses")
        assert len(str(caught.value).splitlines()) == 1 and hub.WRITE_TOKEN not in str(caught.value)
        hub._faults.clear()
    limit_waiting(monkeypatch, None, 0)
    assert rows(load_reference_losses("org/mine-losses")) == expected
