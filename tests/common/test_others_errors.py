"""What the libraries below refuse is one sentence that names the key, before anything is trained; what DPOTrainer trains is trained."""

import copy
import json
import re
import warnings

import pytest
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig
from tiny_models import make_model, make_tokenizer
from tiny_pairs import make_dataset, make_rows
from tiny_runs import QUICK
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from trl import DPOConfig, DPOTrainer, ModelConfig

from trl_ama import AMAConfig, AMAError, AMATrainer, TaskMixtureConfig
from trl_ama.check.check import check_data
from trl_ama.dpo.rehearsal import empty_policy, rehearse
from trl_ama.pipeline.run import run_pipeline
from trl_ama.recipe.arguments import PipelineArguments
from trl_ama.recipe.settings import RunSettings


SIZES = {"list": 6, "sort": 6}
STEPS = {**QUICK, "per_device_train_batch_size": 2, "max_steps": 1, "logging_steps": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of a model by name, made when it is first asked for."""
    made = {}

    def tokenizer(**changes):
        result = make_tokenizer()
        for name, value in changes.items():
            setattr(result, name, value)
        return result

    def more():
        result = tokenizer()
        result.add_special_tokens({"pad_token": "[PAD]"})
        return result

    def gpt2():
        sizes = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer()), **sizes, pad_token_id=0, eos_token_id=1))

    def t5():
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        return T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer()), **sizes))

    size = len(tokenizer())
    known = {
        "plain": lambda: (make_model(size), tokenizer()),
        "small": lambda: (make_model(size - 3), tokenizer()),
        "pad": lambda: (make_model(size), more()),
        "no eos": lambda: (make_model(size), tokenizer(eos_token=None)),
        "no eos, no pad": lambda: (make_model(size), tokenizer(eos_token=None, pad_token=None)),
        "no pad": lambda: (make_model(size), tokenizer(pad_token=None)),
        "gpt2": lambda: (gpt2(), tokenizer()),
        "t5": lambda: (t5(), tokenizer()),
    }

    def folder(name):
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp(name.replace(" ", "_").replace(",", "")))
            for part in known[name]():
                part.save_pretrained(made[name])
        return made[name]

    return folder


def plain_text(rows):
    return [{key: row[key][0]["content"] for key in ("prompt", "chosen", "rejected")} for row in rows]


def few_words(dataset):
    """Pairs without the words that the small model has no embedding of."""
    return dataset.filter(lambda row: not any(word in json.dumps(row) for word in ("piano", "quiet", "river")))


def lora(**changes):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes})


# name: what differs from a run that trains, and the sentence; without one, DPOTrainer trains it and so must we
CASES = {
    "plain": ({}, None),
    "targets of one name with a comma": ({"peft": lora(target_modules="q_proj,v_proj")}, r"'q_proj,v_proj'.*lora_target_modules: \[q_proj, v_proj\]"),
    "targets that are not there": ({"peft": lora(target_modules=["q_prog"])}, "lora_target_modules names 'q_prog'.*Did you mean 'q_proj'"),
    "targets of another model": ({"peft": lora(target_modules=["c_attn"])}, r"lora_target_modules names 'c_attn'.* it has \['embed_tokens', 'q_proj'"),
    "targets of which some are there": ({"peft": lora(target_modules=["q_proj", "v_prog"])}, None),
    "targets that PEFT cannot adapt": ({"peft": lora(target_modules=["q_proj", "input_layernorm"])}, "LlamaRMSNorm.* is not supported"),
    "an adapter on the head": ({"peft": lora(target_modules=["lm_head"])}, "PEFT adapter to `lm_head` is not supported"),
    "parameters with dropout": ({"peft": lora(target_modules=[], target_parameters=["q_proj.weight"], lora_dropout=0.1)}, "lora_dropout: 0"),
    "parameters that are not there": ({"peft": lora(target_modules=[], target_parameters=["experts.x"])}, r"lora_target_parameters names \['experts.x'\]"),
    "parameters": ({"peft": lora(target_modules=[], target_parameters=["q_proj.weight"])}, None),
    "trainable tokens, tied": ({"peft": lora(trainable_token_indices=[5, 6])}, "trainable_token_indices"),
    "a learned prefix": ({"peft": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, None),
    "tokens beyond the embeddings": ({"model": "small"}, "has embeddings for 23 tokens.* has the token '(piano|quiet|river)' with the number 2[345]"),
    "tokens beyond the embeddings that no pair has": ({"model": "small", "data": few_words}, None),
    "a pad token beyond the embeddings": ({"model": "pad", "args": {"max_steps": 6}}, r"its pad_token '\[PAD\]' has the number 26"),
    "positions beyond the embeddings": ({"model": "gpt2", "peft": lora(target_modules=["c_attn"])}, None),
    "no eos token": ({"model": "no eos"}, None),
    "no pad token": ({"model": "no pad"}, None),
    "neither": ({"model": "no eos, no pad"}, "neither a pad_token nor an eos_token|Set `pad_token` in"),
    "an encoder and a decoder": ({"model": "t5", "peft": None}, "T5|encoder-decoder"),
    "a schedule that needs an argument": ({"args": {"lr_scheduler_type": "cosine_with_min_lr"}}, "lr_scheduler_type 'cosine_with_min_lr'.*min_lr"),
    "a schedule with another's argument": ({"args": {"lr_scheduler_kwargs": {"num_cycles": 1}}}, "lr_scheduler_type 'linear'.*lr_scheduler_kwargs"),
    "an optimizer that is not installed": ({"args": {"optim": "galore_adamw"}}, "optim 'galore_adamw'.*galore_torch"),
    "attention that nobody has": ({"args": {"model_init_kwargs": {"attn_implementation": "fancy"}}}, 'attn_implementation="fancy"'),
    "an argument that no model has": ({"args": {"model_init_kwargs": {"foo": 1}}}, "unexpected keyword argument 'foo'"),
    "an argument of the configuration": ({"args": {"model_init_kwargs": {"use_cache": False}}}, None),
    "a divergence for other losses": ({"args": {"f_divergence_type": "forward_kl", "loss_type": "apo_zero"}}, "f_divergence_type='forward_kl'"),
    "experts that are not there": ({"args": {"router_aux_loss_coef": 0.1}}, "`router_aux_loss_coef` is set to 0.1"),
    "a reference that moves": ({"args": {"sync_ref_model": True}}, "sync_ref_model"),
    "a tracker that is not there": ({"args": {"report_to": "fancy"}}, "fancy is not supported"),
    "batches by length": ({"args": {"train_sampling_strategy": "group_by_length"}}, "length_column_name"),
    "batches in order": ({"args": {"train_sampling_strategy": "sequential"}}, None),
    "fewer pairs than a batch": ({"args": {"dataloader_drop_last": True, "per_device_train_batch_size": 16}}, "dataloader_drop_last: false"),
}  # fmt: skip
# DPOTrainer ends well and has trained nothing
SILENT = {"fewer pairs than a batch"}


def made(case, folders, tmp_path, cls, config):
    """The trainer of a case, trained."""
    data = case.get("data", lambda data: data)(make_dataset(SIZES))
    args = config(**{**STEPS, **case.get("args", {}), "output_dir": str(tmp_path / cls.__name__)})
    trainer = cls(
        folders(case.get("model", "plain")),
        args=args,
        train_dataset=data.remove_columns("task") if cls is DPOTrainer else data,
        peft_config=copy.deepcopy(case.get("peft", lora())),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_trainer(name, folders, tmp_path):
    case, text = CASES[name]
    if text is None:
        theirs = made(case, folders, tmp_path, DPOTrainer, DPOConfig)
        ours = made(case, folders, tmp_path, AMATrainer, lambda **values: AMAConfig(mixing="proportional", **values))
        assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) == 1
        return
    with pytest.raises(AMAError, match=text) as caught:
        made(case, folders, tmp_path, AMATrainer, lambda **values: AMAConfig(mixing="proportional", **values))
    assert "\n" not in str(caught.value)
    if name not in SILENT:
        with pytest.raises(Exception) as theirs:
            made(case, folders, tmp_path, DPOTrainer, DPOConfig)
        if f"{type(theirs.value).__name__}: " in str(caught.value):  # told anew, and still to be caught as what it was
            assert isinstance(caught.value, type(theirs.value))


# ---- The pipeline and `ama-check`, which know the model by its name alone ----


def recipe(case, folders, tmp_path, **model_args):
    data = case.get("data", lambda data: data)(make_dataset(SIZES, labelled=True))
    for task in SIZES:
        part = data.filter(lambda row, task=task: row["task"] == task).remove_columns("task")
        part.to_json(tmp_path / f"{task}_train.jsonl")
    peft = case.get("peft", lora())
    if peft is None:
        model_args["use_peft"] = False
    fields = {"target_modules", "target_parameters", "lora_dropout"} if isinstance(peft, LoraConfig) else ()
    given = {name if name.startswith("lora") else f"lora_{name}": getattr(peft, name) for name in fields}
    given = {name: sorted(value) if isinstance(value, set) else value for name, value in given.items()}
    model_args = {"use_peft": True, "lora_r": 2, **given, **model_args}
    model = ModelConfig(model_name_or_path=folders(case.get("model", "plain")), **model_args)
    args = {**STEPS, **case.get("args", {}), "output_dir": str(tmp_path / "run"), "mixing": "proportional"}
    tasks = TaskMixtureConfig(tasks=[{"task": task} for task in SIZES], tasks_dir=str(tmp_path))
    return PipelineArguments(), AMAConfig(**args), model, tasks


OF_THE_PIPELINE = [
    name for name, (case, text) in CASES.items() if text is not None and name not in ("trainable tokens, tied",)
]


@pytest.mark.parametrize("name", OF_THE_PIPELINE)
@pytest.mark.filterwarnings("ignore")
def test_pipeline_and_check(name, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "train", lambda *args, **kwargs: pytest.fail("something was trained"))
    monkeypatch.setattr("trl_ama.pipeline.run.train_specialists", lambda *args: pytest.fail("a specialist was begun"))
    case, text = CASES[name]
    arguments = recipe(case, folders, tmp_path)
    with pytest.raises(AMAError, match=text) as caught:
        run_pipeline(*arguments)
    assert "\n" not in str(caught.value)
    found = check_data(RunSettings(*arguments), show=0)
    assert not found.trains and re.search(text, found.model_problem)


@pytest.mark.parametrize("model_args", [{}, {"use_peft": False}, {"lora_target_modules": ["all-linear"]}], ids=str)
def test_check_passes_what_trains(model_args, folders, tmp_path):
    found = check_data(RunSettings(*recipe({}, folders, tmp_path, **model_args)), show=0)
    assert found.trains and found.model_problem is None


def test_names_that_fit_nothing_are_told_of(folders):
    model = empty_policy(folders("plain"), {})
    config = lora(target_modules=["q_proj", "v_prog"], modules_to_save=["scores"])
    with pytest.warns(UserWarning) as caught:
        rehearse(
            "It",
            model,
            AMAConfig(**{**QUICK, "output_dir": "out"}),
            make_dataset({"list": 2}, labelled=False),
            make_tokenizer(),
            config,
        )
    texts = [str(one.message) for one in caught]
    assert any(
        "names 'v_prog'" in text and "Did you mean 'v_proj'? Only the others are adapted." in text for text in texts
    )
    assert any("lora_modules_to_save names ['scores']" in text for text in texts)


def test_no_eos_token_with_plain_text(folders, tmp_path):
    rows = Dataset.from_list([{**row, "task": "list"} for row in plain_text(make_rows("list", 4, 0))])
    args = AMAConfig(**{**STEPS, "output_dir": str(tmp_path)}, mixing="proportional")
    with pytest.raises(
        AMAError, match="no eos_token, and DPOTrainer ends answers of plain text with it. Set `eos_token`"
    ):
        AMATrainer(folders("no eos"), args=args, train_dataset=rows, peft_config=lora())


def test_positions_beyond_a_learned_table(folders, tmp_path):
    rows = make_rows("list", 4, 0)
    for row in rows:
        row["prompt"][0]["content"] += " apple" * 20
    dataset = Dataset.from_list([{**row, "task": "list"} for row in rows])
    args = AMAConfig(**{**STEPS, "output_dir": str(tmp_path)}, mixing="proportional")
    with pytest.raises(
        AMAError, match=r"has learned 16 positions, and row 0 of train_dataset is \d+ tokens long. Set max_length: 16"
    ):
        AMATrainer(folders("gpt2"), args=args, train_dataset=dataset, peft_config=lora(target_modules=["c_attn"]))


def test_quantised_weights_without_an_adapter(folders, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantised = BitsAndBytesConfig(load_in_4bit=True)
    data, args = make_dataset({"list": 2}, labelled=False), AMAConfig(**{**QUICK, "output_dir": str(tmp_path)})
    rehearse("It", empty_policy(folders("plain"), {}, quantised), args, data, make_tokenizer(), lora())
    # As in the configuration of a checkpoint that was saved so
    saved = tmp_path / "saved"
    saved.mkdir()
    config = make_model(len(make_tokenizer())).config
    config.architectures, config.quantization_config = ["LlamaForCausalLM"], quantised.to_dict()
    config.save_pretrained(saved)
    with pytest.raises(AMAError, match="are quantised.*Set use_peft: true"):
        rehearse("It", empty_policy(str(saved), {}), args, data, make_tokenizer())


def test_a_rehearsal_is_quiet_and_leaves_nothing(folders, tmp_path, capfd):
    args = AMAConfig(
        **{
            **QUICK,
            "output_dir": str(tmp_path / "run"),
            "push_to_hub": True,
            "model_init_kwargs": {"use_cache": False},
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        rehearse(
            "It",
            empty_policy(folders("plain"), {}),
            args,
            make_dataset({"list": 2}, labelled=False),
            make_tokenizer(),
            None,
            True,
        )
    out = capfd.readouterr()
    assert out.out == out.err == "" and not (tmp_path / "run").exists()
