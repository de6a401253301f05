"""The base stays the base, whatever an adapter is, does or starts from: held against a fresh base, computed by hand.

By hand means by transformers and PEFT alone, pair by pair from logits.
"""

import copy

import numpy as np
import pytest
import torch
import trl.trainer.dpo_trainer
from peft import (
    AutoPeftModelForCausalLM,
    KasaConfig,
    LoftQConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from saved_adapters import logits, save_adapter
from tiny_models import make_model, save
from tiny_pairs import make_dataset
from tiny_runs import QUICK
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, ModelConfig

from trl_ama import AMAConfig, AMAError, AMATrainer
from trl_ama.dpo.pair_trainer import ScoringTrainer
from trl_ama.policies.base_weights import BaseWeights, checksums
from trl_ama.policies.objects import check_policy
from trl_ama.policies.own_adapter import OwnBase
from trl_ama.policies.switching import trained_policy, trained_policy_and_reference
from trl_ama.recipe.arguments import PipelineArguments
from trl_ama.recipe.settings import RunSettings
from trl_ama.tasks.config import TaskMixtureConfig


pytestmark = pytest.mark.filterwarnings("ignore")

WHO = "the specialist of task 'list'"
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
SIZES = {"list": 6, "sort": 6}


@pytest.fixture(scope="module")
def base_dir(tokenizer, tmp_path_factory):
    """A tiny model with biases, which adapters can train along."""
    path = tmp_path_factory.mktemp("base")
    return save(make_model(len(tokenizer), attention_bias=True), tokenizer, path)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def adapted(base_dir, folder):
    return PeftModel.from_pretrained(load(base_dir), folder).eval()


def by_hand(model, pairs, side):
    """Sum of log-probs of the answer, one pair at a time. # (N,)"""
    sums = []
    for prompt, answer in zip(pairs["prompt_ids"], pairs[f"{side}_ids"], strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)  # (T-1, V)
        sums.append(scores.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item())
    return np.array(sums)


def assert_scored(trainer, who, model, tasks=None):
    """The trainer's columns of `who` are those of a model, of all pairs or those of some tasks."""
    pairs = trainer.train_dataset
    if tasks is not None:
        numbers = [trainer.task_names.index(task) for task in tasks]
        pairs = pairs.select([row for row, task in enumerate(pairs["task"]) if task in numbers])
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(pairs[f"{who}_{side}_logps"], by_hand(model, pairs, side), rtol=1e-4, atol=1e-4)


# ---- Checksums ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (33, 1030), (8, 1024)])
def test_a_checksum_sees_every_bit_and_its_place(dtype, shape):
    torch.manual_seed(0)
    tensor = (torch.rand(shape) * 2).to(dtype)
    (before,) = checksums([tensor])
    assert checksums([tensor.clone()]) == [before]
    bits = tensor.view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
    for index in {0, bits.numel() // 2, bits.numel() - 1}:
        bits.view(-1)[index] ^= 1
        assert checksums([tensor]) != [before]
        bits.view(-1)[index] ^= 1
    assert checksums([tensor]) == [before]
    if tensor.numel() > 8 and dtype is torch.float32:
        assert checksums([tensor.flip(-1)]) != [before]
        assert checksums([tensor[:, ::2].contiguous()]) == checksums([tensor[:, ::2]])


@pytest.mark.parametrize("how", ["replaced", "in place", "through a view", "a buffer", "a list of tensors", "type"])
def test_what_was_written_is_put_back(how):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = BaseWeights(model)
    linear, norm = model
    with weights.watched(), torch.no_grad():
        if how == "replaced":
            linear.weight.data = linear.weight.data - 1
        elif how == "in place":
            linear.weight.data -= 1
            linear.weight.mul_(2)
        elif how == "through a view":
            linear.weight.data.view(-1)[3:5] = 7
        elif how == "a buffer":
            norm.running_mean.add_(1)
        elif how == "a list of tensors":
            torch._foreach_add_([linear.weight, linear.bias], 1)
        else:
            linear.weight.data = linear.weight.data.to(torch.bfloat16)
    assert len(weights.changed()) == (2 if how == "a list of tensors" else 1)
    weights.restore("An adapter")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert weights.changed() == []


def test_what_cannot_be_put_back_ends_the_run():
    model = torch.nn.Linear(4, 4)
    weights = BaseWeights(model)
    with weights.watched():
        model.weight.detach().numpy()[0] = 3  # past PyTorch
    with pytest.raises(AMAError, match=r"An adapter wrote to 1 weights .* \(the first is 'weight'\)"):
        weights.restore("An adapter")


# ---- Specialists of every kind ----

# What a kind needs on a model as small as this one; the others are asked for the three layers alone
NEEDS = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PSOFT": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [5, 6]},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 20},
}
# Kinds that are no weights of a model's layers (prompts, mixtures of adapters, layers with an input of their own), or ask for
# packages
OTHERS = {
    "ADAMSS", "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING", "PROMPT_TUNING",
    "P_TUNING", "SHADOW", "XLORA",
}  # fmt: skip
KINDS = sorted({str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - OTHERS)
STARTS = {
    **{str(start): {"init_lora_weights": start} for start in (False, "gaussian", "orthogonal", "eva", "mica")},
    **{start: {"init_lora_weights": start} for start in ("pissa", "olora", "lora_ga")},
    "kasa": {"kasa_config": KasaConfig()},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
}


@pytest.fixture(scope="module")
def trainer(base_dir, tmp_path_factory):
    args = AMAConfig(str(tmp_path_factory.mktemp("out")), **QUICK)
    config = LoraConfig(r=4, **TARGETS)
    return ScoringTrainer(base_dir, args=args, train_dataset=make_dataset({"list": 4}), peft_config=config)


@pytest.fixture(scope="module")
def plain(base_dir, tmp_path_factory):
    """A specialist of another task."""
    return save_adapter(tmp_path_factory.mktemp("plain"), base_dir, LoraConfig(r=4, **TARGETS), seed=5)


def config_of(kind):
    if kind in STARTS:
        return LoraConfig(r=4, **TARGETS, **STARTS[kind])
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**{**TARGETS, **NEEDS.get(kind, {})})


@pytest.mark.parametrize("kind", [*KINDS, *STARTS])
def test_a_specialist_of_any_kind_and_everything_after_it(trainer, plain, base_dir, tmp_path, kind):
    folder = save_adapter(tmp_path / "adapter", base_dir, config_of(kind))
    fresh, ours = load(base_dir), trainer.model.get_base_model()
    before = {name: (tensor, tensor.clone()) for name, tensor in trainer.model.state_dict(keep_vars=True).items()}
    try:
        with trained_policy_and_reference(trainer, WHO, folder) as (model, reference):
            torch.testing.assert_close(logits(model), logits(adapted(base_dir, folder)), rtol=1e-4, atol=1e-4)
            if reference is not None:
                with reference() as base:
                    assert torch.equal(logits(base), logits(fresh))
    except AMAError as error:
        assert kind in ("TRAINABLE_TOKENS",) and "adapts the LM head itself" in str(error)
    after = trainer.model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (tensor, content) in before.items():
        assert after[name] is tensor and torch.equal(tensor, content), name
    assert torch.equal(logits(trainer.model), logits(fresh))  # the untrained policy
    with trainer.model.disable_adapter():
        assert torch.equal(logits(ours), logits(fresh))  # the reference
    with trained_policy(trainer, WHO, plain) as model:
        torch.testing.assert_close(logits(model), logits(adapted(base_dir, plain)), rtol=1e-4, atol=1e-4)


def test_starts_that_are_drawn_anew_are_refused(trainer, base_dir, tmp_path):
    """Two loads of such an adapter by PEFT are two models."""
    config = LoraConfig(r=4, init_lora_weights="pissa_niter_2", **TARGETS)
    folder = save_adapter(tmp_path / "a", base_dir, config)
    torch.manual_seed(1)
    first = logits(adapted(base_dir, folder))
    torch.manual_seed(2)
    assert (first - logits(adapted(base_dir, folder))).abs().max() > 0.01
    fresh = logits(load(base_dir))
    with (
        pytest.raises(AMAError, match=r"drawn anew at every load \(init_lora_weights='pissa_niter_2'\)"),
        trained_policy(trainer, WHO, folder),
    ):
        pass
    assert torch.equal(logits(trainer.model), fresh)
    with pytest.raises(AMAError, match="The policy's adapter .* drawn anew at every load"):
        build(base_dir, tmp_path, config, {})


# ---- The policy's own adapter ----


def build(model, tmp_path, config, specialists, trainer=AMATrainer, data=None, **kwargs):
    """A trainer of three steps that are large enough to move biases."""
    args = {"max_steps": 3, "learning_rate": 2e-2, "logging_steps": 1, "seed": 3}
    names = {name for name in ("mixing", "precompute_ref_log_probs") if name in kwargs}
    args |= {name: kwargs.pop(name) for name in names}
    args = (AMAConfig if trainer is AMATrainer else DPOConfig)(str(tmp_path / "out"), **QUICK, **args)
    data = make_dataset(SIZES) if data is None else data
    if trainer is AMATrainer:
        kwargs["specialists"] = specialists or None
    else:
        data = data.remove_columns("task")
    return trainer(model, args=args, train_dataset=data, peft_config=copy.deepcopy(config), **kwargs)


@pytest.fixture(scope="module")
def specialists(base_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("specialists")
    pissa = LoraConfig(r=4, init_lora_weights="pissa", **TARGETS)
    return {
        "list": save_adapter(folder / "list", base_dir, LoraConfig(r=4, **TARGETS), seed=1),
        "sort": save_adapter(folder / "sort", base_dir, pissa, seed=2),
    }


def logged(trainer):
    keys = ("loss", "grad_norm", "rewards/margins", "logps/chosen")
    return [[entry[key] for key in keys] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("start", ["pissa", "olora", "kasa", "bias all"])
def test_specialists_are_scored_on_the_base_whatever_the_policy_starts_from(base_dir, tmp_path, specialists, start):
    trainer = build(base_dir, tmp_path, config_of(start), specialists, mixing="ama_s")
    assert_scored(trainer, "ref", load(base_dir))
    for task, folder in specialists.items():
        assert_scored(trainer, "specialist", adapted(base_dir, folder), [task])


@pytest.mark.parametrize("start", ["pissa", "bias all"])
def test_the_reference_is_the_base_all_along(base_dir, tmp_path, start):
    """The numbers of a DPOTrainer that is given the base as its reference; without it, its own is another one."""
    ours = build(base_dir, tmp_path, config_of(start), {}, mixing="proportional")
    theirs = build(base_dir, tmp_path, config_of(start), {}, DPOTrainer, ref_model=load(base_dir))
    own = build(base_dir, tmp_path, config_of(start), {}, DPOTrainer)
    for trainer in (ours, theirs, own):
        trainer.train()
    np.testing.assert_allclose(logged(ours), logged(theirs), rtol=2e-3, atol=2e-4)
    assert np.abs(np.array(logged(own)) - np.array(logged(theirs))).max() > 0.01
    # After training, too: the policy moved, the reference did not
    pairs = ours.train_dataset.select(range(6))
    chosen, _ = ours.compute_ref_log_probs(ours.model, ours.data_collator(list(pairs)))
    np.testing.assert_allclose(chosen, by_hand(load(base_dir), pairs, "chosen"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, *STARTS])
def test_without_a_trained_adapter_of_any_kind_the_base_is_left(trainer, base_dir, kind):
    """As DPOTrainer makes, trains and disables it."""
    own, fresh, model = OwnBase(), logits(load(base_dir)), load(base_dir)
    with own.watched(base_dir):
        policy = trl.trainer.dpo_trainer.get_peft_model(model, config_of(kind)).eval()
    assert own.moves_reference == (kind in ("pissa", "olora", "kasa", "bias all", "bias lora_only"))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    moved = logits(policy)
    assert (moved - fresh).abs().max() > 1e-3
    for _ in range(2):
        with own.reference(trainer), policy.disable_adapter():
            assert torch.equal(logits(policy), fresh)
        assert torch.equal(logits(policy), moved)


def test_precomputed_references_are_those_of_the_base(base_dir, tmp_path):
    trainer = build(base_dir, tmp_path, config_of("pissa"), {}, mixing="uniform", precompute_ref_log_probs=True)
    assert_scored(trainer, "ref", load(base_dir))


def test_a_start_from_data_and_one_from_rounding(base_dir, tmp_path, specialists):
    """CorDA looks at data before, LoftQ rounds the base as it would be quantised."""
    model = load(base_dir)
    config = LoraConfig(r=4, init_lora_weights="corda", corda_config=CordaConfig(), **TARGETS)
    preprocess_corda(model, config, run_model=lambda: logits(model))
    starts = {"corda": (model, config)}
    try:
        loftq = LoraConfig(r=4, init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4), **TARGETS)
        starts["loftq"] = (base_dir, loftq)
    except ImportError:  # of scipy
        pass
    for name, (model, config) in starts.items():
        trainer = build(model, tmp_path, config, specialists, mixing="ama_s")
        assert trainer.own_base.moves_reference, name
        assert_scored(trainer, "ref", load(base_dir))
        assert_scored(trainer, "specialist", adapted(base_dir, specialists["list"]), ["list"])


def test_an_adapter_that_leaves_the_base_alone_keeps_nothing_twice(base_dir, tmp_path):
    trainer = build(base_dir, tmp_path, LoraConfig(r=4, **TARGETS), {}, mixing="proportional")
    assert not trainer.own_base.moves_reference


def test_layers_of_another_base(base_dir, tmp_path, specialists):
    config = LoraConfig(r=4, layer_replication=[(0, 1), (0, 2)], **TARGETS)
    with pytest.raises(AMAError, match="peft_config sets layer_replication, which makes another base model"):
        build(base_dir, tmp_path, config, specialists)


# ---- A policy that is a PeftModel ----


@pytest.mark.parametrize("start", [True, "pissa"])
def test_a_policy_that_starts_from_an_adapter(base_dir, tmp_path, specialists, start):
    """Its reference is the adapter as it is, as DPOTrainer says; the specialists are those of the base that it names."""
    config = LoraConfig(r=4, init_lora_weights=start, task_type="CAUSAL_LM", **TARGETS)
    folder = save_adapter(tmp_path / "sft", base_dir, config, seed=9)
    policy = AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True, dtype=torch.float32)
    trainer = build(policy, tmp_path, None, specialists, mixing="ama_s")
    assert_scored(trainer, "ref", adapted(base_dir, folder))
    for task, source in specialists.items():
        assert_scored(trainer, "specialist", adapted(base_dir, source), [task])
    assert torch.equal(logits(trainer.model), logits(adapted(base_dir, folder)))
    trainer.train()
    assert logged(trainer)[0][2] == pytest.approx(0, abs=1e-3)  # margins of an untrained policy


def test_the_reference_adapter_of_a_fresh_start_leaves_the_policy_alone(base_dir, tmp_path):
    """DPOTrainer adds it with the policy's configuration: PiSSA would take its share out of the base a second time."""
    config = LoraConfig(r=4, init_lora_weights="pissa", **TARGETS)
    trainer = build(get_peft_model(load(base_dir), config), tmp_path, None, {}, mixing="proportional")
    torch.testing.assert_close(logits(trainer.model), logits(load(base_dir)), rtol=1e-4, atol=1e-4)
    with pytest.raises(AMAError, match="keeps the reference of a PeftModel as a second adapter, which PEFT refuses"):
        build(get_peft_model(load(base_dir), config_of("bias all")), tmp_path, None, {}, mixing="proportional")


def test_policies_that_dpo_trainer_would_not_train_or_mistake(base_dir, tmp_path, specialists, plain):
    named = PeftModel.from_pretrained(load(base_dir), plain, adapter_name="sft", is_trainable=True)
    two = PeftModel.from_pretrained(load(base_dir), plain)
    two.load_adapter(specialists["list"], adapter_name="other")
    check_policy(two, False)
    two.set_adapter("other")
    reference = PeftModel.from_pretrained(load(base_dir), plain)
    reference.load_adapter(plain, adapter_name="ref")
    native = load(base_dir)
    native.load_adapter(plain)
    of_another = load(base_dir)
    PeftModel.from_pretrained(of_another, plain)
    for policy, text in (
        (named, r"has the adapters \['sft'\].*one that is called 'default'"),
        (two, r"has the adapters \['default', 'other'\], of which \['other'\] is active"),
        (reference, "an adapter that is called 'ref'"),
        (native, "There are adapters in this LlamaForCausalLM"),
        (of_another, "There are adapters in this LlamaForCausalLM"),
        (plain, "is an adapter .* and training starts from a model. Merge the two"),
    ):
        with pytest.raises(AMAError, match=text):
            build(policy, tmp_path, None, {}, mixing="proportional")
    merged = PeftModel.from_pretrained(load(base_dir), plain, is_trainable=True)
    merged.merge_adapter()
    with pytest.raises(AMAError, match="adapter is merged into the base's weights"):
        build(merged, tmp_path, None, {}, mixing="proportional")
    frozen = build(adapted(base_dir, plain), tmp_path, None, {}, mixing="proportional", ref_model=load(base_dir))
    with pytest.raises(AMAError, match="No weight of the policy is trainable. .*is_trainable=True"):
        frozen.train()
    settings = RunSettings(
        PipelineArguments(), AMAConfig(str(tmp_path / "run"), **QUICK), ModelConfig(plain), TaskMixtureConfig()
    )
    with pytest.raises(AMAError, match="is an adapter .* and training starts from a model"):
        _ = settings.inputs.tokenizer
    trainer = build(named, tmp_path, None, {}, mixing="proportional", ref_model=load(base_dir))
    trainer.train()
    assert trainer.state.global_step == 3


# ---- Specialists that are objects ----


def test_objects_are_scored_with_their_own_weights_or_refused(base_dir, tmp_path, specialists):
    config = LoraConfig(r=4, **TARGETS)
    given = {task: adapted(base_dir, folder) for task, folder in specialists.items()}
    trainer = build(base_dir, tmp_path, config, given, mixing="ama_s")
    for task, folder in specialists.items():
        assert_scored(trainer, "specialist", adapted(base_dir, folder), [task])
    assert_scored(trainer, "ref", load(base_dir))

    shared = load(base_dir)
    both = {task: PeftModel.from_pretrained(shared, folder) for task, folder in specialists.items()}
    with pytest.raises(AMAError, match="tasks 'list' and 'sort' share weights: .* one base object"):
        build(base_dir, tmp_path, config, both)
    policy = load(base_dir)
    one = {"list": PeftModel.from_pretrained(policy, specialists["list"]), "sort": specialists["sort"]}
    with pytest.raises(AMAError, match="The specialist of task 'list' and the policy share weights"):
        build(policy, tmp_path, config, one)
    many = PeftModel.from_pretrained(load(base_dir), specialists["list"])
    many.load_adapter(specialists["sort"], adapter_name="sort")
    with pytest.raises(AMAError, match=r"are one object with the adapters \['default', 'sort'\]"):
        build(base_dir, tmp_path, config, {"list": many, "sort": many})
    alone = adapted(base_dir, specialists["list"])
    trainer = build(base_dir, tmp_path, config, {"list": alone, "sort": alone}, mixing="ama_s")
    assert_scored(trainer, "specialist", adapted(base_dir, specialists["list"]))
