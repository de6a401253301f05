"""A finished run to push, on a network that need not be waited for."""

import hashlib
import time
import types

import pytest
import yaml
from hub_world import RECIPE, write_pairs
from trl import DPOTrainer, ModelConfig, TrlParser

from trl_ama import AMAConfig, TaskMixtureConfig, run_pipeline
from trl_ama.pipeline.run import STAGES
from trl_ama.recipe.arguments import PipelineArguments


REPOSITORIES = [
    ("model", "org/mine-list"),
    ("model", "org/mine-sort"),
    ("dataset", "org/mine-losses"),
    ("model", "org/mine"),
]


class Run:
    """A run's folder and the command that makes it."""

    def __init__(self, folder, recipe):
        self.folder, self.recipe = folder, recipe
        self.output_dir = folder / "run"

    def parse(self, **changes):
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump({**self.recipe, "output_dir": str(self.output_dir), **changes}))
        parser = TrlParser((PipelineArguments, AMAConfig, ModelConfig, TaskMixtureConfig))
        return parser.parse_args_and_config(["--config", str(path)])

    def __call__(self, stages=STAGES, **changes):
        return run_pipeline(*self.parse(**{"push_to_hub": True, **changes}), stages=stages)

    def files(self):
        """A hash of every file but the locks, which depend on which commands there were."""
        return {
            str(path.relative_to(self.output_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.output_dir.rglob("*")
            if path.is_file() and path.parent.name != ".locks"
        }


def make_recipe(model_dir, data_dir):
    return {
        **RECIPE,
        "model_name_or_path": model_dir,
        "tasks_dir": str(data_dir),
        "save_strategy": "steps",
        "save_steps": 2,
        "hub_model_id": "org/mine",
        "hub_losses_id": "org/mine-losses",
    }


_finished: list[Run] = []


@pytest.fixture(name="finished", scope="module")
def finished_fixture(model_dir, tmp_path_factory):
    """A finished run of which nothing was pushed. Pushing may change nothing in it but the cards, so all tests share it."""
    if not _finished:
        folder = tmp_path_factory.mktemp("finished")
        write_pairs(folder)
        run = Run(folder, make_recipe(model_dir, folder))
        run(push_to_hub=False)
        _finished.append(run)
    return _finished[0]


@pytest.fixture(name="waits")
def waits_fixture(monkeypatch):
    """No waiting; what would have been waited."""
    waited = []
    fake = types.SimpleNamespace(**{**vars(time), "sleep": waited.append})
    monkeypatch.setattr("trl_ama.common.hub.time", fake)
    monkeypatch.setattr("huggingface_hub.utils._http.time", fake)
    monkeypatch.setattr("huggingface_hub.file_download.time", fake)
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):  # downloads have limits of their own
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", 0.3)
    return waited


@pytest.fixture(name="nothing_computed")
def nothing_computed_fixture(monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("something was computed again")

    monkeypatch.setattr(DPOTrainer, "train", fail)
    for name in ("losses.score_reference_and_specialist", "evaluation.score_pairs", "specialists.score_pairs"):
        monkeypatch.setattr(f"trl_ama.pipeline.{name}", fail)
