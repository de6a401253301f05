"""Tokens that may not push, a Hub that cannot be reached, and no network at all: one sentence, before anything is trained."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from hub_server import HubServer
from hub_world import SIZES, parse, upload_model, upload_pairs, write_pairs, write_recipe
from places import ROOT, SUPPORT
from ready import Job, run_module
from surroundings import HUB_ENVIRONMENT, client_env, logged_in
from tiny_pairs import make_dataset
from trl import DPOTrainer

from trl_ama import AMAConfig, AMAError, AMATrainer, run_pipeline
from trl_ama.dpo.rehearsal import _Rehearsal


TOKENS = {
    "absent": (None, "there is no Hugging Face token"),
    "wrong": ("hf_NobodyKnowsThisToken", "refuses the token: it is wrong or was revoked"),
    "read": (HubServer.READ_TOKEN, "the token of 'alice' may only read"),
    "fine-grained": (HubServer.FINE_TOKEN_READ, "the token of 'alice' may only read"),
    "foreign": (HubServer.OTHER_TOKEN, "the token of 'mallory' can write to ['mallory'] only"),
}


@pytest.fixture
def login(monkeypatch):
    def set_token(token):
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            monkeypatch.setenv("HF_TOKEN", token)

    return set_token


@pytest.fixture
def nothing_begun(monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("something was trained or loaded to be trained")

    make = DPOTrainer.__init__

    def rehearse(trainer, *args, **kwargs):
        return make(trainer, *args, **kwargs) if isinstance(trainer, _Rehearsal) else fail()  # which loads no weights

    monkeypatch.setattr(DPOTrainer, "__init__", rehearse)
    monkeypatch.setattr(DPOTrainer, "train", fail)


@pytest.fixture
def recipe(model_dir, tmp_path):
    """Builds the parsed recipe of a run that pushes to `org/mine`, with everything it reads on this machine."""
    write_pairs(tmp_path)

    def build(**changes):
        settings = {
            "model_name_or_path": model_dir,
            "tasks_dir": str(tmp_path),
            "output_dir": str(tmp_path / "run"),
            "push_to_hub": True,
            "hub_model_id": "org/mine",
        }
        return write_recipe(tmp_path / "config.yaml", **{**settings, **changes})

    return build


def one_sentence(error, *tokens):
    """What is wrong and what to do, on one line, without a token."""
    text = str(error)
    assert len(text.splitlines()) == 1
    assert not any(token in text for token in (*tokens, HubServer.WRITE_TOKEN) if token)
    return text


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("place", ["login", "hub_token"])
def test_tokens(hub, recipe, login, nothing_begun, tmp_path, capsys, name, place):
    token, message = TOKENS[name]
    login(token if place == "login" else None)
    changes = {"hub_token": token} if place == "hub_token" and token else {}
    with pytest.raises(AMAError) as caught:
        run_pipeline(*parse(recipe(**changes)))
    text = one_sentence(caught.value, token)
    assert message in text and ("push_to_hub: false" in text or "another token" in text)
    assert token is None or token not in "".join(capsys.readouterr())
    assert not hub.repos and {request.method for request in hub.requests} <= {"GET"}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("token", [HubServer.WRITE_TOKEN, HubServer.FINE_TOKEN_WRITE])
def test_tokens_that_may_write(hub, recipe, login, token):
    login(token)
    run_pipeline(*parse(recipe()), stages=("specialists",))
    assert sorted(hub.repos) == [("model", "org/mine-list"), ("model", "org/mine-sort")]
    assert all("adapter_model.safetensors" in hub.tree(*place) for place in hub.repos)


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_in_python(hub, login, model_dir, quick_args, monkeypatch, name):
    token, message = TOKENS[name]
    login(token)
    monkeypatch.setattr(DPOTrainer, "train", lambda *args: pytest.fail("something was trained"))
    with pytest.raises(AMAError) as caught:
        AMATrainer(
            model=model_dir,
            args=quick_args(AMAConfig, mixing="uniform", push_to_hub=True, hub_model_id="org/x"),
            train_dataset=make_dataset({"list": 16, "sort": 16}),
        )
    assert message in one_sentence(caught.value, token) and not hub.repos


@pytest.mark.parametrize("kind", ["500", "429", "reset", "timeout", "truncated"])
def test_the_trainer_creates_its_repository_on_a_bad_network(hub, model_dir, quick_args, monkeypatch, kind):
    monkeypatch.setattr("trl_ama.common.hub._WAIT", 0.01)
    monkeypatch.setattr("trl_ama.common.hub._MAX_WAIT", 0.05)
    monkeypatch.setattr("trl_ama.common.hub.TIMEOUT", 0.3 if kind == "timeout" else 60.0)
    settings = {"mixing": "uniform", "push_to_hub": True, "hub_model_id": "org/x"}
    data = make_dataset({"list": 16, "sort": 16})
    for path in ("/api/whoami-v2", "/api/repos/create"):
        hub.fail(kind, match=lambda method, asked, path=path: asked == path)
    AMATrainer(model=model_dir, args=quick_args(AMAConfig, **settings), train_dataset=data)
    assert hub.exists("model", "org/x") and not hub.faults_pending
    hub.fail(kind, match=lambda method, path: path == "/api/repos/create", times=10**6)
    with pytest.raises(AMAError, match="'org/x' cannot be created or written") as caught:
        AMATrainer(model=model_dir, args=quick_args(AMAConfig, **settings), train_dataset=data)
    one_sentence(caught.value)


def environment(home, token, *more):
    return {**client_env(home, token), "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *more)))}


def test_the_command_says_it_in_one_line(hub, recipe, hub_home):
    arguments = ["ama-specialists", "--config", str(recipe())]
    environ = environment(hub_home, HubServer.READ_TOKEN)
    done = Job(run_module, "trl_ama", arguments, folder=hub_home, environ=environ)
    assert done.wait() == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and lines[0].startswith("trl ama-specialists: error: ") and "may only read" in lines[0]
    assert "Traceback" not in done.stderr and HubServer.READ_TOKEN not in done.stdout + done.stderr
    assert not hub.repos


def test_a_hub_that_cannot_be_reached(hub, recipe, nothing_begun, monkeypatch):
    gone = HubServer().start()
    gone.stop()
    monkeypatch.setattr("trl_ama.common.hub._WAIT", 0.01)
    for module in ("huggingface_hub.constants.ENDPOINT", "huggingface_hub.hf_api.ENDPOINT"):
        monkeypatch.setattr(module, gone.url, raising=False)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", gone.url)
    with pytest.raises(AMAError, match=f"the Hub at {gone.url} cannot be asked.*ConnectError.*Try again") as caught:
        run_pipeline(*parse(recipe()))
    one_sentence(caught.value)


OFFLINE = """
import gc, json, os, runpy, shutil, sys
gc.disable()
from kept import keep_and_freeze
from trl import ModelConfig, TrlParser
from trl_ama import AMAConfig, AMAError, TaskMixtureConfig, run_pipeline
from trl_ama.recipe.arguments import PipelineArguments

keep_and_freeze()
gc.enable()
recipe, again, output_dir = sys.argv[1:]

def run(*flags):
    parser = TrlParser((PipelineArguments, AMAConfig, ModelConfig, TaskMixtureConfig))
    return run_pipeline(*parser.parse_args_and_config(["--config", recipe, *flags]))

print("results:", json.dumps(run()))
try:
    run("--push_to_hub", "true")
except AMAError as error:
    print("refused:", error)
shutil.rmtree(os.environ["HF_HOME"])
print("with an empty cache", file=sys.stderr, flush=True)
sys.argv = ["ama.py", "--config", again, "--output_dir", output_dir]
runpy.run_module("trl_ama.scripts.ama", run_name="__main__")
"""


@pytest.fixture(scope="module")
def online(model_dir, tmp_path_factory):
    """A recipe with everything on the Hub, run once: ready losses of one task, a ready specialist of another. Returns it with
    its results and the cache that the run has left."""
    folder = tmp_path_factory.mktemp("online")
    with logged_in() as hub:
        upload_model(hub, model_dir)
        for task, count in SIZES.items():
            upload_pairs(hub, task, count)
        first = write_recipe(folder / "first.yaml", push_to_hub=True, hub_model_id="org/mine")
        run_pipeline(*parse(first, "--output_dir", folder), stages=("specialists", "losses"))
        tasks = [
            {"task": task, "path": f"org/{task}-pairs", "eval_split": "test", **extra}
            for task, extra in (("list", {}), ("new", {"specialist": "org/mine-sort", "path": "org/sort-pairs"}))
        ]
        recipe = write_recipe(
            folder / "second.yaml", tasks=tasks, reference_losses="org/mine-reference-losses", push_to_hub=False
        )
        results = run_pipeline(*parse(recipe, "--output_dir", folder / "online"))
        return recipe, results, shutil.copytree(HUB_ENVIRONMENT["HF_HOME"], folder / "hf_home", symlinks=True)


@pytest.fixture(scope="module")
def offline(online, tmp_path_factory):
    """A process without a network, with the cache of that run and then with an empty one. Returns it with its folder and what
    it asked of the Hub."""
    finished, _, home = online
    folder = tmp_path_factory.mktemp("without_network")
    recipe = folder / "recipe.yaml"
    recipe.write_text(finished.read_text() + f"output_dir: {folder / 'offline'}\n")
    shutil.copytree(home, folder / "hf_home", symlinks=True)
    with logged_in() as hub:
        done = subprocess.run(
            [sys.executable, "-c", OFFLINE, *map(str, (recipe, finished, folder / "empty"))],
            env={**environment(folder / "hf_home", HubServer.WRITE_TOKEN, SUPPORT), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done, folder, list(hub.requests)


def figures(value, name="") -> dict[str, float]:
    """Every number in nested mappings, by its path."""
    if not isinstance(value, dict):
        return {name: value}
    return {path: number for key, inner in value.items() for path, number in figures(inner, f"{name}/{key}").items()}


def test_offline(online, offline):
    results, (done, _, requests) = online[1], offline
    assert "with an empty cache\n" in done.stderr, done.stderr[-2000:]
    found, refusal = (
        line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith(("results:", "refused:"))
    )
    found = json.loads(found)
    # The generalist is another one: its adapter starts from the random numbers that the process has drawn so far
    assert found["policies"].keys() == results["policies"].keys()
    for name in ("base", "specialists"):
        # Another process rounds otherwise, where threads or memory's alignment differ
        assert figures(found["policies"][name]) == pytest.approx(
            figures(results["policies"][name]), rel=1e-5, abs=1e-6
        )
    for name in ("reference_losses", "held_out"):
        assert found["made_from"][name] == results["made_from"][name]
    assert "HF_HUB_OFFLINE=1 forbids it" in one_sentence(refusal)
    assert not requests and HubServer.WRITE_TOKEN not in done.stdout + done.stderr


def test_offline_with_an_empty_cache(offline):
    done, folder, requests = offline
    assert done.returncode == 2, done.stderr
    said = done.stderr.partition("with an empty cache\n")[2]
    lines = [line for line in said.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and lines[0].startswith("trl ama: error: The base model 'org/base' cannot be read: ")
    assert "Traceback" not in said and HubServer.WRITE_TOKEN not in said
    assert not requests and not (folder / "empty").exists()
