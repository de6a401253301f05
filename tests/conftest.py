"""Tiny models, tokenizers and preference pairs, all made in process, and a Hub of our own: no test needs the network."""

import atexit
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

from hub_server import HubServer


# The Hugging Face libraries read the environment when they are imported, so all of this comes first. Nothing of the
# user's own setup may show in a test: no token, no caches, no offline mode, no other endpoint.
_OWN = ("HF_", "HUGGING", "TRANSFORMERS_")


def _clean(environ: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith(_OWN)}


# A shell starts jobs in the background with Ctrl-C ignored, and what they start ignores it too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

for _name in set(os.environ) - set(_clean(dict(os.environ))):
    del os.environ[_name]
server = HubServer().start()
_home = tempfile.mkdtemp(prefix="trl_ama_tests_")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
HUB_ENVIRONMENT = {
    "HF_ENDPOINT": server.url,
    "HF_HOME": _home,
    # Xet uploads go to a server of their own, which cannot be replaced: LFS is used in its place
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
    # Two things that would go to other hosts
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}
os.environ.update(HUB_ENVIRONMENT)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402


# The same examples in every run, and none that fails because a machine is slow
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Shows all that a template can read of a message: each key, nulls, and their order
WHOLE_TEMPLATE = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% if style %}[{{ style }}]{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message | tojson }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = (
    "apple bread cloud dance earth flame grape house input jelly knife lemon mango night ocean piano quiet river"
).split()


# Training arguments of every quick, silent run on a CPU
QUICK = {
    "per_device_train_batch_size": 8,
    "max_length": 64,
    "beta": 0.5,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def _make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {
        token: index
        for index, token in enumerate(
            ["<pad>", "</s>", "<unk>", "<user>", "<assistant>", "list", "sort", "brief", *WORDS]
        )
    }
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(vocab_size: int, seed: int = 0, **config):
    """A random Llama of about 20,000 parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**settings, **config}))


def make_rows(task: str, count: int, seed: int) -> list[dict]:
    """Conversational preference pairs; each task's rule can be told from the first word of the prompt.

    `list` prefers the words as given over shuffled ones, `sort` prefers them sorted over as given, `brief` prefers the
    first word alone over all.
    """
    rng = np.random.default_rng([seed, sum(map(ord, task))])
    rows = []
    while len(rows) < count:
        words = [str(word) for word in rng.choice(WORDS, size=int(rng.integers(3, 6)), replace=False)]
        shuffled = [str(word) for word in rng.permutation(words)]
        if words == sorted(words) or words == shuffled:
            continue
        chosen, rejected = {
            "list": (words, shuffled),
            "sort": (sorted(words), words),
            "brief": (words[:1], words),
        }[task]
        rows.append(
            {
                "prompt": [{"role": "user", "content": " ".join([task, *words])}],
                "chosen": [{"role": "assistant", "content": " ".join(chosen)}],
                "rejected": [{"role": "assistant", "content": " ".join(rejected)}],
            }
        )
    return rows


def make_dataset(sizes: dict[str, int], seed: int = 0, labelled: bool = True):
    """A dataset with a `task` column: `sizes` pairs of each task."""
    from datasets import Dataset

    rows = [{**row, "task": task} for task, size in sizes.items() for row in make_rows(task, size, seed)]
    dataset = Dataset.from_list(rows)
    return dataset if labelled else dataset.remove_columns("task")


def client_env(home: str | os.PathLike, token: str | None = None) -> dict[str, str]:
    """The environment of a process with an identity and caches of its own.

    A cache must not be shared between identities: what one of them has downloaded, the other one is given too.
    """
    environ = {**_clean(dict(os.environ)), **HUB_ENVIRONMENT, "HF_HOME": str(home)}
    return environ if token is None else {**environ, "HF_TOKEN": token}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A touch point that broke is named in its failure as docs/touch_points.md names it."""
    report = yield
    match = re.match(r"test_(\d+)_", item.name)
    if report.failed and match and item.path.name == "test_touch_points.py":
        page = item.path.parent.parent / "docs" / "touch_points.md"
        row = re.search(rf"^\| {match[1]} \| (.*) \|$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        what = row[1] if row else "not in docs/touch_points.md"
        report.longrepr = f"{report.longreprtext}\n\nTouch point {match[1]} is broken: {what}"
    return report


def _forget_downloads() -> None:
    """Empties what this process has cached of the Hub: repositories of earlier tests had the same names."""
    from huggingface_hub import HfFileSystem

    HfFileSystem.clear_instance_cache()
    shutil.rmtree(Path(_home, "hub"), ignore_errors=True)
    for path in Path(_home, "datasets").glob("*___*"):
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def hub(monkeypatch):
    """An empty Hub, this process logged in as `alice`; the test fails if a request was one that the Hub here does not
    know."""
    server.reset()
    _forget_downloads()
    monkeypatch.setenv("HF_TOKEN", server.WRITE_TOKEN)
    yield server
    problems = server.problems()
    server.reset()
    assert not problems, "\n".join(f"{one.method} {one.path}: {one.status} {one.error or ''}" for one in problems)


@pytest.fixture
def hub_home(tmp_path):
    """A fresh `HF_HOME` for a process of its own, see `client_env`."""
    path = tmp_path / "hf_home"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def tokenizer():
    return _make_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tokenizer, tmp_path_factory):
    """A saved tiny model with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    make_model(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def letters():
    """A tokenizer to which no text is unknown, with a template that hides nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<pad>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.chat_template = WHOLE_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def letters_dir(letters, tmp_path_factory):
    """A saved tiny model with that tokenizer."""
    path = tmp_path_factory.mktemp("letters")
    make_model(len(letters), max_position_embeddings=2048).save_pretrained(path)
    letters.save_pretrained(path)
    return str(path)


@pytest.fixture
def quick_args(tmp_path):
    """Builds an `AMAConfig` (or another class) for a quick, silent CPU run."""

    def build(config_class=None, **overrides):
        from trl_ama import AMAConfig

        settings = {
            **QUICK,
            "output_dir": str(tmp_path / "run"),
            "per_device_eval_batch_size": 16,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "seed": 7,
        }
        return (config_class or AMAConfig)(**{**settings, **overrides})

    return build
