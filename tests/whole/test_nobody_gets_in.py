"""Tokens that want out; names and repositories that want in."""

import logging
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
from forgery import honest_losses, readable
from hub_world import SIZES, parse, upload_model, upload_pairs, write_recipe
from huggingface_hub import HfApi, constants

from trl_ama import AMAError, load_reference_losses, run_pipeline
from trl_ama.common.hub import HubTarget, say
from trl_ama.common.secrets import redact
from trl_ama.recipe.settings import RunSettings
from trl_ama.recipe.text import recipe_yaml
from trl_ama.tasks.config import check_config_name, check_task_names


# ---- Tokens ----


def leaks(data: bytes, secrets) -> list[str]:
    return [secret for secret in secrets if secret.encode() in data]


def leaking_files(folder: Path, secrets) -> list[str]:
    found = []
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        parts = [path.read_bytes()]
        if zipfile.is_zipfile(path):  # what torch saves
            with zipfile.ZipFile(path) as archive:
                parts += [archive.read(name) for name in archive.namelist()]
        found += [str(path.relative_to(folder)) for part in parts if leaks(part, secrets)]
    return found


def test_no_token_gets_out(hub, model_dir, tmp_path, monkeypatch, capfd, caplog):
    """A whole run with three tokens, one in each place that takes one, and a server that echoes them in an error."""
    secrets = (hub.WRITE_TOKEN, hub.FINE_TOKEN_WRITE, hub.READ_TOKEN)
    upload_model(hub, model_dir)
    for task, count in SIZES.items():
        upload_pairs(hub, task, count)
    upload = HfApi.upload_folder

    def echo(api, *, repo_id, **kwargs):
        if repo_id == "org/mine-sort":
            raise OSError(f"refused: Authorization: Bearer {hub.FINE_TOKEN_WRITE} nor {hub.WRITE_TOKEN}")
        return upload(api, repo_id=repo_id, **kwargs)

    monkeypatch.setattr(HfApi, "upload_folder", echo)
    monkeypatch.setattr("trl_ama.common.hub.RETRIES", 0)
    caplog.set_level(logging.INFO)
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        push_to_hub=True,
        hub_model_id="org/mine",
        hub_token=hub.FINE_TOKEN_WRITE,
        model_init_kwargs={"token": hub.READ_TOKEN},
        report_to="tensorboard",
        save_strategy="steps",
        save_steps=2,
        hub_strategy="all_checkpoints",
    )
    arguments = parse(recipe, "--output_dir", tmp_path / "run")
    with warnings.catch_warnings(record=True) as warned, pytest.raises(AMAError) as caught:
        warnings.simplefilter("always")
        run_pipeline(*arguments)
    assert "refused: Authorization: Bearer hf_… nor hf_…" in str(caught.value)
    settings = RunSettings(*arguments)
    said = [*map(repr, (arguments, settings, settings.recipe, settings.inputs, settings.folder, caught.value))]
    said.append(repr(settings.recipe.scoring_arguments(settings.inputs.has_images)))
    said += [str(arguments[1]), arguments[1].to_json_string(), str(arguments[1].to_dict()), str(caught.value)]
    said += [
        repr(HubTarget("org/mine", token=hub.FINE_TOKEN_WRITE)),
        recipe_yaml(settings.recipe),
        recipe_yaml(settings.recipe, "list"),
    ]
    said += [str(warning.message) for warning in warned] + [*capfd.readouterr(), caplog.text]
    assert not leaks("\n".join(said).encode(), secrets)
    run = tmp_path / "run"
    names = {path.name for path in run.rglob("*")}
    assert {"training_args.bin", "trainer_state.json", "stage.json", "results.json", "README.md"} <= names
    assert any(name.startswith("checkpoint-") for name in names) and any("tfevents" in name for name in names)
    assert not leaking_files(run, secrets)
    for kind, name in hub.repos:
        for path, content in hub.tree(kind, name).items():
            (tmp_path / "hub" / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "hub" / name / path).write_bytes(content)
    assert (tmp_path / "hub/org/mine/checkpoint-2/training_args.bin").is_file()
    assert not leaking_files(tmp_path / "hub", secrets)
    assert arguments[1].hub_token == hub.FINE_TOKEN_WRITE  # it was there all the time


def test_the_search_finds_tokens(hub, tmp_path):
    """Otherwise the test above would prove nothing."""
    import torch
    from torch.utils.tensorboard import SummaryWriter

    torch.save({"token": hub.READ_TOKEN}, tmp_path / "training_args.bin")
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_text("args", hub.READ_TOKEN)
    assert len(set(leaking_files(tmp_path, [hub.READ_TOKEN]))) == 2


def test_secrets_in_values(hub, model_dir, tmp_path):
    """Not only under keys that tell of them."""
    secret = hub.OTHER_TOKEN
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        model_name_or_path=model_dir,
        specialist_args={
            "run_name": f"x {hub.WRITE_TOKEN} {secret}",
            "hub_token": secret,
            "model_init_kwargs": {"proxies": {"https": f"http://me:{secret}@proxy"}, "token": secret},
        },
        tasks=[
            {"task": "list", "path": "json", "data_files": "https://me:Pa55word@x.org/a.jsonl?token=Pa55word&x=1"},
            {"task": "sort", "path": "json", "data_files": {"train": "file:///home/me/a.jsonl"}},
        ],
    )
    text = recipe_yaml(RunSettings(*parse(recipe, "--output_dir", tmp_path / "run")).recipe)
    assert not leaks(text.encode(), [secret, hub.WRITE_TOKEN, "Pa55word", "/home/me"]), text
    assert "x.org/a.jsonl" in text and "x=1" not in text  # a query may be a signature, whatever it is called


def test_errors_are_without_tokens(hub):
    assert say(OSError(f"a {hub.WRITE_TOKEN} b {hub.READ_TOKEN}"), hub.READ_TOKEN) == "OSError: a hf_… b hf_…"
    assert redact(f"{hub.READ_TOKEN}", None) == hub.READ_TOKEN  # only those that this process knows


# ---- Paths ----

NAMES = [
    "../x", "..", ".", "/tmp/x", "a/b", "a\\b", "a/../b", "x\0y", "x" * 65, ".hidden", "-x", "", " ", "a b", "a\n",
    "\u0430bc", "a\u2215b", "a\u202eb", "\uff0e\uff0e", "a..b", "~", "$HOME", "%2e%2e", "C:", "CON", "nul", "com1.txt", "a.",
    None, 5, ["a"],
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_that_are_no_folders(name, honest, tmp_path):
    for check in (lambda: check_task_names([name]), lambda: check_config_name(name)):
        with pytest.raises(AMAError) as caught:
            check()
        readable(caught.value, repr(name), "cannot be a folder name")
    if name is not None:
        with pytest.raises(AMAError):
            load_reference_losses(str(honest), name)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return honest_losses(tmp_path_factory.mktemp("honest"))


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": [{"task": "../../evil", "path": "org/list-pairs"}]},
        {"tasks": [{"task": "list", "path": "org/list-pairs", "specialist_args": {"output_dir": "../evil"}}]},
        {"specialist_args": {"output_dir": "/tmp/evil"}},
        {"specialist_args": {"no_such": 1}},
        {"losses_config": "../.."},
        {"losses_config": "a/../../b"},
        {"mixing": "../evil"},
        {"compare": ["../evil"]},
        {"hub_model_id": "../../evil"},
        {"hub_model_id": "org/../evil"},
        {"hub_model_id": "org/.."},
        {"hub_model_id": "org/evil?x=1"},
        {"hub_model_id": "http://evil/x"},
        {"hub_specialist_id": "../{task}"},
        {"hub_specialist_id": "org/{task}/../x"},
        {"hub_specialist_id": "org/{task}{task.__class__}"},
        {"hub_losses_id": "org/a/b"},
        {"reference_losses": "../../evil"},
        {"reference_losses": "org/../evil"},
        {"reference_losses": "org/x@../../evil"},
    ],
    ids=str,
)
def test_recipes_that_lead_elsewhere(hub, model_dir, tmp_path, changes, monkeypatch):
    monkeypatch.setattr("trl_ama.common.hub.RETRIES", 0)
    place = tmp_path / "a" / "b" / "c"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    for task in SIZES:
        upload_pairs(hub, task, 4)
    recipe = write_recipe(place / "recipe.yaml", model_name_or_path=model_dir, push_to_hub=True, hub_model_id="org/x")
    recipe = write_recipe(
        recipe, model_name_or_path=model_dir, push_to_hub=True, **{"hub_model_id": "org/x", **changes}
    )
    before = listing(tmp_path)
    with pytest.raises(AMAError) as caught:
        run_pipeline(*parse(recipe, "--output_dir", place / "run"))
    readable(caught.value)
    assert listing(tmp_path) == before
    assert not [path for path in Path(constants.HF_HOME).rglob("*evil*") if path.suffix in (".json", ".parquet")]
    assert not any("evil" in name for _, name in hub.repos)


@pytest.mark.parametrize(
    "path",
    [
        "default/../../evil/fingerprint.json", "../evil/x/fingerprint.json", "/evil/x/fingerprint.json",
        "default/../fingerprint.json", "..\\evil\\fingerprint.json", "default/ok/../../../../evil.parquet",
        "default/[!a]/fingerprint.json", "default/list/../../../../../evil/list/train.parquet",
    ],
)  # fmt: skip
def test_file_names_of_a_repository(hub, honest, path, monkeypatch):
    """A server that lists such files may not have the client write them anywhere but into its cache, nor read them."""
    monkeypatch.setattr("trl_ama.common.hub.RETRIES", 0)
    home = Path(constants.HF_HOME)
    files = {f"default/{file.relative_to(honest)}": file.read_bytes() for file in honest.rglob("*.*")}
    hub.write("dataset", "org/losses", files)
    listed = hub._get("dataset", "org/losses").resolve("main").files
    listed[path] = listed["default/list/fingerprint.json"]  # past the check of the server
    outside = {file for file in home.parent.glob("*") if "evil" in file.name}
    try:
        assert load_reference_losses("org/losses").tasks == ["list", "sort"]
    except AMAError as error:
        readable(error)
    hub._all_requests.clear()  # the test server does not know all of these addresses
    assert {file for file in home.parent.glob("*") if "evil" in file.name} == outside
    snapshots = [file for file in home.rglob("*evil*") if "snapshots" not in file.parts and ".locks" not in file.parts]
    assert not snapshots and not Path("/evil").exists()


def test_a_run_folder_with_a_name_like_a_pattern(honest, tmp_path):
    folder = shutil.copytree(honest, tmp_path / "run[1]*{a,b}?x" / "losses")
    assert load_reference_losses(str(folder)).tasks == ["list", "sort"]
