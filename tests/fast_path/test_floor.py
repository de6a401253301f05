"""The floor of `make bench` counts what torch counts, where both count the same."""

import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from places import TESTS
from prefix_cases import FAST, TINY, build, padded, random_pairs
from torch.utils.flop_counter import FlopCounterMode

from trl_ama.fast_path.attention import _visible
from trl_ama.fast_path.forward import packed_forward
from trl_ama.fast_path.packing import pack_pairs


@pytest.fixture(scope="module")
def floor():
    sys.path.append(str(TESTS / "benchmarks"))
    try:
        import floor  # late: a script's module

        yield floor
    finally:
        sys.path.remove(str(TESTS / "benchmarks"))


def pack(beginning=0):
    call = padded(random_pairs(3, 0, beginning=beginning))
    return pack_pairs(call["input_ids"], call["attention_mask"], call["labels"] != -100)


def lora():
    return get_peft_model(build("Llama", TINY), LoraConfig(r=4, target_modules="all-linear"))


def frozen():
    return build("GPT2", FAST["GPT2"]).requires_grad_(False)  # whose linear layers are of another class


@pytest.mark.parametrize(("make", "grad"), [(lora, True), (lora, False), (frozen, False)])
def test_counts_what_torch_counts(floor, make, grad):
    model, pairs = make(), pack()
    with torch.set_grad_enabled(grad):
        with floor.counted(model, pairs) as work:
            packed_forward(model, pairs, metrics=False, use_cache=False)
        with FlopCounterMode(display=False) as counter:
            outputs = packed_forward(model, pairs, metrics=False, use_cache=False)
            if grad:
                outputs.log_probs.sum().backward()
    found, theirs = work.flops(), counter.get_flop_counts()["Global"]
    products = sum(flops for name, flops in theirs.items() if "attention" not in str(name))
    assert sum(found.values()) - found["attention"] == products
    assert (found["adapters"] > 0) == (make is lora) and min(found["layers"], found["head"], found["attention"]) > 0


def test_a_trained_model_also_needs_the_gradients_of_its_weights(floor):
    model, pairs = build("Llama", TINY), pack()
    with floor.counted(model, pairs) as trained:
        packed_forward(model, pairs, use_cache=False)
    model.requires_grad_(False)
    with floor.counted(model, pairs) as frozen:
        packed_forward(model, pairs, use_cache=False)
    assert trained.flops()["layers"] == 3 * frozen.flops()["layers"]
    assert trained.flops()["head"] == 3 * frozen.flops()["head"]


@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize("beginning", [0, 9])
def test_keys_that_are_seen(floor, window, beginning):
    pairs = pack(beginning)
    assert bool(pairs.common) == bool(beginning)
    blocks = [(pairs.common, 0)]
    for prefix, chosen, rejected in pairs.lengths:
        blocks += [(prefix + chosen, pairs.common), (rejected, pairs.common + prefix)]
    seen = sum(int(_visible(pairs, own, own + before, window, torch.device("cpu")).sum()) for own, before in blocks)
    assert floor.keys_seen(pairs, window) == seen


def test_seconds_are_operations_over_rates(floor):
    work = floor.Work()
    work.linear(floor.LAYERS, 10, (20, 30), True, False)  # 12,000 operations forwards, as many backwards
    work.linear(floor.ADAPTERS, 10, (20, 3), True, True)
    work.attention = 8_000.0
    rates = [dict.fromkeys(work.products, rate) for rate in (1e3, 2e3, 9e3)]
    found = floor.floor_seconds(work, rates)
    assert found == {"layers": 12.0, "head": 0.0, "adapters": 1.8, "attention": 4.0}
    assert floor.above({"layers": 13.0, "else": 2.0}, found, 16.0) == {
        "else": 2.0,
        "layers": 1.0,
        "outside of operators": 1.0,
    }
