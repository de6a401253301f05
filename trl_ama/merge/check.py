"""Holds a merged model to what its adapter does: measured in 32 bits, so that only what is saved counts.

Three models are run over the same tokens: the base, the base with the adapter on it, and the merged checkpoint. What the adapter does is the
distance between the first two; a merge may be off by a small part of that. What rounding to 16 bits alone does to the log-probs is
measured, too, and comes on top of it: it is no fault of the sums, but where it is as large as the adapter, little of the adapter is left.
"""

import contextlib
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedTokenizerBase

from ..common.errors import AMAError
from ..policies.files import PolicySource, capital


# A little of several kinds; the tokenizer's chat template and tokens of all the vocabulary come beside it
_TEXT = (
    "The river was quiet that night. She asked: how many apples are in three baskets of seven? Twenty-one, he said, and lit "
    "the lamp.\n\ndef mean(values):\n    return sum(values) / len(values)\n\nDie Antwort ist nicht immer einfach."
)
_LENGTH = 128  # tokens of a sequence at most
_OFF = 0.03  # of what the adapter does: what a merge may be off by, beside rounding
_ROUNDING = 2  # times what rounding was measured to do: it is drawn anew
_LOST = 0.25  # of what the adapter does: more is not rounded away unless it is asked for
_TRAINED = 0.5  # nats a token between arithmetic in 4 or 8 bits and the same weights written out


def check_sequences(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, adapter_config: dict[str, Any]
) -> list[list[int]]:
    """Token ids that a merge is checked on; the same ones at every call.

    They are a short text, a conversation in the chat template, tokens drawn from all the vocabulary, and those that the adapter has weights
    of its own for, or waits for: on other tokens it would change nothing.
    """
    sequences = [tokenizer(_TEXT, add_special_tokens=False)["input_ids"]]
    if tokenizer.chat_template:
        question, answer = _TEXT.split("?")[0] + "?", _TEXT.split("?")[1]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        with contextlib.suppress(Exception):  # templates are programs, and some take other messages only
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            sequences.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    drawn = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))[:_LENGTH].tolist()
    sequences.append(drawn)
    tokens = [token for token in _own_tokens(adapter_config) if token < vocab_size]
    if tokens:
        sequences.append([token for pair in zip(tokens, drawn, strict=False) for token in pair])
    waits_for = adapter_config.get("alora_invocation_tokens") or []
    sequences = [sequence[: _LENGTH - len(waits_for)] for sequence in sequences]
    if waits_for:  # in the middle: the adapter works from there on, and must not do so before
        sequences = [one[: len(one) // 2] + waits_for + one[len(one) // 2 :] for one in sequences]
    return [sequence for sequence in sequences if len(sequence) > 1 and max(sequence) < vocab_size]


def _own_tokens(adapter_config: dict[str, Any]) -> list[int]:
    found = adapter_config.get("trainable_token_indices") or adapter_config.get("token_indices") or []
    if isinstance(found, dict):
        found = [token for tokens in found.values() for token in tokens]
    return sorted(set(found))


@torch.no_grad()
def log_probs(model: torch.nn.Module, sequences: list[list[int]]) -> torch.Tensor:
    """Log-probs of the tokens of some sequences, one after the other. # (T,)"""
    device = next(model.parameters()).device
    model.eval()
    found = []
    for sequence in sequences:
        ids = torch.tensor(sequence, device=device)  # (S,)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()  # (S-1, V)
        found.append(logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1).cpu())
    return torch.cat(found)


# ---- Arithmetic in 32 bits ----


@contextlib.contextmanager
def in_32_bits(model: torch.nn.Module, moved: Collection[str] = ()) -> Iterator[None]:
    """Compute a model's forward passes in 32 bits, whatever its weights are saved in: a module at a time, as all of it may not fit.

    Args:
        model (`torch.nn.Module`): On the CPU or another device; not quantised.
        moved (`Collection[str]`): Names of modules whose weights are moved at random, as far as rounding to their type may have moved
            them; `""` for all.
    """
    generator = torch.Generator().manual_seed(0)
    before: dict[torch.nn.Module, list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor | None]]] = {}

    def widen(
        module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], jitter: bool
    ) -> tuple[tuple, dict[str, Any]]:
        kept = []
        parts = module.modules() if is_wrapper(module) else [module]
        for part in parts:
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_floating_point():
                        kept.append((tensors, name, tensor, tensor.data))
        for tensors, name, tensor, data in kept:
            wide = data.float()
            if jitter:
                wide = wide + _rounding(wide, data.dtype, generator)
            if isinstance(tensor, torch.nn.Parameter):
                tensor.data = wide
            else:
                tensors[name] = wide
        before[module] = kept
        return _wide(args), _wide(kwargs)

    def narrow(module: torch.nn.Module, *_: Any) -> None:
        for tensors, name, tensor, data in before.pop(module, []):
            if isinstance(tensor, torch.nn.Parameter):
                tensor.data = data
            else:
                tensors[name] = tensor

    handles = []
    for name, module in _units(model):
        jitter = any(not one or f"{name}.".startswith(f"{one}.") for one in moved)

        def pre(module, args, kwargs, jitter=jitter):
            return widen(module, args, kwargs, jitter)

        handles.append(module.register_forward_pre_hook(pre, with_kwargs=True))
        handles.append(module.register_forward_hook(narrow, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_wrapper(module: torch.nn.Module) -> bool:
    """Whether a module is PEFT's, around one of the base."""
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _units(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules that hold weights of their own, and PEFT's layers, whose parts multiply with each other's weights."""
    wrapper = None
    for name, module in model.named_modules():
        if wrapper is not None and name.startswith(f"{wrapper}."):
            continue
        if is_wrapper(module):
            wrapper = name
            yield name, module
        elif module._parameters:
            yield name, module


def _wide(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_wide(one) for one in value)
    if type(value) is dict:
        return {name: _wide(one) for name, one in value.items()}
    return value


def _rounding(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """As much, at random, as rounding to a type may have changed values. # like `values`"""
    limits = torch.finfo(dtype)
    _, exponent = torch.frexp(values)  # of mantissas from 0.5 to 1
    last_digit = torch.ldexp(torch.full_like(values, limits.eps / 2), exponent)
    last_digit = last_digit.clamp_min(limits.smallest_normal * limits.eps) * (values != 0)
    if dtype == torch.float32:
        last_digit *= 4  # half a digit cannot be added, and the arithmetic rounds as the weights do
    drawn = torch.rand(values.shape, generator=generator).to(values.device)
    return (drawn - 0.5) * last_digit


# ---- The verdict ----


def distances(
    base: torch.Tensor, adapted: torch.Tensor, merged: torch.Tensor, moved: torch.Tensor
) -> dict[str, float | int | None]:
    """What the adapter does, how far the merge is from it, and what rounding alone does. # nats a token

    Args:
        base (`torch.Tensor`): Log-probs of the base. # (T,)
        adapted (`torch.Tensor`): With the adapter on it. # (T,)
        merged (`torch.Tensor`): Of the checkpoint. # (T,)
        moved (`torch.Tensor`): Of the checkpoint with its weights moved as rounding moves them. # (T,)
    """
    off = (merged - adapted).abs()
    effect = (adapted - base).abs().mean().item()
    return {
        "mean_difference": off.mean().item(),
        "largest_difference": off.max().item(),
        "adapter_effect": effect,
        "share_of_effect": off.mean().item() / effect if effect > 0 else None,
        "rounding": (moved - merged).abs().mean().item(),
        "compared_tokens": len(off),
    }


def hold_to_effect(place: PolicySource, found: dict[str, Any], dtype: str, as_asked: bool) -> None:
    """Hold a merge to what its adapter does.

    Args:
        place ([`PolicySource`]): The adapter.
        found (`dict`): Of [`distances`].
        dtype (`str`): What the checkpoint is saved in.
        as_asked (`bool`): Whether the user chose that type, which is what it takes to round an adapter away.

    Raises:
        AMAError: If the merge is another model, or too little of the adapter is left in it.
    """
    off, effect, rounding = found["mean_difference"], found["adapter_effect"], found["rounding"]
    kind = place.adapter_config.get("peft_type")
    if not all(map(math.isfinite, (off, effect, rounding))) or off > _OFF * effect + _ROUNDING * rounding:
        raise AMAError(
            f"Merged, {place.who} ('{place.given}') gives other log-probs than on its base, by {off:.2g} nats a token where the adapter "
            f"itself changes {effect:.2g} and rounding to {dtype} {rounding:.2g}: PEFT merges this adapter ({kind}) into something else. Use it "
            "as an adapter."
        )
    if off > _LOST * effect and dtype != "float32" and not as_asked:
        raise AMAError(
            f"{capital(place.who)} ('{place.given}') changes log-probs by {effect:.2g} nats a token, and rounding the merged weights to "
            f"{dtype} by {off:.2g}: much of it would be rounded away. Keep it with --save_dtype float32, or pass --save_dtype {dtype} to "
            "have it rounded all the same."
        )


def hold_to_training(place: PolicySource, found: dict[str, Any]) -> None:
    """Hold the weights of a quantised base, written out, to that base.

    Args:
        place ([`PolicySource`]): The adapter.
        found (`dict`): With `quantized_base_difference` and `quantized_difference`: how far the written-out weights are from the quantised
            ones, without and with the adapter. # nats a token

    Raises:
        AMAError: If they are another base, or the adapter is another one on them.
    """
    base, adapted = found["quantized_base_difference"], found["quantized_difference"]
    if not base <= _TRAINED or not adapted <= 3 * base + found["adapter_effect"] * _OFF:
        raise AMAError(
            f"{capital(place.who)} ('{place.given}') gives other log-probs on the quantised base than on its weights written out, by "
            f"{adapted:.2g} nats a token, where the base without it differs by {base:.2g}. Use it as an adapter."
        )
