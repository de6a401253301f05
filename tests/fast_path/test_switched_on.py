"""What people with GPUs switch on: layers replaced by kernels, activations kept elsewhere, a model split over several devices. The
kernels and the devices are stand-ins; TRL's, transformers' and Accelerate's code around them is the real one."""

import pytest
import torch
import transformers.trainer
from peft import LoraConfig
from prefix_cases import TINY, build, gradients, padded, random_pairs, sharing, weights_for
from tiny_pairs import make_dataset
from tiny_runs import losses_of
from transformers.models.llama import modeling_llama
from trl import DPOConfig, DPOTrainer
from trl.models.activation_offloading import OffloadActivations

from trl_ama import AMAConfig, AMATrainer
from trl_ama.fast_path.forward import _keep_scored, packed_forward
from trl_ama.fast_path.packing import pack_pairs


CALL = padded(random_pairs(4, seed=0, prompts=(4, 9), answers=(4, 12), beginning=9))


def row_of(call):
    return pack_pairs(call["input_ids"], call["attention_mask"], call["labels"] != -100)


# ---- Liger's layers ----


class Liger:
    """As Liger patches a model that is there: its norms and MLPs get another forward."""

    def __init__(self, mixes: bool = False):
        self.mixes, self.calls, self.configs = mixes, 0, []

    def __call__(self, model, config):
        self.configs.append(config)
        for module in model.modules():
            if isinstance(module, modeling_llama.LlamaRMSNorm):
                module.forward = self.norm(module)

    def norm(self, module):
        def forward(hidden):
            self.calls += 1
            scale = hidden.float().square().mean(-1, keepdim=True).add(module.variance_epsilon).rsqrt()
            output = module.weight * (hidden.float() * scale).to(hidden.dtype)
            return output + 0.1 * output.roll(1, dims=1) if self.mixes else output

        return forward


def run(trainer_class, model_dir, quick_args, monkeypatch, liger, **settings):
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", liger)
    ours = {"mixing": "proportional"} if trainer_class is AMATrainer else {}
    dataset = make_dataset({"list": 16})
    torch.manual_seed(0)
    with pytest.warns(FutureWarning, match="Use the Hub kernels instead"):
        trainer = trainer_class(
            model_dir,
            args=quick_args(AMAConfig if ours else DPOConfig, max_steps=2, use_liger_kernel=True, **ours, **settings),
            train_dataset=dataset if ours else dataset.remove_columns("task"),
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )
    trainer.train()
    return trainer


@pytest.mark.parametrize("mixes", [False, True])
def test_liger_layers_are_tried_like_any_other(model_dir, quick_args, monkeypatch, caplog, mixes):
    """They come when training begins, after the reference log-probs: what was tried before says nothing of them."""
    liger = Liger(mixes)
    theirs = run(DPOTrainer, model_dir, quick_args, monkeypatch, liger, precompute_ref_log_probs=True)
    before = liger.calls
    ours = run(AMATrainer, model_dir, quick_args, monkeypatch, liger, precompute_ref_log_probs=True)
    assert liger.configs == [{"fused_linear_cross_entropy": False}] * 2 and liger.calls > before
    assert losses_of(ours) == pytest.approx(losses_of(theirs), rel=1e-4)
    reference = 2  # batches before training
    assert ours.prefix_sharing.taken == (
        {"fast": reference, "plain": 2} if mixes else {"fast": reference + 2, "plain": 0}
    )
    assert ("with the tokens of another" in caplog.text) == mixes


# ---- Activations that are kept elsewhere ----


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_offloaded_activations_change_no_gradient(streams, checkpointing, monkeypatch):
    """Queries, keys and values of a block are views into the row's, which are laid down and fetched one by one."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args, **kwargs: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda stream: None, raising=False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    model = build("Llama", TINY).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights, pairs = weights_for(CALL), row_of(CALL)
    assert pairs.common
    expected = packed_forward(model, pairs, use_cache=False)
    expected_gradients = gradients(expected, model, weights)
    offloading = OffloadActivations(use_pin_memory=False, use_streams=streams, min_offload_size=1)
    taken, moved = offloading.pack_hook, []

    def pack(tensor):
        key = taken(tensor)
        moved.append(offloading.tracker[key][1])
        return key

    offloading.pack_hook = pack
    with offloading:
        outputs = packed_forward(model, row_of(CALL), use_cache=False)
    assert torch.equal(outputs.log_probs, expected.log_probs) and sum(moved) > 5
    found = gradients(outputs, model, weights)
    assert found.keys() == expected_gradients.keys()
    assert all(torch.equal(found[name], expected_gradients[name]) for name in found)


# ---- A model that is split over devices ----


def test_indices_follow_the_tensors_that_they_index():
    """TRL loads a model with device_map='auto', which splits it where a process sees several GPUs: the backbone may end, and the head
    be, on another device than the row. `meta` is another device here."""
    pairs, other = row_of(CALL), torch.device("meta")
    hidden = torch.empty(1, pairs.input_ids.shape[1], 8, device=other)
    outputs = _keep_scored(None, (), {"packed_pairs": pairs}, type("Outputs", (), {"last_hidden_state": hidden})())
    assert outputs.last_hidden_state.device == other
    assert outputs.last_hidden_state.shape == (1, len(pairs.score_positions), 8)
    assert pairs.unpack(torch.empty(1, len(pairs.score_positions), device=other)).device == other
    for device in (pairs.input_ids.device, other, pairs.input_ids.device):  # layers in turn
        plan = pairs.plan(device)
        assert plan.gather.device == plan.cu_q.device == plan.cu_k.device == device


def test_a_trial_and_a_proof_compare_where_the_head_is(monkeypatch):
    """Log-probs come back from the head's device, on both paths; what says which of them count is with the row."""
    model, chooser = build("Llama", TINY), sharing(True)
    seen = []

    class Elsewhere(torch.Tensor):
        """On another device, as far as indices are concerned."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor):
                seen.append(args[1])
                assert getattr(args[1], "moved", False), "indices should be on the same device as the indexed tensor"
            return super().__torch_function__(function, types, args, kwargs or {})

    to = torch.Tensor.to

    def noted(tensor, *args, **kwargs):
        result = to(tensor, *args, **kwargs)
        if result.dtype in (torch.bool, torch.long):
            result = result.clone()
            result.moved = True
        return result

    monkeypatch.setattr(torch.Tensor, "to", noted)

    def elsewhere(module, args, outputs):
        outputs.log_probs = outputs.log_probs.as_subclass(Elsewhere)
        return outputs

    model.register_forward_hook(elsewhere)
    assert chooser.pack(model.bfloat16(), CALL, "policy") is not None
    assert len(seen) > 5
