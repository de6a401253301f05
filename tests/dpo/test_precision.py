"""16 bits and devices: what accelerate and TRL ask for that would lose numbers, or could not be trained."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import get_peft_model
from policy_worlds import trainers_fixture  # noqa: F401 - a fixture
from prefix_cases import FAST, build, padded, random_pairs, sharing
from tiny_models import lora, make_model
from tiny_pairs import make_dataset
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trl.trainer.utils import FusedCausalLMOutput

from trl_ama import AMAConfig, AMAError, AMATrainer
from trl_ama.dpo.losses import sequence_logps
from trl_ama.dpo.pair_batches import RecordedForward
from trl_ama.dpo.precision import check_full_fp16, keep_output_precision, prepare_for_fp16


FP16 = SimpleNamespace(fp16=True)


# ---- FSDP2 ----


@pytest.fixture
def mesh():
    """Of one process, this one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shared_out(mesh, plugin):
    model = build("Llama", FAST["Llama"])
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=plugin.mixed_precision_policy)
    return model


@pytest.mark.filterwarnings("ignore")
def test_fsdp2_gives_log_probs_as_they_were_computed(mesh):
    """TRL sums them in the type that they come in; in bf16, such a sum is far from what it should be."""
    call = padded(random_pairs(4, seed=0))
    expected = build("Llama", FAST["Llama"])(**call).log_probs.sum(dim=1)  # in float32
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16")
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    found = []
    for prepare in (lambda accelerator: None, keep_output_precision):
        prepare(accelerator)
        model = shared_out(mesh, plugin)
        plain, packed = model(**call).log_probs, sharing().forward(model)(**call).log_probs
        found.append((plain.dtype, packed.dtype, (plain.sum(dim=1) - expected).abs().max().item()))
    assert found[0][:2] == (torch.bfloat16,) * 2 and found[1][:2] == (torch.float32,) * 2
    assert found[1][2] < found[0][2] / 2
    policy = plugin.mixed_precision_policy
    assert policy.param_dtype is policy.reduce_dtype is torch.bfloat16  # nothing else has changed


def test_a_trainer_asks_for_it_before_anything_is_shared_out(trainers, monkeypatch):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16")
    trainer = trainers[True]

    def create(self):
        self.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))

    monkeypatch.setattr(trainer, "accelerator", trainer.accelerator)
    monkeypatch.setattr("transformers.Trainer.create_accelerator_and_postprocess", create)
    trainer.create_accelerator_and_postprocess()
    assert plugin.mixed_precision_policy.output_dtype is None


@pytest.mark.parametrize("version, precision", [(1, "bf16"), (2, None), (2, "fp32")])
def test_other_policies_stay(version, precision):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version, mixed_precision_policy=precision)
    before = plugin.mixed_precision_policy
    keep_output_precision(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    keep_output_precision(SimpleNamespace(state=SimpleNamespace()))
    assert plugin.mixed_precision_policy is before


# ---- fp16 ----


def scaled_step(model):
    """A step as accelerate does one with `fp16`; the scaler for a CPU is the one that torch has for GPUs."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    optimizer, scaler = torch.optim.SGD(weights, lr=1.0), torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", dtype=torch.float16):
        tokens = torch.arange(4, 20)[None]
        loss = model(input_ids=tokens, labels=tokens).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    return any(not torch.equal(one, other) for one, other in zip(before, weights, strict=True))


@pytest.mark.parametrize("held", [torch.float16, torch.bfloat16])
def test_adapters_are_trained_with_fp16(held):
    """On a quantised base TRL holds them in bf16, which a scaler on a GPU refuses, as everywhere weights in float16."""

    def adapted():
        model = get_peft_model(make_model(64).to(held), lora(), autocast_adapter_dtype=False)
        return model, {weight.dtype for weight in model.parameters() if weight.requires_grad}

    model, types = adapted()
    assert types == {held}
    if held is torch.float16:
        with pytest.raises(ValueError, match="unscale FP16 gradients"):
            scaled_step(model)
    model, _ = adapted()
    prepare_for_fp16(model, SimpleNamespace(fp16=False))
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {held}
    prepare_for_fp16(model, FP16)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {held}
    assert scaled_step(model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", torch.float16])
def test_full_models_in_16_bits_are_refused_with_fp16(dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(AMAError, match=rf"fp16 is set and dtype is {name}.*Set dtype: float32.*use_peft: true"):
        check_full_fp16(FP16, dtype, trains_all=True)
    with pytest.raises(AMAError, match=f"dtype is {name}"):
        prepare_for_fp16(make_model(64).to(getattr(torch, name)), FP16)
    check_full_fp16(FP16, dtype, trains_all=False)
    check_full_fp16(SimpleNamespace(fp16=False), dtype, trains_all=True)
    check_full_fp16(FP16, "float32", trains_all=True)
    model = make_model(64)
    prepare_for_fp16(model, FP16)
    assert scaled_step(model)


def test_the_trainer_refuses_before_it_loads(tmp_path):
    args = AMAConfig(str(tmp_path), fp16=True, bf16=False, use_cpu=True, model_init_kwargs={"dtype": "float16"})
    with pytest.raises(AMAError, match="fp16 is set and dtype is float16"):
        AMATrainer("no/such-model", args=args, train_dataset=make_dataset({"list": 4, "sort": 4}))


# ---- Several devices ----


def test_what_the_head_leaves_on_another_device_comes_to_the_batch():
    """As of a model that is spread over two GPUs; fake tensors are of any two devices, and meet no more than real ones do."""
    with FakeTensorMode():
        mask = torch.ones(4, 6, dtype=torch.long, device="cpu")
        there = torch.zeros(4, 5, dtype=torch.float16, device="meta")
        with pytest.raises(RuntimeError, match="same device"):
            there * mask[:, 1:]
        chosen, rejected = sequence_logps(there, mask)
        assert chosen.device == rejected.device == mask.device and chosen.dtype == torch.float32
        forward = RecordedForward(lambda **kwargs: FusedCausalLMOutput(log_probs=there, entropy=there))
        outputs = forward(input_ids=mask)
        assert outputs.log_probs.device == outputs.entropy.device == mask.device and outputs.aux_loss is None
        assert forward.outputs is outputs
