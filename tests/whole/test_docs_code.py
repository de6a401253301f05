"""What the pages tell people to type: every YAML block, command, key and name of a figure is held against the code."""

import argparse
import dataclasses
import importlib
import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from docs_pages import PAGES, READMES, SCRIPTS, blocks, command_lines, inline_code, recipe_name
from docs_runs import IN_PYTHON, base_and_pairs_fixture  # noqa: F401 - fixtures
from hub_world import upload_model
from peft import LoraConfig, get_peft_model
from places import ROOT, TESTS
from tiny_pairs import make_dataset, write_pairs
from tiny_runs import QUICK
from transformers import AutoModelForCausalLM

from trl_ama import AMAConfig, AMATrainer, StepStatistics, TaskConfig, run_pipeline
from trl_ama.common.files import read_json
from trl_ama.mixing import STRATEGIES, build_strategy
from trl_ama.scripts import COMMANDS
from trl_ama.scripts.common import check_keys, make_parser, read_config, split_arguments


RECIPES = {recipe_name(block): block.text for page in [*READMES, *PAGES] for block in blocks(page, "yaml")}
# Pages whose Python blocks run in a test of their own, and where
ELSEWHERE = {
    "docs/publishing.md": "whole/test_docs.py",
    "docs/reusing.md": "whole/test_docs.py",
    "docs/your_data.md": "check/test_check.py",
    "docs/metrics.md": "evaluate_modules/test_evaluate_modules.py",
}
# Command lines of other programs, which are not run
OTHERS = {"pip", "hf", "export", "cd", "sha256sum"}


pytestmark = pytest.mark.usefixtures("restored_environment")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as the reader's: the recipes are there, and the files that pages tell to write."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "trl_ama").symlink_to(ROOT / "trl_ama")
    for name, text in RECIPES.items():
        if name is not None:
            (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- YAML ----


@pytest.mark.parametrize("page", [page for page in [*PAGES, *READMES] if blocks(page, "yaml")])
def test_yaml_blocks_parse_strictly(page, folder):
    for block in blocks(page, "yaml"):
        Path("block.yaml").write_text(block.text)
        parser = make_parser("ama")
        check_keys(read_config(["--config", "block.yaml"]), parser, launch_command_parser())
        parser.parse_args_and_config(["--config", "block.yaml", "--use_cpu"])


def known_keys() -> set[str]:
    keys = {field.name for field in dataclasses.fields(TaskConfig)}
    for parser in (make_parser("ama"), launch_command_parser(), *(script(name).make_parser() for name in COMMANDS)):
        keys |= {action.dest for action in parser._actions}
    return keys


def test_keys_and_flags_in_the_text_exist():
    known, seen = known_keys(), 0
    for page in PAGES:
        for code in inline_code(page):
            if re.fullmatch(r"[a-z]\w+: \S.*", code) and "…" not in code:
                for key in yaml.safe_load(code):
                    assert key in known or key == "fraction", f"{page}: `{code}`"
                    seen += 1
            for flag in [] if code.startswith(("hf ", "tests/")) else re.findall(r"(?<!\S)--(\w+)", code):
                # of scripts
                ours = {
                    "help",
                    "config",
                    "accelerate_config",
                    "published",
                    "cases",
                    "kills",
                    "variants",
                    "write",
                    "patience",
                    "limit",
                }
                assert flag in known | ours, f"{page}: `{code}`"
                seen += 1
    assert seen > 50


# ---- Commands ----


def script(command: str):
    return importlib.import_module(f"trl_ama.scripts.{command.replace('-', '_')}")


def check_command(command: str, flags: list[str]) -> None:
    """Parse a command line with the parsers that would get it."""
    assert command in COMMANDS
    if flags == ["--help"]:
        return
    module = script(command)
    if hasattr(module, "run_without_recipe"):
        module.make_parser().parse_args(flags)
    else:
        split_arguments(module.make_parser(), [*flags, "--use_cpu"])


def check_sbatch(words: list[str]) -> None:
    options, _, rest = " ".join(words).partition("recipes/launch.slurm ")
    assert rest, words
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    for name in ("model", "config", "stage", "accelerator"):
        parser.add_argument(f"--{name}")
    args = parser.parse_args(rest.partition(" -- ")[0].split())
    assert (ROOT / f"recipes/{args.model}/ama/config_{args.config}.yaml").is_file()
    assert args.stage is None or args.stage in COMMANDS
    assert args.accelerator is None or (ROOT / f"recipes/accelerate_configs/{args.accelerator}.yaml").is_file()


@pytest.mark.parametrize("page", [page for page in [*PAGES, *READMES, *SCRIPTS] if command_lines(page)])
def test_commands_parse(page, folder):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in command_lines(page):
        try:
            match words:
                case ["trl", command, *flags]:
                    check_command(command, flags)
                case ["trl-ama", *flags] if flags[0].startswith("-"):
                    check_command("ama", flags)
                case ["trl-ama", command, *flags] | ["python", "-m", "trl_ama", command, *flags]:
                    check_command(command, flags)
                case ["python", "-m", module, *_]:
                    assert importlib.util.find_spec(module) is not None
                case ["accelerate", "launch", path, *flags]:
                    assert (ROOT / path).is_file()
                    check_command(Path(path).stem.replace("_", "-"), flags)
                case ["python", path, *_] if path.endswith(".py"):
                    assert (ROOT / path).is_file()
                case ["make", target]:
                    assert target in targets
                case ["sbatch", *rest]:
                    check_sbatch(rest)
                case [program, *_]:
                    assert program in OTHERS
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page}: {' '.join(words)}: {error}") from error


def test_commands_in_the_text_exist():
    for page in PAGES:
        for code in inline_code(page):
            for command in re.findall(r"\btrl (ama[\w-]*)", code):
                assert command in COMMANDS, f"{page}: `{code}`"


# ---- Python ----


@pytest.fixture(scope="module")
def finished(model_dir, tmp_path_factory):
    """A folder in which the runs that pages speak of are there."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "data").mkdir()
    write_pairs(folder / "data", ["helpful", "code"], 16, 6)
    run = folder / "outputs/quickstart/run"
    flags = {
        **QUICK,
        "model_name_or_path": model_dir,
        "tasks_dir": folder / "data",
        "output_dir": run,
        "use_peft": True,
        "lora_target_modules": "all-linear",
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    tasks = ["{task: helpful, path: json}", "{task: code, path: json}"]
    run_pipeline(*make_parser("ama").parse_args_and_config([*words, "--tasks", *tasks]))
    for name in ("mine", "first", "second"):
        shutil.copytree(run, folder / "outputs" / name)
    return folder


def run_python(page: str, namespace: dict, quick: str = IN_PYTHON) -> dict:
    """Run a page's blocks one after the other; `quick` stands for `max_steps=300`. Returns their variables."""
    for block in blocks(page, "python"):
        exec(compile(block.text.replace("max_steps=300", quick), page, "exec"), namespace)
    return namespace


def test_every_python_block_is_run_by_a_test():
    tested = set(re.findall(r'run_python\("([\w./]+)"', (TESTS / "whole/test_docs_code.py").read_text()))
    for page, file in ELSEWHERE.items():
        assert Path(page).name in (TESTS / file).read_text()
    assert {page for page in [*PAGES, *READMES] if blocks(page, "python")} == {*tested, *ELSEWHERE}


def test_python_about_a_finished_run(finished, monkeypatch):
    monkeypatch.chdir(finished)
    pipeline = run_python("docs/pipeline.md", {})
    assert set(pipeline["losses"].column_names) >= {"task", "pair_id", "specialist_chosen_logps"}
    shutil.rmtree("outputs/mine/report")
    run_python("docs/report.md", {})
    assert Path("outputs/mine/report/index.html").is_file() and Path("comparison.html").is_file()
    quickstart = run_python("docs/quickstart.md", {})
    assert quickstart["answer"].shape[1] > quickstart["inputs"]["input_ids"].shape[1]
    if importlib.util.find_spec("bitsandbytes"):
        assert run_python("docs/qlora.md", {})["model"].get_base_model().is_loaded_in_4bit
    one_gpu = run_python("docs/single_gpu.md", {})
    assert str(one_gpu["model"].dtype) == "torch.bfloat16"


def test_python_about_streams(base_and_pairs, finished, monkeypatch):
    """The losses that a run of the pipeline has left, with their texts, log-probs and numbers of tokens."""
    monkeypatch.chdir(finished)
    trainer = run_python("docs/streaming.md", {})["trainer"]
    assert trainer.state.global_step == 2 and trainer.ref_model is None and trainer.has_reference_losses
    assert {"ama/excess/helpful", "ama/probability/code"} <= {
        key for entry in trainer.state.log_history for key in entry
    }


def test_python_of_the_trainer_and_the_installation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_python("docs/trainer.md", {}, "use_cpu=True, bf16=False")["args"].load_best_model_at_end
    assert run_python("docs/install.md", {})["AMATrainer"] is AMATrainer


def test_python_of_the_readme(base_and_pairs, tmp_path):
    for task in ("helpful", "harmless"):
        base = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        adapter = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        adapter.save_pretrained(tmp_path / task)
        upload_model(base_and_pairs, tmp_path / task, f"org/{task}-lora")
    tasks = {"list": "helpful", "sort": "harmless"}
    pairs, held_out = (
        make_dataset(sizes).map(lambda row: {"task": tasks[row["task"]]})
        for sizes in ({"list": 24, "sort": 12}, {"list": 6, "sort": 6})
    )
    result = run_python("README.md", {"dataset": pairs, "held_out": held_out})
    assert result["trainer"].state.global_step == 2
    assert {"eval_worst_excess", "eval_ama/excess/harmless"} <= set(result["trainer"].evaluate())


def test_python_of_the_page_on_strategies(base_and_pairs):
    try:
        result = run_python("docs/add_strategy.md", {"dataset": make_dataset({"list": 24, "sort": 12})})
        trainer, strategy = result["trainer"], result["trainer"].strategy
        assert type(strategy) is result["Lagging"] and trainer.state.global_step == 2
        # It has seen something, and its state is all that there is to know of it
        assert abs(strategy.probabilities() - 0.5).max() > 0 and strategy.probabilities().sum() == pytest.approx(1)
        twin = result["Lagging"](strategy.task_sizes)
        twin.load_state_dict(strategy.state_dict())
        assert (twin.probabilities() == strategy.probabilities()).all()
    finally:
        STRATEGIES.pop("lagging", None)


# ---- What is logged and said ----


def test_figures_in_the_text_are_logged(model_dir, finished, quick_args):
    data = make_dataset({"list": 12, "sort": 12})
    zeros = {f"{who}_{side}_logps": [0.0] * 24 for who in ("ref", "specialist") for side in ("chosen", "rejected")}
    for name, values in zeros.items():
        data = data.add_column(name, values)
    args = quick_args(eval_strategy="steps", eval_steps=2, max_steps=2)
    trainer = AMATrainer(model_dir, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry}
    stage = read_json(finished / "outputs/mine/specialists/code/stage.json")["result"]
    known = logged | {"ama/not_finite/list"}  # which only a step with such pairs has
    known |= {"eval_loss", "base_loss", "train_loss"} | known_keys()
    seen = 0
    for page in PAGES:
        for code in inline_code(page):
            if re.fullmatch(
                r"(eval_)?ama/[\w<>]+/<task>|rewards/\w+|eval_(worst|mean|loss|acc)\w*|grad_norm|base_loss", code
            ):
                name = code.replace("<task>", "list").replace("<figure>", "loss")
                assert name in known, f"{page}: `{code}`"
                seen += 1
    assert seen > 20
    assert {"train_loss", "steps", "base_loss"} <= set(stage)


def test_messages_on_the_page_are_those_of_the_code():
    """A quoted message has `…` where it varies; what is between stands in the source."""
    source = "\n".join(path.read_text() for path in sorted((ROOT / "trl_ama").rglob("*.py")))
    source = re.sub(r'"\n\s*f?"', "", source)
    source = source.replace("{what} made with", "was made with")  # of which the caller has the first word
    quotes = re.findall(r"^> (.*)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quotes) > 5
    for quote in quotes:
        for piece in quote.split("…"):
            piece = piece.strip(" ':.,")
            assert piece in source, f"no message of the code has: {piece}"


def test_every_config_field_is_a_known_key():
    """The list of keys is made from dataclasses; this holds it against the parser."""
    assert {field.name for field in dataclasses.fields(AMAConfig) if field.init} <= known_keys()


def test_the_worked_example_by_hand():
    """The numbers of the page on concepts, by the strategies themselves."""
    page = (ROOT / "docs/concepts.md").read_text()
    step = StepStatistics(
        counts=np.array([2.0, 2.0]),
        loss_sums=np.array([2.0, 2.0]),
        excess_sums=np.array([0.4 + 0.2, 0.1 + 0.0]),
        probabilities=np.array([0.5, 0.5]),
    )
    resampling = build_strategy("ama_s", np.array([5, 5]), mixing_lr=1.0, smoothing=0.2)
    reweighting = build_strategy("ama_r", np.array([5, 5]), mixing_lr=1.0)
    for strategy in (resampling, reweighting):
        strategy.observe(step)
    q, p = resampling.mixture_weights(), resampling.probabilities()
    assert f"q = ({q[0]:.3f}, {q[1]:.3f})" in page and f"({p[0]:.3f}, {p[1]:.3f})" in page
    first, second = reweighting.loss_weights()
    assert f"{first:.2f} times" in page and f"{second:.2f} times" in page
