"""Trainers to switch adapters on, and files that try to be run."""

import json
import pickle
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from saved_adapters import save_adapter
from tiny_models import lora
from tiny_pairs import make_dataset
from tiny_runs import QUICK

from trl_ama import AMAConfig
from trl_ama.dpo.pair_trainer import ScoringTrainer
from trl_ama.policies import files as policy_files


def change_weights(folder, change) -> None:
    path = Path(folder, "adapter_model.safetensors")
    save_file(change(load_file(path)), path)


@pytest.fixture(name="nothing_checked", autouse=True)
def nothing_checked_fixture(monkeypatch):
    monkeypatch.setattr(policy_files, "_checked", {})


@pytest.fixture(name="adapter")
def adapter_fixture(model_dir, tmp_path):
    return save_adapter(tmp_path / "adapter", model_dir)


@pytest.fixture(name="trainers", scope="module")
def trainers_fixture(model_dir, tmp_path_factory):
    """A trainer with an adapter of its own, and one without."""

    def build(peft):
        args = AMAConfig(str(tmp_path_factory.mktemp("out")), **QUICK)
        return ScoringTrainer(
            model_dir, args=args, train_dataset=make_dataset({"list": 4}), peft_config=lora() if peft else None
        )

    return {peft: build(peft) for peft in (True, False)}


class Evil:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (Path(self.sentinel),)


@pytest.fixture(name="evil")
def evil_fixture(tmp_path, monkeypatch):
    """Files that try to leave a mark in every way that a repository has; the test fails if one does."""
    sentinel = tmp_path / "was_here"
    code = f"open({str(sentinel)!r}, 'w').close()\n"
    auto_map = {name: f"modeling_evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in range(3) %}" + (
        "{{ cycler.__init__.__globals__.os.system('touch " + str(sentinel) + "') }}{% endfor %}"
    )
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to run code"))
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(Evil(sentinel))
    tokenizer = {"auto_map": {"AutoTokenizer": ["modeling_evil.T", None]}, "chat_template": template}
    yield {
        "adapter_model.bin": pickled,
        "pytorch_model.bin": pickled,
        "training_args.bin": pickled,
        "modeling_evil.py": code.encode(),
        "__init__.py": code.encode(),
        "custom_generate/generate.py": code.encode(),
        "tokenizer_config.json": json.dumps(tokenizer).encode(),
        "chat_template.jinja": template.encode(),
        "config.json": json.dumps({"model_type": "evil", "auto_map": auto_map}).encode(),
    }
    assert not sentinel.exists()
    Evil(sentinel).__reduce__()[0](sentinel)  # it does leave a mark if it is run
    assert sentinel.exists()


def write(folder, files) -> str:
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)
