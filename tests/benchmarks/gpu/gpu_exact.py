"""Log-probs and gradients of the fast path, and of the plain one, against the plain path in float32."""

import contextlib
from types import SimpleNamespace

import torch
from accelerate import PartialState
from gpu_card import CUDA, DEVICE
from gpu_cases import free, lora, made_model, made_pairs, relative, tokenizer
from gpu_report import Report
from peft import get_peft_model
from prefix_cases import OUTPUTS, gradients, padded, weights_for
from trl.trainer.utils import add_fused_lm_head

from trl_ama.fast_path.choice import PrefixSharing


MIXED = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


def exact(report: Report) -> None:
    """All parameters of the 135M model, and adapters of the 1B one: float32 weights, and 16 bits by autocast, as in training."""
    PartialState()
    cases = {"tiny": (2, 32)} if report.rehearse else {"135M": (8, 256), "1B": (4, 256)}
    for name, (count, length) in cases.items():
        model = made_model(name, torch.float32)
        add_fused_lm_head(model, outputs=OUTPUTS)
        if name == "1B":
            adapter = lora()
            adapter.init_lora_weights = False  # with its second factor at zero, the first would have no gradient
            model = get_peft_model(model, adapter).to(DEVICE)
        model.train()
        call = {key: _there(value) for key, value in padded(_tokens(count, length)).items()}
        weights = weights_for(call).to(DEVICE)
        scored = call["labels"][:, 1:] != -100
        truth = _run(model, model, call, weights)
        for dtype in MIXED:
            with report.row(f"{name}, {count} pairs of up to {length}") as row:
                row["type"] = str(dtype)[6:]
                fast = _sharing(MIXED[dtype], length)
                with _autocast(dtype):
                    found = _run(fast.forward(model), model, call, weights)
                    row |= _errors(found, truth, scored)
                    if dtype != torch.float32:
                        plain = _errors(_run(model, model, call, weights), truth, scored)
                        row |= {f"plain path: {key}": value for key, value in plain.items()}
                row |= fast.taken
        del model, truth
        free()


def _sharing(mixed_precision: str, length: int) -> PrefixSharing:
    """The choice between both paths, as a trainer with these settings makes it."""
    args = SimpleNamespace(torch_compile=False, use_liger_kernel=False, max_length=length)
    accelerator = SimpleNamespace(mixed_precision=mixed_precision, parallelism_config=None)
    return PrefixSharing(SimpleNamespace(args=args, accelerator=accelerator), "auto")


def _there(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def _tokens(count: int, length: int) -> list[tuple[list[int], list[int], list[int]]]:
    rows = made_pairs(count, length)
    return [tuple(tokenizer()(row[part])["input_ids"] for part in ("prompt", "chosen", "rejected")) for row in rows]


def _autocast(dtype: torch.dtype):
    if dtype == torch.float32 or not CUDA:  # a rehearsal: most CPUs take a hundred times as long over 16 bits
        return contextlib.nullcontext()
    return torch.autocast(DEVICE, dtype)


def _run(forward, model, call: dict, weights: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    outputs = forward(**call)
    return outputs.log_probs.detach().float(), gradients(outputs, model, weights)


def _errors(found: tuple, truth: tuple, scored: torch.Tensor) -> dict[str, float]:
    ours, theirs = found[1], truth[1]
    assert ours.keys() == theirs.keys() and theirs
    off = sum(float((ours[name].float() - theirs[name]).square().sum()) for name in theirs)
    size = sum(float(value.square().sum()) for value in theirs.values())
    return {"error": relative(found[0][scored], truth[0][scored]), "gradient error": (off / size) ** 0.5}
