"""Nothing that a data set or base model brings along is run."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from forgery import readable
from hub_world import SIZES, parse, upload_model, upload_pairs, write_recipe

from trl_ama import AMAError, run_pipeline
from trl_ama.pipeline.start import check_recipe
from trl_ama.recipe.settings import RunSettings


TRAP = "import pathlib\npathlib.Path({!r}).touch()\n"


class Pickled:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["org/evil-pairs", "local"])
@pytest.mark.parametrize("file", ["{}.py", "train.pkl", "train.pickle", "dataset_infos.json", "README.md", "train.pt"])
def test_dataset_repositories_with_code(hub, model_dir, tmp_path, name, file):
    trap = tmp_path / "trap"
    source = name if name != "local" else str(tmp_path / "evil-pairs")
    code = TRAP.format(str(trap)) + "import datasets\nclass Evil(datasets.GeneratorBasedBuilder):\n    pass\n"
    content = {
        "{}.py": code.encode(),
        "dataset_infos.json": b'{"default": {"features": {"chosen": {"_type": "os.system"}}}}',
        "README.md": b"---\nx: !!python/object/apply:pathlib.Path.touch ['trap']\nconfigs: [{config_name: default, "
        b"data_files: evil-pairs.py}]\n---\n",
    }.get(file, pickle.dumps(Pickled(trap)))
    files = {file.format("evil-pairs"): content, "evil-pairs.py": code.encode()}
    if name == "local":
        for path, data in files.items():
            (tmp_path / "evil-pairs").mkdir(exist_ok=True)
            (tmp_path / "evil-pairs" / path).write_bytes(data)
    else:
        hub.write("dataset", name, files)
    tasks = [{"task": task, "path": source} for task in SIZES]
    recipe = write_recipe(tmp_path / "recipe.yaml", model_name_or_path=model_dir, tasks=tasks)
    with pytest.raises(AMAError) as caught:
        check_recipe(RunSettings(*parse(recipe, "--output_dir", tmp_path / "run")))
    assert "Task 'list' cannot be loaded" in str(caught.value)
    assert not trap.exists() and not Path("trap").exists()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_base_model_with_code(hub, model_dir, tmp_path, file):
    trap = tmp_path / "trap"
    upload_model(hub, model_dir)
    for task in SIZES:
        upload_pairs(hub, task, 4)
    config = json.loads(hub.tree("model", "org/base")[file])
    config["auto_map"] = {
        "AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil",
    }  # fmt: skip
    config |= {"tokenizer_class": "Evil"} if "tokenizer" in file else {"model_type": "evil"}
    hub.write("model", "org/base", {file: json.dumps(config), "evil.py": TRAP.format(str(trap))})
    recipe = write_recipe(tmp_path / "recipe.yaml")
    try:
        run_pipeline(*parse(recipe, "--output_dir", tmp_path / "run"), stages=["specialists"])
    except AMAError as error:
        readable(error, "org/base")
    assert not trap.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch trap') }}",
        "{% for x in range(10 ** 12) %}{% endfor %}",
        "{{ raise_exception('evil') }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{% if",
    ],
)
def test_chat_templates(hub, tokenizer, model_dir, tmp_path, template, monkeypatch):
    """transformers runs them in a sandbox; what they try there is one sentence for us."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, "base")
    Path("base", "chat_template.jinja").write_text(template)
    for task in SIZES:
        upload_pairs(hub, task, 4)
    recipe = write_recipe(tmp_path / "recipe.yaml", model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(AMAError) as caught:
        check_recipe(RunSettings(*parse(recipe, "--output_dir", tmp_path / "run")))
    readable(caught.value, "chat template")
    assert not Path("trap").exists()
