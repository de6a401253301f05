"""The card of a dataset of reference losses: written anew with each push, around what its owner wrote into it."""

import re
from typing import Any

import yaml

from ..common.errors import AMAError
from ..common.hub import say
from ..common.run_folder import rows_file
from ..report.card_parts import hub_name, identity_link, template
from ..report.markdown import code, escape, fence, fill, table


# Fields of a fingerprint that every task has for itself; the others are the same within a config (run)
OWN_FIELDS = ("task", "specialist", "train_pairs", "test_pairs", "data", "versions")
_TAGS = ["trl", "ama", "ama-reference-losses", "dpo", "preference"]
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)


def losses_card(
    place: str,
    runs: dict[str, dict[str, dict[str, Any]]],
    specialists: dict[str, dict[str, str]],
    body: str,
    data: dict[str, Any],
) -> str:
    """The card of a loss dataset after a push.

    Args:
        place (`str`): The dataset's Hub id, with `@branch` if it is not the main one.
        runs (`dict`): Config → task → the note beside its files.
        specialists (`dict`): Config → task → Hub id of its specialist.
        body (`str`): The card's text so far; what stands outside trl-ama's sections is kept.
        data (`dict`): Its metadata so far; `trl_ama` is written anew from the notes.
    """
    described = {}
    for config, notes in runs.items():
        tasks = {}
        for task, note in notes.items():
            # In one line each: what reads the metadata of cards may take dashes on a line of their own for their end
            fingerprint = {
                " ".join(name.split()): " ".join(value.split()) if isinstance(value, str) else value
                for name, value in note["fingerprint"].items()
            }
            made_with = {field: value for field, value in fingerprint.items() if field not in OWN_FIELDS}
            tasks[task] = {
                **{field: fingerprint.get(field) for field in OWN_FIELDS if field != "task"},
                "rows": {
                    name.removesuffix(".parquet"): entry["rows"] for name, entry in sorted(note["files"].items())
                },
            }
            if specialists.get(config, {}).get(task):
                tasks[task]["specialist_repo"] = specialists[config][task]
        described[config] = {"made_with": made_with, "tasks": tasks}
    configs = data.get("configs") if isinstance(data.get("configs"), list) else []
    others = [entry for entry in configs if isinstance(entry, dict) and str(entry.get("config_name")) not in runs]
    tags = data.get("tags") if isinstance(data.get("tags"), list) else []
    data = {
        **data,
        "tags": [*tags, *(tag for tag in _TAGS if tag not in tags)],
        "configs": [*others, *(_data_files(name, run) for name, run in described.items())],
        "trl_ama": described,
    }
    body = body or template("losses_card.md").read_text(encoding="utf-8")
    sections = {
        "runs": "\n\n".join(_run(name, run) for name, run in described.items()),
        "loading": "\n\n".join(
            _loading(place, name if len(runs) > 1 else None, run["made_with"]) for name, run in described.items()
        ),
    }
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n\n{fill(body, sections)}"


def specialist_repos(data: dict[str, Any], config: str) -> dict[str, tuple[str | None, str]]:
    """Of a card's metadata: task → identity and Hub id of the specialist, where the card says one."""
    tasks = ((data.get("trl_ama") or {}).get(config) or {}).get("tasks") or {}
    return {
        task: (entry.get("specialist"), entry["specialist_repo"])
        for task, entry in tasks.items()
        if entry.get("specialist_repo") and hub_name(entry["specialist_repo"])
    }


def _data_files(name: str, run: dict[str, Any]) -> dict[str, Any]:
    splits = [
        split for split in ("train", "test") if any(split in entry.get("rows", {}) for entry in run["tasks"].values())
    ]
    return {
        "config_name": name,
        "data_files": [{"split": split, "path": f"{name}/*/{rows_file(split)}"} for split in splits],
    }


def _run(name: str, run: dict[str, Any]) -> str:
    made_with = run.get("made_with") or {}
    settings = [["made with", ""], ["base model", identity_link(made_with.get("base_model"))]]
    settings += [
        [escape(key.replace("_", " ")), code(str(value))]
        for key, value in made_with.items()
        if key != "base_model" and value is not None
    ]
    rows = [["task", "specialist", "data", "training pairs", "held-out pairs"]]
    for task, entry in run["tasks"].items():
        counts = entry.get("rows") or {}
        specialist = entry.get("specialist_repo") or entry.get("specialist")
        rows.append(
            [escape(task), identity_link(specialist), identity_link(entry.get("data"), "dataset"),
             str(counts.get("train", "–")), str(counts.get("test", "–"))]
        )  # fmt: skip
    return f"## Config {code(name)}\n\n{table(rows, numbers=2)}\n\n{table(settings, numbers=0)}"


def _loading(place: str, name: str | None, made_with: dict[str, Any]) -> str:
    repo_id, _, branch = place.partition("@")
    arguments = f'"{repo_id}"' + (f', "{name}"' if name else "") + (f', revision="{branch}"' if branch else "")
    python = (
        f"from datasets import load_dataset\n\nlosses = load_dataset({arguments})  # with `datasets` alone\n\n"
        f"from trl_ama import load_reference_losses\n\nlosses = load_reference_losses({arguments})  # with all checks"
    )
    base, _, commit = str(made_with.get("base_model")).partition("@")
    recipe = {
        "model_name_or_path": base,
        **({"model_revision": commit} if hub_name(f"{base}@{commit}") else {}),
        "reference_losses": place,
        **({"losses_config": name} if name else {}),
        **{
            key: made_with[key]
            for key in ("max_length", "truncation_mode", "ld_alpha", "dtype", "attn_implementation")
            if made_with.get(key) is not None
        },
        "bf16": made_with.get("mixed_precision") == "bf16",
        "mixing": "ama_s",
    }
    return (
        fence(python, "python")
        + "\n\nIn a recipe of `trl ama`, with what the numbers were made with:\n\n"
        + fence(yaml.safe_dump(recipe, sort_keys=False), "yaml")
    )


def read_losses_card(content: bytes, repo_id: str) -> tuple[str, dict[str, Any]]:
    """Text and metadata of a card that is there; the metadata are empty without front matter.

    Raises:
        AMAError: If it is no text, or has metadata that are not YAML or not ours to extend.
    """
    mend = "Mend its README.md, or push to another repository."
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise AMAError(f"The card of '{repo_id}' is no text ({say(error)}). {mend}") from None
    front = _FRONT_MATTER.match(text)
    if front is None:
        return text, {}
    try:
        data = yaml.safe_load(front[1])
    except Exception as error:  # besides its own errors, those of dates and numbers that are none, and of deep nesting
        raise AMAError(f"The card of '{repo_id}' has metadata that are not YAML ({say(error)}). {mend}") from None
    data = {} if data is None else data
    if not isinstance(data, dict) or not _are_runs(data.get("trl_ama")):
        raise AMAError(
            f"The card of '{repo_id}' has metadata that trl-ama did not write: its `trl_ama` is not a mapping from "
            f"configs to their settings and tasks. {mend}"
        )
    return text[front.end() :].lstrip("\n"), data


def _are_runs(runs: Any) -> bool:
    """Whether a card's `trl_ama` is as `losses_card` writes it; anybody may have edited it."""

    def is_flat(fields: Any, depth: int = 1) -> bool:
        return isinstance(fields, dict) and all(
            isinstance(name, str)
            and (is_flat(value, depth - 1) if depth and isinstance(value, dict) else _is_short(value))
            for name, value in fields.items()
        )

    return runs is None or (
        isinstance(runs, dict)
        and all(
            isinstance(name, str)
            and isinstance(run, dict)
            and is_flat(run.get("made_with") or {})
            and isinstance(run.get("tasks"), dict)
            and all(isinstance(task, str) and is_flat(entry) for task, entry in run["tasks"].items())
            and all(isinstance(entry.get("rows", {}), dict) for entry in run["tasks"].values())
            and all(
                isinstance(entry.get(name), (str, type(None)))
                for entry in run["tasks"].values()
                for name in ("specialist", "specialist_repo", "data")
            )
            and isinstance((run.get("made_with") or {}).get("base_model"), (str, type(None)))
            for name, run in runs.items()
        )
    )


def _is_short(value: Any) -> bool:
    return isinstance(value, (str, bool, int, float, type(None))) and len(str(value)) <= 4000
