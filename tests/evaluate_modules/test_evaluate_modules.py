"""The modules for `evaluate`: loaded from their folders, equal to our own evaluation, and in the shape of a Space."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import yaml
from places import DOCS

from trl_ama import AMAError
from trl_ama.dpo.losses import excess_losses as training_excess
from trl_ama.evaluate_modules.excess_loss.formula import excess_losses
from trl_ama.metrics import METRICS, metric_folder, task_metrics, worst_and_mean


DOC = DOCS / "metrics.md"


@pytest.fixture
def load(tmp_path):
    return lambda name: evaluate.load(metric_folder(name), cache_dir=str(tmp_path / "cache"))


def test_numbers_by_hand(load):
    accuracy = load("pairwise_accuracy").compute(chosen=[1.0, 0.5, 2.0, 0.0], rejected=[0.0, 0.5, 3.0, -1.0])
    assert accuracy == {
        "accuracy": 0.625,
        "accuracy_stderr": pytest.approx((0.625 * 0.375 / 4) ** 0.5),
        "margin": 0.25,
    }
    excess = load("excess_loss")
    values = {"losses": [0.75, 0.5, 0.25, 1.0], "reference_losses": [0.5, 0.5, 0.75, 0.25]}
    assert excess.compute(**values) == {"excess": 0.25, "matched": 0.5}
    assert excess.compute(**values, clip=False)["excess"] == 0.125
    worst = load("worst_task")
    values = {"values": [0.0, 0.5, 1.0], "tasks": ["chat", "chat", "code"]}
    by_task = {"chat": 0.25, "code": 1.0}
    assert worst.compute(**values) == {"worst": 1.0, "worst_task": "code", "mean": 0.625, "by_task": by_task}
    best_is_greatest = worst.compute(**values, greater_is_better=True)
    assert (best_is_greatest["worst"], best_is_greatest["worst_task"]) == (0.25, "chat")


def test_a_worst_task_that_is_not_a_number(load):
    result = load("worst_task").compute(values=[float("nan"), 1.0], tasks=["a", "b"])
    assert np.isnan(result["mean"]) and result["worst_task"] in ("a", "b") and result["by_task"]["b"] == 1.0


def test_batches_are_added_up(load):
    module = load("worst_task")
    module.add_batch(values=[0.0, 0.5], tasks=["chat", "chat"])
    module.add(values=1.0, tasks="code")
    assert module.compute()["by_task"] == {"chat": 0.25, "code": 1.0}


def test_combined_modules_take_their_own_inputs(load):
    together = evaluate.combine([load(name) for name in METRICS])
    result = together.compute(
        chosen=[1.0], rejected=[0.0], losses=[1.0], reference_losses=[0.25], values=[3.0], tasks=["chat"]
    )
    assert (result["accuracy"], result["excess"], result["worst"]) == (1.0, 0.75, 3.0)


def test_equal_to_our_evaluation(load):
    rng = np.random.default_rng(0)
    names, count = ["chat", "code", "math"], 200
    tasks = rng.choice(2, count, p=[0.9, 0.1])  # math has no pairs
    losses, references, margins = (rng.normal(size=count) for _ in range(3))
    excess = excess_losses(losses, references)
    ours = task_metrics(tasks, losses, margins, excess, names)
    assert list(ours) == ["chat", "code"]
    labels = [names[task] for task in tasks]
    for key, values, greater in (("accuracy", 0.5 + 0.5 * np.sign(margins), True), ("excess", excess, False)):
        theirs = load("worst_task").compute(values=values, tasks=labels, greater_is_better=greater)
        assert theirs["by_task"] == {task: pytest.approx(figures[key]) for task, figures in ours.items()}
        assert theirs["worst"] == pytest.approx(worst_and_mean(ours)[f"worst_{key}"])
        assert theirs["mean"] == pytest.approx(worst_and_mean(ours)[f"mean_{key}"])
    rows = tasks == 1
    accuracy = load("pairwise_accuracy").compute(chosen=margins[rows], rejected=np.zeros(rows.sum()))
    assert accuracy == {key: pytest.approx(ours["code"][key]) for key in ("accuracy", "accuracy_stderr", "margin")}
    values = {"losses": losses[rows], "reference_losses": references[rows]}
    assert load("excess_loss").compute(**values)["excess"] == pytest.approx(ours["code"]["excess"])


def test_excess_is_the_one_that_training_descends():
    losses, references = torch.tensor([1.0, 0.5, 0.2], requires_grad=True), torch.tensor([0.4, 0.5, 0.6])
    for clip, name in ((True, "pair"), (False, "none")):
        ours, theirs = excess_losses(losses, references, clip), training_excess(losses, references, name)
        assert torch.equal(ours, theirs)
        gradients = [torch.autograd.grad(excess.sum(), losses)[0] for excess in (ours, theirs)]
        assert torch.equal(*gradients)
    assert excess_losses(losses.detach().numpy(), references.numpy()).min() == 0


@pytest.mark.parametrize("name", METRICS)
def test_shape_of_a_space(name):
    folder = Path(metric_folder(name))
    assert {path.name for path in folder.iterdir() if path.name != "__pycache__"} == {
        f"{name}.py", "formula.py", "README.md", "app.py", "requirements.txt",
    }  # fmt: skip
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])
    assert (
        header["sdk"] == "gradio" and header["app_file"] == "app.py" and {"evaluate", "metric"} <= set(header["tags"])
    )
    # `evaluate` copies what is imported relatively, and refuses what is not installed: nothing of ours may be needed
    script = (folder / f"{name}.py").read_text()
    for node in ast.walk(ast.parse(script + (folder / "formula.py").read_text())):
        if isinstance(node, ast.Import):
            assert len(node.names) == 1 and node.names[0].name in ("datasets", "evaluate", "numpy")
        elif isinstance(node, ast.ImportFrom):
            assert (node.level, node.module) == (1, "formula") or node.module in ("collections.abc", "typing")


@pytest.mark.parametrize("name", METRICS)
def test_examples_of_script_and_card(load, name):
    folder = Path(metric_folder(name))
    call, result = re.search(
        r"^    >>> (\w+\.compute.*)\n    (.*)$", (folder / f"{name}.py").read_text(), re.M
    ).groups()
    assert str(eval(call, {name: load(name)})) == result
    card = (folder / "README.md").read_text()
    assert f"{call}\n# {result}\n" in card


@pytest.fixture
def page():
    """The two snippets of the page."""
    return re.findall(r"^```python\n(.*?)^```", DOC.read_text(), re.DOTALL | re.MULTILINE)


def test_snippet_of_the_page(load, page, capsys):
    exec(compile(page[0], DOC.name, "exec"), {})
    said = re.findall(r"^# (\{.*\})$", page[0], re.MULTILINE)
    assert len(said) == len(METRICS)
    assert capsys.readouterr().out.splitlines()[: len(said)] == said


def test_published_module(hub, load, page):
    """Pushed as the page says and loaded by its name, formula included."""
    exec(compile(page[1], DOC.name, "exec"), {"metric_folder": metric_folder})
    files = {"excess_loss.py", "formula.py", "README.md", "app.py", "requirements.txt", ".gitattributes"}
    assert set(hub.tree("space", "org/excess_loss")) == files
    module = evaluate.load("org/excess_loss")
    assert module.compute(losses=[1.0], reference_losses=[0.5]) == {"excess": 0.5, "matched": 0.0}


def test_our_evaluation_does_not_import_evaluate():
    code = "import sys, trl_ama.metrics; print({'evaluate', 'datasets', 'torch'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.strip() == "set()"


def test_unknown_metric():
    with pytest.raises(AMAError, match="There is no metric 'bleu'; there are"):
        metric_folder("bleu")
