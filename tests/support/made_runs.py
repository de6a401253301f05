"""A finished run's files, made without a model."""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_pairs import make_rows

from trl_ama.common.run_folder import MARGINS_FILE
from trl_ama.pipeline.pair_scores import write_margins
from trl_ama.report.page import write_page


TASKS = ["helpful", "code"]
STRATEGIES = ["ama_s", "proportional"]
FINGERPRINT = {
    "base_model": "base@sha256:1234",
    "reference_losses": {task: {"task": task, "test_pairs": f"pairs of {task}"} for task in TASKS},
    "learning_rate": 1e-4,
    "loss_type": ["sigmoid"],
    "beta": 0.1,
    "mixing": "ama_s",
    "model_init_kwargs": {"api_key": "sesame-open", "dtype": "bfloat16"},
    "pad_token": "<pad>",
    "versions": {"trl": "1.16.0"},
}
# Every way out of an element, an attribute, a script or the reading direction that a text may try
HOSTILE = [
    "<script>window.sentinel = 1</script>",
    "</script><script>window.sentinel = 2</script>",
    "</style><img src=x onerror='window.sentinel = 3'>",
    "\" onmouseover=\"window.sentinel = 4\" autofocus onfocus=\"window.sentinel = 5\" x=\"",
    "' onload='window.sentinel = 6",
    "<!--<script>", "-->", "]]>", "</title><svg onload=window.sentinel=7>", "</bdi></td></table><iframe srcdoc='<script>parent.sentinel=8</script>'>",
    "{{ 7 * 191 }}{% raw %}", "javascript:window.sentinel=9", "&lt;script&gt;", "\u202egnp.exe\u2066\u2028\x00\x1b[2J",
    "<base href=http://evil.example/>", "<meta http-equiv=refresh content='0;url=http://evil.example/'>",
]  # fmt: skip


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_run(folder: Path, tasks=TASKS, strategies=STRATEGIES, steps=30, pairs=12, texts=None, seed=0) -> Path:
    """A finished run's files, without a model: what the pipeline leaves, with numbers drawn at random.

    `texts` are put into the pairs of every task, as prompt and answers.
    """
    rng = np.random.default_rng(seed)
    policies = ["base", "specialists", *strategies]
    margins = {name: rng.normal(size=(len(tasks), pairs)).astype(np.float32) for name in policies}
    margins["base"][:] = 0
    by_policy = {}
    for name in policies:
        by_task = {}
        for task, own in zip(tasks, margins[name], strict=True):
            accuracy = float((0.5 * (1 + np.sign(own))).mean())
            by_task[task] = {
                "loss": float(np.log1p(np.exp(-own)).mean()),
                "accuracy": accuracy,
                "margin": float(own.mean()),
                "pairs": pairs,
                "accuracy_stderr": float(np.sqrt(accuracy * (1 - accuracy) / pairs)),
                "excess": float(rng.random()),
            }
        summary = {
            f"{prefix}_{key}": float(function(figures[key] for figures in by_task.values()))
            for key, worst in (("accuracy", min), ("margin", min), ("excess", max))
            for prefix, function in (("worst", worst), ("mean", lambda values: np.mean(list(values))))
        }
        by_policy[name] = {"by_task": by_task, "summary": summary}
    write(folder / "results.json", {"tasks": tasks, "policies": by_policy, "made_from": {"held_out": f"{seed}"}})
    ids = [f"{row:024x}" for row in range(pairs)]
    write_margins(
        folder / MARGINS_FILE,
        [task for task in tasks for _ in ids],
        [f"{number}{pair}" for number in range(len(tasks)) for pair in ids],
        {name: own.ravel() for name, own in margins.items()},
    )
    for number, task in enumerate(tasks):
        rows = [
            {"prompt": row["prompt"][0]["content"], "chosen": row["chosen"], "rejected": row["rejected"]}
            for row in make_rows("list", pairs, number)
        ]
        for row, text in zip(rows, texts or (), strict=False):
            row["prompt"] = text
            row["chosen"] = [{"role": text, "content": text}]
        table = {name: [row[name] for row in rows] for name in ("prompt", "chosen", "rejected")}
        logps = {"ref_chosen_logps": np.zeros(pairs), "ref_rejected_logps": np.zeros(pairs)}
        logps |= {
            "specialist_chosen_logps": margins["specialists"][number] * 10,
            "specialist_rejected_logps": np.zeros(pairs),
        }
        path = folder / f"reference_losses/t{number}/test.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"pair_id": [f"{number}{pair}" for pair in ids], **table, **logps}), path)
        note = {
            "order": number,
            "fingerprint": {"task": task, "test_pairs": f"pairs {number} {seed}", "data": f"org/{number}"},
        }
        write(path.parent / "fingerprint.json", note)
        own = by_policy["specialists"]["by_task"][task]
        result = {"steps": 7, "eval_loss": own["loss"], "eval_accuracy": own["accuracy"], "eval_margin": own["margin"]}
        write(
            folder / f"specialists/t{number}/stage.json",
            {"fingerprint": FINGERPRINT, "result": {**result, "eval_pairs": pairs, "base_loss": float(np.log(2))}},
        )
        for kind in ("reference_losses", "specialists"):
            if "/" not in task and "\x00" not in task:  # else no folder can have that name
                (folder / kind / f"t{number}").rename(folder / kind / task)
    for strategy in strategies:
        log = []
        for step in range(1, steps + 1):
            weights = rng.dirichlet(np.ones(len(tasks)))
            entry = {"step": step, "loss": 1.0}
            for task, weight in zip(tasks, weights, strict=True):
                values = {
                    "probability": weight,
                    "weight": weight,
                    "excess": rng.random(),
                    "clipped_fraction": rng.random(),
                }
                entry |= {f"ama/{figure}/{task}": float(value) for figure, value in values.items()}
            log.append(entry)
        write(folder / "generalists" / strategy / "trainer_state.json", {"log_history": log})
        note = {"fingerprint": {**FINGERPRINT, "mixing": strategy}, "result": {"steps": steps, "train_loss": 0.5}}
        write(folder / "generalists" / strategy / "stage.json", note)
        write(folder / "generalists" / strategy / "adapter_config.json", {})
    return folder


class Tree(HTMLParser):
    """The page's elements with their attributes, the text of each, and whether every one is closed."""

    VOID = {"meta", "br", "img", "link", "input"}

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder: Path) -> str:
    return write_page(folder).read_text(encoding="utf-8")


def words(page: str) -> str:
    """What is to be read on a page."""
    body = re.sub(r"(?s)<(script|style)[ >].*?</\1>", "", page)
    body = re.sub(r"</?(?:b|bdi|code|em|small|span|strong)\b[^>]*>", "", body)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


@pytest.fixture(name="finished", scope="module")
def finished_fixture(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture(name="copy")
def copy_fixture(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "mine")
