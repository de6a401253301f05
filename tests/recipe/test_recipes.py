"""Every shipped recipe parses strictly, and runs with model and data swapped from the command line."""

import functools
import importlib.util
import json
import os
import random
import re
import shlex
import stat
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from datasets import Dataset, Features, List, Value
from places import ROOT
from tiny_models import make_model, save
from tiny_pairs import write_pairs
from trl import DPOConfig

from trl_ama import AMAConfig, run_pipeline
from trl_ama.recipe.arguments import PipelineArguments
from trl_ama.scripts.common import check_keys, make_parser, read_config, split_arguments
from trl_ama.scripts.recipe_check import PATH
from trl_ama.tasks.config import TaskMixtureConfig
from trl_ama.tasks.loading import load_tasks


FOLDER = ROOT / "recipes"
RECIPES = sorted(FOLDER.rglob("ama/*.yaml"))
NAMES = [str(path.relative_to(FOLDER)) for path in RECIPES]
ACCELERATE_CONFIGS = sorted(FOLDER.glob("accelerate_configs/*.yaml"))
# One of each folder, where only the tasks matter: a test below sees to it that its other configs have the same
FIRST = {path.parent.parent.name: path for path in reversed(RECIPES)}
AMA_KEYS = ("mixing", "mixing_lr", "smoothing", "excess_clip", "compare", "specialist_args")  # in every recipe
EVERY_AMA_KEY = {field.name for kind in (PipelineArguments, TaskMixtureConfig) for field in fields(kind)} | (
    {field.name for field in fields(AMAConfig)} - {field.name for field in fields(DPOConfig)}
)

MESSAGES = List({"role": Value("string"), "content": Value("string")})
TEXT = Value("string")
TEMPLATE_KWARGS = {
    "custom_instructions": TEXT,
    "enable_thinking": Value("bool"),
    "python_tools": List(TEXT),
    "xml_tools": List(TEXT),
}
# What public pages say of the datasets that the recipes name: splits, and columns with their types
PUBLIC = {
    "Anthropic/hh-rlhf": ({"train", "test"}, {"chosen": TEXT, "rejected": TEXT}),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {"train_prefs", "test_prefs"},
        {"prompt": TEXT, "chosen": MESSAGES, "rejected": MESSAGES, "score_chosen": Value("float64")},
    ),
    "HuggingFaceTB/smoltalk2": (
        {"llama_3.1_tulu_3_8b_preference_mixture_no_think", "tulu_3_8b_pref_mix_Qwen3_32B_Qwen3_0.6B_think"},
        {"chosen": MESSAGES, "rejected": MESSAGES, "prompt": TEXT, "chat_template_kwargs": TEMPLATE_KWARGS},
    ),
    "RLHFlow/CodeUltraFeedback-standard": (
        {"train"},
        {"rejected": MESSAGES, "chosen": MESSAGES, "chosen_score": TEXT, "rejected_score": TEXT},
    ),
    "argilla/distilabel-math-preference-dpo": (
        {"train"},
        {"metadata": TEXT, "instruction": TEXT, "chosen_response": TEXT, "rejected_response": TEXT},
    ),
    "coseal/CodeUltraFeedback_binarized": ({"train"}, {"instruction": TEXT, "chosen": TEXT, "rejected": TEXT}),
    "jondurbin/truthy-dpo-v0.1": ({"train"}, {"system": TEXT, "prompt": TEXT, "chosen": TEXT, "rejected": TEXT}),
}


def parse(path, *flags):
    return make_parser("ama").parse_args_and_config(["--config", str(path), "--use_cpu", *map(str, flags)])


parsed = functools.cache(parse)  # without flags, to be looked at


def recipe_tasks(path):
    return yaml.safe_load(path.read_text())["tasks"]


def test_there_are_recipes():
    assert {path.parent.parent.name for path in RECIPES} >= {
        "quickstart",
        "smollm2-135m-4tasks",
        "smollm2-1.7b",
        "smollm3-3b",
        "qwen3-4b",
        "llama-3.1-8b",
        "zephyr-7b",
    }
    assert {*FOLDER.rglob("*.yaml")} == {*RECIPES, *ACCELERATE_CONFIGS}
    assert {path.stem for path in RECIPES} <= {"config_full", "config_lora", "config_qlora"}


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe_parses_strictly(path):
    """`parse_args_and_config` raises on keys that no dataclass has; `check_keys` is what the command adds."""
    check_keys(read_config(["--config", str(path)]), make_parser("ama"), launch_command_parser())
    pipeline_args, training_args, model_args, task_args = parsed(path)
    assert model_args.model_name_or_path and len(task_args.tasks) > 1
    assert training_args.output_dir.startswith("outputs/")
    kind = path.stem.removeprefix("config_")
    assert model_args.use_peft == (kind != "full") and model_args.load_in_4bit == (kind == "qlora")
    if kind == "full":  # updates of this size would be lost in 16 bits
        assert model_args.dtype == "float32"


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe_is_written_like_the_others(path):
    text = path.read_text()
    lines = text.splitlines()
    schema = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", lines[0])
    assert (path.parent / schema[1]).resolve() == PATH, "the first line names the schema, for editors"
    assert re.match(r"# .*(GPU|CPU|cores)", lines[1]), "the comment after it names the hardware"
    keys = yaml.safe_load(text)
    assert set(AMA_KEYS) <= set(keys)
    for key in EVERY_AMA_KEY & set(keys):
        row = next(row for row, line in enumerate(lines) if line.startswith(f"{key}:"))
        assert "#" in lines[row] or lines[row - 1].startswith("#"), f"'{key}' lacks its comment"
    assert max(map(len, text.splitlines())) < 120
    folder = path.parent.parent
    readme = (folder / "README.md").read_text()
    index = (FOLDER / "README.md").read_text()
    assert f"]({folder.name}/README.md)" in index
    for task in recipe_tasks(path):
        assert task["task"] in readme
        assert task["path"] == "json" or f"https://huggingface.co/datasets/{task['path']}" in readme


@pytest.mark.parametrize("name", FIRST)
def test_the_configs_of_a_recipe_have_the_same_tasks(name):
    assert [recipe_tasks(path) for path in RECIPES if name in path.parts] == [recipe_tasks(FIRST[name])] * sum(
        name in path.parts for path in RECIPES
    )


def test_recipes_on_public_data_take_it_as_it_is():
    """Published datasets may hold pairs without an answer, and a template may write the date."""
    for path in RECIPES:
        pipeline_args, *_, task_args = parsed(path)
        assert task_args.drop_empty == ("quickstart" not in path.parts)
        assert (pipeline_args.template_date == "2025-07-08") == ("smollm3-3b" in path.parts)


def test_links_of_the_readmes():
    for page in FOLDER.rglob("README.md"):
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page} links to {target}"


def commands(page):
    """The `trl` commands of a README's code blocks, as words."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["trl"]:
                yield words[1:]


def test_commands_of_the_readmes(monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = set()
    for page in sorted(FOLDER.rglob("README.md")):
        for command, *flags in commands(page):
            split_arguments(make_parser(command), [*flags, "--use_cpu"])
            seen.add(ROOT / flags[flags.index("--config") + 1])
    assert seen == set(RECIPES)


def public_rows(path, split):
    """Three rows with the columns of a public dataset."""
    splits, columns = PUBLIC[path]
    assert split in splits, f"{path} has no split {split}"
    rows = []
    for number in range(3):
        question, answers = f"question {number}", {"chosen": f"good {number}", "rejected": f"bad {number}"}
        row = dict.fromkeys(columns, None) | {"prompt": question, "instruction": question}
        for side, answer in answers.items():
            row[f"{side}_response"] = row[side] = answer
            if path == "Anthropic/hh-rlhf":
                row[side] = f"\n\nHuman: {question}\n\nAssistant: {answer}"
            elif columns.get(side) == MESSAGES:
                row[side] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if "chat_template_kwargs" in columns:
            row["chat_template_kwargs"] = {"enable_thinking": split.endswith("_think") and "no_think" not in split}
        rows.append({name: row[name] for name in columns})
    return Dataset.from_list(rows, features=Features(columns))


@pytest.mark.parametrize("name", [name for name in FIRST if name != "quickstart"])
def test_columns_and_formats_fit_the_public_datasets(name, monkeypatch):
    def load_texts(split, path, **source):
        assert path != "Anthropic/hh-rlhf" or source["data_dir"] in ("helpful-base", "harmless-base")
        return public_rows(path, split), None

    monkeypatch.setattr("trl_ama.tasks.loading.load_texts", load_texts)
    tasks = recipe_tasks(FIRST[name])
    data = load_tasks(TaskMixtureConfig(tasks=tasks, test_split_size=0.3))
    assert data["train"].features["task"].names == [task["task"] for task in tasks]
    for part in data.values():
        for row in part:
            number = row["prompt"][0]["content"].removeprefix("question ")
            assert row["prompt"] == [{"role": "user", "content": f"question {number}"}]
            assert row["chosen"] == [{"role": "assistant", "content": f"good {number}"}]
            assert row["rejected"] == [{"role": "assistant", "content": f"bad {number}"}]
            if name == "smollm3-3b":
                task = tasks[row["task"]]["task"]
                assert row["chat_template_kwargs"]["enable_thinking"] == (task == "think")


@pytest.fixture(scope="module")
def pairs_dir(tmp_path_factory):
    """Files with pairs for the tasks of all recipes: as many as two steps draw, and the fewest held-out ones."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, dict.fromkeys(task["task"] for path in RECIPES for task in recipe_tasks(path)), 8, 2)
    return folder


@pytest.fixture(scope="module")
def one_layer(tokenizer, tmp_path_factory):
    """A model in which nothing is to be learned."""
    return save(make_model(len(tokenizer), num_hidden_layers=1), tokenizer, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model_for_4_bits(tokenizer, tmp_path_factory):
    """bitsandbytes quantises blocks of 64 weights, and on a CPU wants every row to be a whole number of them."""
    model = make_model(len(tokenizer), num_hidden_layers=1, hidden_size=64, intermediate_size=128)
    return save(model, tokenizer, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe_runs_with_model_and_data_swapped(path, one_layer, model_for_4_bits, pairs_dir, tmp_path):
    mixing = parsed(path)[1].mixing
    first = path == FIRST[path.parent.parent.name]
    tasks = recipe_tasks(path)[: None if first else 2]  # the others have the same
    flags = {
        "model_name_or_path": one_layer,
        "tasks_dir": pairs_dir,
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "specialist_args": "{max_steps: 2}",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_length": 64,
        "compare": "proportional" if path.stem == "config_lora" else mixing,  # or no other
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if path.stem == "config_qlora":
        pytest.importorskip("bitsandbytes")
        flags["model_name_or_path"] = model_for_4_bits
        flags["optim"] = "adamw_torch"  # paged 8-bit optimizers are for GPUs: seconds a step on a CPU
    words = [word for key, value in flags.items() for word in (f"--{key}", value)]
    results = run_pipeline(*parse(path, *words, "--tasks", *map(json.dumps, tasks)))
    assert results["tasks"] == [task["task"] for task in tasks]
    assert set(results["policies"]) == {"base", "specialists", flags["compare"], mixing}
    for stage in (tmp_path / "out").glob("*/*/stage.json"):
        assert json.loads(stage.read_text())["result"]["steps"] == 2


# ---- Accelerate and SLURM ----


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_the_config(path):
    assert path.read_text().startswith("# ")
    config = load_config_from_file(str(path))  # raises on keys that it does not know
    parser = launch_command_parser()
    options = {action.dest for action in parser._actions}
    assert options >= {*config.fsdp_config, *config.deepspeed_config}  # of these it would take any
    processes = "1" if path.stem == "single_gpu" else "2"
    args, _, _ = _validate_launch_command(
        parser.parse_args(["--config_file", str(path), "--num_processes", processes, "script.py"])
    )
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == (
        path.stem == "ddp",
        path.stem.startswith("fsdp"),
        path.stem.startswith("zero"),
    )
    assert args.mixed_precision == "bf16" and args.num_processes == int(processes)
    if args.use_fsdp:
        assert args.fsdp_version == int(path.stem[-1])
    if args.use_deepspeed:
        assert args.zero_stage == int(path.stem[-1]) and args.gradient_accumulation_steps is None  # the recipe's


def test_there_is_an_accelerate_config_for_each_way():
    assert {path.stem for path in ACCELERATE_CONFIGS} == {"single_gpu", "ddp", "fsdp1", "fsdp2", "zero2", "zero3"}


@pytest.fixture
def sbatch(tmp_path):
    """Runs `launch.slurm` with `srun` and `trl` that only say what they are told; returns the words `trl` got."""
    scripts = {
        "srun": 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"',
        "trl": 'printf "%s\\n" "$@" > "$CALLED"; exit "${TRL_CODE:-0}"',
        "scontrol": 'if [[ "$1" == show ]]; then printf "node-a\\nnode-b\\n"; else echo "scontrol $*" >> "$CALLED"; fi',
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    called, job = tmp_path / "called", tmp_path / "job"
    job.mkdir()
    (job / "recipes").symlink_to(FOLDER)  # not the repository itself, whose .venv the job would activate

    def run(*flags, code=0, trl_code=0, **slurm):
        called.unlink(missing_ok=True)
        path = f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", str(FOLDER / "launch.slurm"), *flags],
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
                "PATH": path,
                "CALLED": str(called),
                "TRL_CODE": str(trl_code),
                "SLURM_SUBMIT_DIR": str(job),
                **{f"SLURM_{name}": str(value) for name, value in slurm.items()},
            },
            capture_output=True,
            text=True,
        )
        assert result.returncode == code, result.stderr
        return called.read_text().splitlines() if called.exists() else result.stdout + result.stderr

    return run


def test_slurm_job_runs_a_stage(sbatch):
    config = "recipes/zephyr-7b/ama/config_lora.yaml"
    accelerate_config = "recipes/accelerate_configs/single_gpu.yaml"
    words = sbatch("--model", "zephyr-7b", "--config", "lora", "--", "--max_steps", "5", "--tasks_dir", "my pairs")
    assert words == [
        *("ama", "--config", config, "--accelerate_config", accelerate_config),
        *("--max_steps", "5", "--tasks_dir", "my pairs"),
    ]
    flags = ("--model", "zephyr-7b", "--config", "full", "--stage", "ama-losses", "--accelerator", "fsdp2")
    words = sbatch(*flags, NNODES=2, GPUS_ON_NODE=4, JOB_ID=12, JOB_NODELIST="node-[a-b]", NODEID=1)
    assert words[0] == "ama-losses" and words[4].endswith("fsdp2.yaml")
    assert words[5:] == [
        *("--num_processes", "8", "--num_machines", "2", "--main_process_ip", "node-a"),
        *("--main_process_port", "20012", "--machine_rank", "1"),
    ]
    assert {"num_machines", "main_process_ip", "main_process_port", "machine_rank"} <= {
        action.dest for action in launch_command_parser()._actions
    }


def test_slurm_job_that_wants_to_go_on_is_put_back_once(sbatch):
    flags = ("--model", "zephyr-7b", "--config", "lora")

    def put_back(code, **slurm):
        words = sbatch(*flags, code=code, trl_code=code, JOB_ID=12, **slurm)
        return [word for word in words if word.startswith("scontrol")]

    assert put_back(75) == ["scontrol requeue 12"]
    assert put_back(75, ARRAY_JOB_ID=11, ARRAY_TASK_ID=0) == ["scontrol requeue 11_0"]
    for code in (0, 1, 2, 130, 143):
        assert put_back(code) == []


def test_slurm_job_says_what_is_wrong(sbatch):
    assert "sbatch" in sbatch("--help")
    for flags, text in (
        (["--config", "lora"], "--model and --config are needed"),
        (["--model", "zephyr-7b", "--config", "huge"], "no file 'recipes/zephyr-7b/ama/config_huge.yaml'"),
        (["--model", "zephyr-7b", "--config", "lora", "--accelerator", "zero9"], "zero9.yaml"),
        (["--model", "zephyr-7b", "--config", "lora", "--stage", "train"], "unknown stage 'train'"),
        (["--model", "zephyr-7b", "--config", "lora", "--max_steps", "5"], "after '--'"),
    ):
        assert text in sbatch(*flags, code=2)
    flags = ("--model", "zephyr-7b", "--config", "lora", "--stage", "ama-eval")
    assert "not an evaluation" in sbatch(*flags, code=2, ARRAY_TASK_ID=0)


@pytest.mark.parametrize("name", FIRST)
def test_array_job_has_one_task_each(sbatch, name):
    path = FIRST[name]
    flags = ("--model", name, "--config", path.stem.removeprefix("config_"))
    tasks = recipe_tasks(path)
    for number in (0, len(tasks) - 1):
        words = sbatch(*flags, "--stage", "ama-specialists", ARRAY_TASK_ID=number)
        assert words[0] == "ama-specialists" and words[5:] == ["--only_tasks", tasks[number]["task"]]
        assert parse(path, *words[5:])[0].only_tasks == [tasks[number]["task"]]
    assert "nothing to do" in sbatch(*flags, "--stage", "ama-specialists", ARRAY_TASK_ID=len(tasks))


def test_array_tasks_make_what_the_whole_run_finds_done(sbatch, one_layer, pairs_dir, tmp_path, capsys):
    path = FOLDER / "zephyr-7b" / "ama" / "config_lora.yaml"
    tasks = [task["task"] for task in recipe_tasks(path)]
    flags = ["--model_name_or_path", one_layer, "--tasks_dir", pairs_dir, "--output_dir", tmp_path / "out"]
    flags += ["--max_steps", 1, "--save_strategy", "no", "--disable_tqdm", "true"]
    for number in range(len(tasks)):
        words = sbatch("--model", "zephyr-7b", "--config", "lora", ARRAY_TASK_ID=number)
        assert words[0] == "ama"
        assert run_pipeline(*parse(path, *flags, *words[5:])) is None
        left = [task for task in tasks if task not in tasks[: number + 1]]
        text = f"still missing of {left}" if left else "all reference losses are there"
        assert text in capsys.readouterr().out
    assert not (tmp_path / "out" / "generalists").exists() and not (tmp_path / "out" / "report").exists()
    run_pipeline(*parse(path, *flags), stages=("specialists", "losses"))
    plan = capsys.readouterr().out
    assert "training\n" not in plan
    for task in tasks:
        assert re.search(rf"specialist +{task} +done", plan) and re.search(rf"reference losses +{task} +done", plan)


# ---- The quickstart ----


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", FOLDER / "quickstart" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_quickstarts_tasks_are_what_its_readme_says(quickstart):
    tasks, _ = quickstart.make_tasks(random.Random(0))
    again, _ = quickstart.make_tasks(random.Random(0))
    other, _ = quickstart.make_tasks(random.Random(1))
    assert tasks == again != other
    assert {task: len(splits["train"]) for task, splits in tasks.items()} == {"list": 1000, "brief": 1000, "sort": 100}
    prompts = [row["prompt"][-1]["content"] for splits in tasks.values() for rows in splits.values() for row in rows]
    lists = [prompt.split(":", 1)[1] for prompt in prompts]
    assert len(set(lists)) == len(lists)  # no word list twice, so none in train and test
    for task, splits in tasks.items():
        rejected = []
        for row in splits["train"]:
            instruction, words = row["prompt"][-1]["content"].split(":")
            words = words.split()
            answers = {"list": words, "brief": words[:1], "sort": sorted(words)}
            assert instruction == task and len(set(map(tuple, answers.values()))) == 3
            assert row["chosen"][0]["content"].split() == answers[task]
            wrong = row["rejected"][0]["content"].split()
            rejected.append(next(name for name, answer in answers.items() if answer == wrong))
        share = rejected.count(max(set(rejected), key=rejected.count)) / len(rejected)
        assert task not in rejected and share < 0.65  # a fair coin between the other two ways
