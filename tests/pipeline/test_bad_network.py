"""Each request of a push fails once in each way that a network can; the same command mends it, computing nothing."""

import functools

import pytest
from hub_server import FAULT_KINDS
from hub_world import SIZES
from huggingface_hub import HfApi
from pushed_runs import REPOSITORIES, finished_fixture, leave_out, nothing_computed_fixture, waits_fixture  # noqa: F401 - fixtures

from trl_ama import AMAError, run_pipeline
from trl_ama.common.hub import HUB_ERRORS, time_limit
from trl_ama.pipeline.run import STAGES
from trl_ama.recipe.settings import RunSettings
from trl_ama.reference_losses.files import read_task, stack


pytestmark = pytest.mark.slow


PUSHES = [("specialists",), ("losses",), ("train", "eval")]


@pytest.fixture(scope="module")
def reading(finished):
    """The arguments and the settings of the finished run, which no push changes."""
    arguments = finished.parse(push_to_hub=True)
    return arguments, RunSettings(*arguments), functools.cache(read_task), {}


@pytest.fixture
def one_reading(finished, reading, monkeypatch):
    """What takes longer than the pushes and asks no Hub is done once for many commands, or left out: data and losses are read, the
    recipe is parsed, checked and rehearsed, the plan is told, the losses of the tasks are put together, the plot is drawn."""
    arguments, settings, read_task_once, tables = reading
    monkeypatch.setattr(finished, "parse", lambda push_to_hub: arguments)
    monkeypatch.setattr("trl_ama.pipeline.run.RunSettings", lambda *args: settings)

    def stack_once(parts):
        key = tuple(map(id, parts))
        if key not in tables:
            tables[key] = (parts, stack(parts))
        return tables[key][1]

    monkeypatch.setattr("trl_ama.reference_losses.dataset.stack", stack_once)
    monkeypatch.setattr("trl_ama.pipeline.run_losses.read_task", read_task_once)
    leave_out(monkeypatch, "check_recipe", "rehearse_stages", "plot_mixture")


@pytest.fixture
def no_page(finished, monkeypatch):
    """The page that a run leaves asks no Hub, and takes as long as the requests; the last tests leave it."""
    leave_out(monkeypatch, "leave_page")


def state(hub):
    """Content and number of commits of every repository."""
    return {place: (hub.tree(*place), len(hub.commits(*place))) for place in sorted(hub.repos)}


def undisturbed(hub, run, stages):
    hub.reset()
    run(stages)
    assert not hub.problems()
    return state(hub), run.files(), [request.path for request in hub.requests]


def attempt(run, stages):
    """Run the command. It may fail in one way only, with a message that does not tell the token."""
    try:
        run(stages)
    except AMAError as error:
        return str(error)
    return None


def arm(hub, kind, index, monkeypatch, seconds):
    hub.reset()
    hub.fail(kind, index=index)
    # Only for the command that meets it: a busy machine answers late, too
    monkeypatch.setattr("trl_ama.common.hub.TIMEOUT", seconds if kind == "timeout" else 60.0)


@pytest.mark.parametrize("kind", FAULT_KINDS)
@pytest.mark.parametrize("stages", PUSHES, ids="-".join)
def test_every_request_fails_once(
    hub, finished, waits, nothing_computed, one_reading, no_page, monkeypatch, capsys, stages, kind
):
    """Without our own retries, so that most faults make the push fail: the same command again mends it."""
    expected, files, paths = undisturbed(hub, finished, stages)
    monkeypatch.setattr("trl_ama.common.hub.RETRIES", 0)
    failed = 0
    for index, path in enumerate(paths):
        arm(hub, kind, index, monkeypatch, 0.1)
        message = attempt(finished, stages)
        where = f"request {index}, as {path}"
        assert not hub.faults_pending, where
        if message is not None:
            failed += 1
            assert hub.WRITE_TOKEN not in message and len(message.splitlines()) == 1, where
            command = "trl ama" if stages == ("train", "eval") else f"trl ama-{stages[0]}"
            assert f"Run `{command} --config …` again" in message or "push_to_hub is on, but" in message, where
            monkeypatch.setattr("trl_ama.common.hub.TIMEOUT", 60.0)
            assert attempt(finished, stages) is None, where
        assert state(hub) == expected, where
        assert finished.files() == files, where
        assert not hub.problems()
    assert len(paths) >= 10 and failed >= 4
    assert hub.WRITE_TOKEN not in "".join(capsys.readouterr())


@pytest.mark.parametrize("stages", PUSHES, ids="-".join)
def test_one_fault_is_retried(hub, finished, waits, nothing_computed, one_reading, no_page, monkeypatch, stages):
    """As a user has it: the push does not even fail, and no commit is made twice."""
    expected, files, paths = undisturbed(hub, finished, stages)
    for index, path in enumerate(paths):
        for kind in FAULT_KINDS if "/commit/" in path else [FAULT_KINDS[index % len(FAULT_KINDS)]]:
            arm(hub, kind, index, monkeypatch, 0.3)
            run_pipeline(*finished.parse(push_to_hub=True), stages=stages)
            assert state(hub) == expected, (index, kind)
            assert not hub.faults_pending and not hub.problems()
    assert finished.files() == files and waits


@pytest.mark.parametrize("call", [HfApi.repo_exists, HfApi.model_info, HfApi.whoami])
def test_no_request_waits_for_ever(hub, monkeypatch, call):
    """Also not one that says it has no limit."""
    monkeypatch.setattr("trl_ama.common.hub.TIMEOUT", 0.1)
    hub.fail("timeout", index=0, seconds=2.0)
    with time_limit(), pytest.raises(HUB_ERRORS, match="timed out"):
        call(HfApi(), *([] if call is HfApi.whoami else ["alice/any"]))
    assert not hub.faults_pending


def test_the_server_says_how_long_to_wait(hub, finished, waits, nothing_computed, one_reading, monkeypatch):
    monkeypatch.setattr("trl_ama.common.hub._WAIT", 0.01)
    hub.fail("429", match=lambda method, path: "/commit/" in path)
    finished(("losses",))
    assert waits == [1.0]  # its Retry-After
    monkeypatch.setattr("trl_ama.common.hub._MAX_WAIT", 0.5)
    hub.fail("429", match=lambda method, path: "/api/whoami-v2" in path)
    finished(("losses",))
    assert waits == [1.0, 0.5]
    hub.fail("500", match=lambda method, path: "/api/whoami-v2" in path, times=2)
    finished(("losses",))
    assert waits == [1.0, 0.5, 0.01, 0.02]


def test_what_is_wrong_for_good_is_not_tried_again(hub, finished, waits, nothing_computed, one_reading, monkeypatch):
    """The Hub's objection to a card comes as a `ValueError`, and so does an answer that is cut off."""
    monkeypatch.setattr(
        "trl_ama.pipeline.publishing.write_specialist_card",
        lambda settings, task, *args: (settings.folder.specialist(task) / "README.md").write_text(
            "---\nbase_model: /a/b\n---\n"
        ),
    )
    cards = {task: finished.output_dir / "specialists" / task / "README.md" for task in SIZES}
    before = {path: path.read_bytes() for path in cards.values()}
    try:
        with pytest.raises(
            AMAError, match='Invalid metadata in README.md.*"base_model" with value "/a/b" is not valid'
        ):
            finished(("specialists",))
    finally:
        for path, content in before.items():
            path.write_bytes(content)
    assert not waits


@pytest.mark.parametrize(("number", "kind"), enumerate(["500", "429", "reset", "truncated"]))
def test_one_repository_keeps_failing(
    hub, finished, waits, nothing_computed, one_reading, monkeypatch, capsys, number, kind
):
    """Everything else is done and pushed; the message says what is missing, where it lies and what pushes it."""
    expected, files, _ = undisturbed(hub, finished, STAGES)
    assert list(expected) == sorted(REPOSITORIES)
    place = repo_type, repo_id = REPOSITORIES[number]
    hub.reset()
    hub.fail(kind, match=lambda method, path: f"{repo_id}/preupload" in path, times=10**6)
    capsys.readouterr()
    with pytest.raises(AMAError) as caught:
        finished()
    what, folder = [
        ("The specialist of task 'list'", "specialists/list"),
        ("The specialist of task 'sort'", "specialists/sort"),
        ("The reference losses", "reference_losses"),
        ("The generalist", "generalists/ama_s"),
    ][number]
    message = str(caught.value)
    url = f"{hub.url}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    assert f"{what} could not be pushed to {url}: " in message
    assert f"It is complete in '{finished.output_dir / folder}'. Run `trl ama --config …` again to push it" in message
    assert message.count("could not be pushed") == 1 and len(message.splitlines()) == 1
    printed = "".join(capsys.readouterr())
    assert "Results: " in printed  # the last stage was reached
    assert printed.count("could not be pushed") == 1 and hub.WRITE_TOKEN not in printed + message
    found = state(hub)
    assert found.pop(place)[1] == 1  # created, and nothing in it
    assert found == {other: content for other, content in expected.items() if other != place}
    hub._faults.clear()
    assert attempt(finished, STAGES) is None
    assert state(hub) == expected and finished.files() == files
