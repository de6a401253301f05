"""A step waits for a GPU no more often than DPOTrainer's, and launches about as much; counted on a CPU, whose tensors stand for a GPU's."""

import torch
from prefix_cases import FAST, build, padded, random_pairs
from tiny_pairs import make_dataset, with_reference_columns
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer
from waits import Kernels, Waits

from trl_ama import AMAConfig, AMATrainer
from trl_ama.fast_path import packing, varlen
from trl_ama.fast_path.forward import packed_forward


class _Counting(TrainerCallback):
    """Of every optimizer step but the first, which proves the fast path: from its first micro-batch to its end, loading not included."""

    def __init__(self):
        self.steps, self._open = [], None

    def on_step_begin(self, args, state, control, **kwargs):
        self._open = Waits()
        self._open.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self._open.__exit__(None, None, None)
        if state.global_step > 1:
            self.steps.append(self._open.seen)


def test_a_step_waits_no_more_often_than_trls(model_dir, quick_args, monkeypatch):
    import trl.trainer.utils

    # Where there is Triton, TRL's head looks for the positions that have a label
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda device: True)
    packed = []
    for name in ("pack_pairs", "pack_call"):
        plain = getattr(packing, name)
        counted = f"trl_ama.fast_path.collating.{name}"
        monkeypatch.setattr(counted, lambda *args, name=name, plain=plain: packed.append(name) or plain(*args))
    pairs = with_reference_columns(make_dataset({"list": 12, "sort": 12}))
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3, "logging_steps": 1}
    waits = {}
    for name, (trainer, config, own, columns) in {
        "TRL": (DPOTrainer, DPOConfig, {"precompute_ref_log_probs": True}, []),
        "ours": (AMATrainer, AMAConfig, {"mixing": "ama_s"}, pairs.column_names),
    }.items():
        counting = _Counting()
        columns = columns or ["prompt", "chosen", "rejected"]
        run = trainer(
            model_dir,
            args=quick_args(config, **settings, **own),
            train_dataset=pairs.select_columns(columns),
            callbacks=[counting],
        )
        run.train()
        waits[name] = counting.steps
        if name == "ours":
            assert run.prefix_sharing.taken == {"fast": 6, "plain": 0}
    assert len(waits["TRL"]) == len(waits["ours"]) == 2
    for ours, theirs in zip(waits["ours"], waits["TRL"], strict=True):
        assert 0 < ours.total() <= theirs.total(), f"more: {ours - theirs}, fewer: {theirs - ours}"
    assert packed == ["pack_pairs"] * 6  # every batch once, by the loader, and no call


# ---- Launches ----


@torch.library.custom_op("trl_ama_tests::varlen", mutates_args=())
def _one_call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(query)


@torch.library.custom_op("trl_ama_tests::varlen_backward", mutates_args=())
def _one_call_back(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


_one_call.register_autograd(
    lambda ctx, grad: _one_call_back(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _launched(layers: int, pairs: int, beginning: int, packed: bool) -> int:
    model = build("Llama", {**FAST["Llama"], "num_hidden_layers": layers})
    call = padded(random_pairs(pairs, seed=0, beginning=beginning))
    row = packing.pack_pairs(call["input_ids"], call["attention_mask"], call["labels"] != -100)
    assert row.common == beginning
    row.plan(torch.device("cpu"))  # as the collator has made it
    with Kernels() as kernels:
        outputs = packed_forward(model, row, use_cache=False) if packed else model(**call)
        outputs.log_probs.sum().backward()
    return kernels.count


def test_a_layer_launches_as_much_as_trls_and_what_gathering_costs(monkeypatch):
    """However many pairs there are. What gathering and summing copies costs, TRL's layer spends on repeated heads and on its mask."""
    monkeypatch.setattr(varlen, "efficient", lambda query, key, value, plan, scale: _one_call(query, key, value))
    plain = _launched(2, 2, 0, packed=False) - _launched(1, 2, 0, packed=False)
    with varlen.as_on_a_gpu():
        for beginning, most in ((0, 0), (9, 2 * 4)):  # the many copies of what all begin with are summed apart
            layer = [_launched(2, pairs, beginning, True) - _launched(1, pairs, beginning, True) for pairs in (2, 9)]
            assert layer[0] == layer[1] <= plain + most, (layer, plain)
    blocks = [_launched(2, pairs, 0, True) - _launched(1, pairs, 0, True) for pairs in (2, 9)]
    assert blocks[1] > blocks[0] + 7 * 4  # what it would be otherwise
