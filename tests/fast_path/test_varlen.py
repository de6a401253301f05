"""One call a layer on a GPU: by which kernel, with which keys, and that it gives what attention block by block gives. The kernels
themselves are stand-ins here; see `tests/support/fake_flash.py`."""

import pytest
import torch
from fake_flash import fake_varlen as fake_varlen
from prefix_cases import (
    FAST,
    assert_same_gradients,
    build,
    exact_gradients,
    gradients,
    padded,
    random_pairs,
    sharing,
    weights_for,
)
from torch.utils._python_dispatch import TorchDispatchMode

from trl_ama.fast_path import attention, varlen
from trl_ama.fast_path.attention import blocks
from trl_ama.fast_path.packing import PackedPairs, pack_pairs
from trl_ama.fast_path.varlen import BLOCKS, EFFICIENT, FLASH, Card, gathered, kernel_for


CPU = torch.device("cpu")
# Of the rest of the prefix, and of both branches
LENGTHS = {
    "pairs": [(5, 3, 4), (1, 6, 2), (7, 1, 9)],
    "empty branches": [(5, 0, 4), (3, 6, 0), (0, 2, 1), (2, 0, 0)],
    "one pair": [(4, 3, 2)],
    "nothing shared": [(0, 3, 2), (0, 0, 4)],
}


def row(common: int, lengths: list[tuple[int, int, int]]) -> PackedPairs:
    """Only what attention reads of a row."""
    return PackedPairs(*[None] * 6, common, lengths)


def states(pairs: PackedPairs, heads=(4, 2), sizes=(8, 8), dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = pairs.common + sum(map(sum, pairs.lengths))
    shapes = [(heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1])]
    made = [torch.randn(1, tokens, count, size, generator=generator, dtype=dtype) for count, size in shapes]
    return [value.transpose(1, 2).requires_grad_() for value in made]  # as layers have them


# ---- The plan ----


@pytest.mark.parametrize("common", [0, 11])
@pytest.mark.parametrize("case", LENGTHS)
def test_every_sequence_sees_what_is_before_it(common, case):
    pairs = row(common, LENGTHS[case])
    plan = pairs.plan(CPU)
    beginning, start, expected = list(range(common)), common, []
    if common:
        expected.append((beginning, beginning))
    for prefix, chosen, rejected in pairs.lengths:
        own = list(range(start, start + prefix + chosen + rejected))
        branch = own[prefix + chosen :]
        expected += [(own[: prefix + chosen], [*beginning, *own[: prefix + chosen]])]
        expected += [(branch, [*beginning, *own[:prefix], *branch])]
        start += len(own)
    expected = [(queries, keys) for queries, keys in expected if queries]
    assert plan.gather.tolist() == [key for _, keys in expected for key in keys]
    for bounds, side in ((plan.cu_q, 0), (plan.cu_k, 1)):
        assert bounds.dtype == torch.int32
        assert bounds.diff().tolist() == [len(sequence[side]) for sequence in expected]
    assert [token for queries, _ in expected for token in queries] == list(range(start))
    assert plan.cu_k.diff().max() == max(len(keys) for _, keys in expected) <= plan.max_k
    # Each copy of each token is known to it
    for token in range(common, start):
        copies = {int(plan.own[token - common]), int(plan.again[token - common])}
        assert copies == set((plan.gather == token).nonzero().flatten().tolist())
        assert int(plan.twice[token - common]) == len(copies) - 1
    for token in range(common):
        copies = plan.of_common.view(common, -1)[token]
        assert copies.tolist() == (plan.gather == token).nonzero().flatten().tolist()


def test_a_plan_goes_with_its_pairs():
    call = padded(random_pairs(3, seed=0, beginning=9))
    pairs = pack_pairs(call["input_ids"], call["attention_mask"], call["labels"] != -100)
    assert not pairs.on("meta")._plans  # nobody has asked for one
    pairs.plan(CPU)
    moved = pairs.on("meta")
    assert moved.scored.is_meta and moved.lengths == pairs.lengths
    plan = moved.plan(torch.device("meta"))
    assert plan.gather.is_meta and plan.of_common.is_meta and plan.max_k == pairs.plan(CPU).max_k
    assert moved.plan(torch.device("meta")) is plan
    assert not hasattr(pairs, "to")  # or Accelerate's hooks would hand another object to every layer


# ---- Against blocks ----


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("common", [0, 11])
@pytest.mark.parametrize("case", LENGTHS)
def test_outputs_and_gradients_are_those_of_blocks(case, common, window, fake_varlen):
    pairs = row(common, LENGTHS[case])
    ours, theirs = states(pairs), states(pairs)
    one = varlen.varlen(*ours, pairs.plan(CPU), 0.3, window, FLASH)
    other = blocks(*theirs, pairs, scaling=0.3, window=window)
    weights = torch.randn(one.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for output in (one, other):
        (output * weights).sum().backward()
    assert torch.allclose(one, other, atol=1e-12) and len(fake_varlen.varlen_calls) == 1
    for our, their in zip(ours, theirs, strict=True):
        assert torch.allclose(our.grad, their.grad, atol=1e-12) and bool(their.grad.any())


def test_values_may_have_other_heads_than_keys(fake_varlen):
    pairs = row(0, LENGTHS["pairs"])
    ours, theirs = (states(pairs, heads=(4, 4), sizes=(12, 8)) for _ in range(2))
    one = varlen.varlen(*ours, pairs.plan(CPU), None, None, EFFICIENT)
    other = blocks(*theirs, pairs)
    assert one.shape == other.shape and torch.allclose(one, other, atol=1e-12)
    for output in (one, other):
        output.square().sum().backward()
    assert all(torch.allclose(our.grad, their.grad, atol=1e-12) for our, their in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("window", [None, 4])
def test_blocks_of_a_gpu_are_those_of_a_cpu(window, monkeypatch):
    """Grouped heads are repeated there, and the mask is one that kernels know by name."""
    pairs = row(11, LENGTHS["empty branches"])
    ours, theirs = states(pairs), states(pairs)
    monkeypatch.setattr(attention, "kernel_for", lambda *args: BLOCKS)
    layer = torch.nn.Module()
    call = attention.PairAttention("sdpa", None)
    with varlen.as_on_a_gpu():
        one, _ = call(layer, *ours, None, scaling=0.3, packed_pairs=pairs, sliding_window=window)
    other, _ = call(layer, *theirs, None, scaling=0.3, packed_pairs=pairs, sliding_window=window)
    assert one.dtype == torch.float64 and torch.allclose(one, other, atol=1e-12)
    for output in (one, other):
        output.square().sum().backward()
    assert all(torch.allclose(our.grad, their.grad, atol=1e-12) for our, their in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("beginning", [0, 11])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3Text", "DeepseekV3"])
def test_models(name, beginning, fake_varlen, monkeypatch):
    """Log-probs and gradients by parameter, with one call a layer."""
    model = build(name, FAST[name])
    call = padded(random_pairs(6, seed=0, beginning=beginning))
    weights = weights_for(call)
    exact = exact_gradients(model, call, weights)
    plain = model(**call)
    expected = gradients(plain, model, weights)
    if getattr(model.config, "sliding_window", None):
        monkeypatch.setattr(attention, "kernel_for", lambda *args: FLASH)
    chooser = sharing(True)
    with torch.no_grad():
        chooser.forward(model)(**call)  # the trial
    del fake_varlen.varlen_calls[:]
    shared = chooser.forward(model)(**call)
    assert len(fake_varlen.varlen_calls) == model.config.num_hidden_layers
    assert torch.allclose(shared.log_probs, plain.log_probs, atol=2e-5)
    assert_same_gradients(gradients(shared, model, weights), expected, exact)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, fake_varlen):
    model = build("Llama", FAST["Llama"]).train()
    call = padded(random_pairs(5, seed=1, beginning=9))
    weights = weights_for(call)
    exact = exact_gradients(model, call, weights)
    expected = gradients(model(**call), model, weights)
    chooser = sharing(True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with torch.no_grad():
        chooser.forward(model)(**call)  # the trial and the proof
    del fake_varlen.varlen_calls[:]
    assert_same_gradients(gradients(chooser.forward(model)(**call), model, weights), expected, exact)
    assert len(fake_varlen.varlen_calls) == 4  # two layers, forward and again


# ---- Sums of gradients ----


def test_gradients_of_many_copies_are_summed_in_32_bits():
    """The common beginning of 32 pairs has 65 copies. A GPU's atomic additions, and autograd's, round to 16 bits after each."""
    pairs = row(16, [(2, 1, 1)] * 32)
    plan = pairs.plan(CPU)
    grad = torch.randn(len(plan.gather), 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = torch.zeros(16 + 4 * 32, 2, 8, dtype=torch.float64).index_add_(0, plan.gather, grad.double())
    rows = torch.zeros(16 + 4 * 32, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    gathered(rows, plan).backward(grad)
    one_by_one = torch.zeros(16, 2, 8, dtype=torch.bfloat16)
    for copies in plan.of_common.view(16, -1).T:
        one_by_one += grad[copies]

    def error(sums: torch.Tensor) -> float:
        wrong = sums.double() - exact[: len(sums)]
        return (wrong.norm() / exact[: len(sums)].norm()).item()

    assert rows.grad.dtype == torch.bfloat16
    assert error(rows.grad) < 2.5e-3 and error(rows.grad[:16]) < error(one_by_one) / 3  # 1.6e-3 and 9.7e-3


# ---- The rule ----

HALF, SINGLE = torch.bfloat16, torch.float32
AMPERE, HOPPER, ADA, TURING = Card((8, 0)), Card((9, 0)), Card((8, 9)), Card((7, 5))
NEW = Card((12, 0))


@pytest.mark.parametrize(
    ("arguments", "kernel"),
    [
        ((None, HALF, 64, 64), BLOCKS),  # CPUs, AMD's cards and Apple's
        ((AMPERE, HALF, 64, 64), FLASH),
        ((AMPERE, torch.float16, 64, 64), FLASH),
        ((HOPPER, HALF, 128, 128), FLASH),
        ((NEW, HALF, 128, 128), FLASH),
        ((AMPERE, HALF, 64, 64, 512), FLASH),
        ((AMPERE, HALF, 64, 64, None, 0.1), BLOCKS),
        ((AMPERE, HALF, 256, 256), FLASH),
        ((AMPERE, HALF, 264, 264), EFFICIENT),
        ((AMPERE, HALF, 224, 224), FLASH),
        ((ADA, HALF, 224, 224), EFFICIENT),
        ((ADA, HALF, 256, 256), FLASH),
        ((AMPERE, HALF, 192, 128), EFFICIENT),  # latent attention
        ((AMPERE, HALF, 192, 128, 512), BLOCKS),  # its gradients know no window
        ((AMPERE, HALF, 60, 60), BLOCKS),
        ((AMPERE, SINGLE, 64, 64), EFFICIENT),
        ((AMPERE, SINGLE, 64, 64, 512), BLOCKS),
        ((AMPERE, SINGLE, 60, 60), EFFICIENT),
        ((AMPERE, SINGLE, 62, 62), BLOCKS),
        ((AMPERE, torch.float64, 64, 64), BLOCKS),
        ((TURING, torch.float16, 64, 64), EFFICIENT),
        ((TURING, HALF, 64, 64), BLOCKS),
        ((TURING, SINGLE, 64, 64), EFFICIENT),
        ((Card((8, 0), flash=False), HALF, 64, 64), EFFICIENT),
        ((Card((8, 0), flash=False, efficient=False), HALF, 64, 64), BLOCKS),
    ],
)
def test_the_kernel_is_chosen_by_rule(arguments, kernel):
    assert kernel_for(*arguments) == kernel


def test_the_card_is_that_of_the_tensors():
    assert varlen.card_of(CPU) is None
    with varlen.as_on_a_gpu():
        assert varlen.card_of(CPU).capability == (8, 0)
    assert varlen.card_of(torch.device("mps")) is None


@pytest.mark.parametrize(("length", "kernel"), [(4, None), (30, BLOCKS)])
def test_a_window_that_no_sequence_reaches_is_none(length, kernel, fake_varlen):
    pairs = row(0, [(length, 2, 1)])
    layer, call = torch.nn.Module(), attention.PairAttention("sdpa", None)
    tensors = [value.detach().float() for value in states(pairs)]
    call(layer, *tensors, None, packed_pairs=pairs, sliding_window=6)
    assert len(fake_varlen.varlen_calls) == (0 if kernel == BLOCKS else 1)


def test_autocast_casts_as_for_torchs_own_attention(fake_varlen):
    pairs = row(0, LENGTHS["pairs"])
    layer, call = torch.nn.Module(), attention.PairAttention("sdpa", None)
    tensors = [value.detach().float() for value in states(pairs)]
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = call(layer, *tensors, None, packed_pairs=pairs)
    assert output.dtype == torch.bfloat16 and len(fake_varlen.varlen_calls) == 1


# ---- How torch's kernels are called, on tensors without contents ----


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.name()] = (args, kwargs or {})
        return func(*args, **(kwargs or {}))


META = torch.device("meta")


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("public", [True, False])
def test_flash_takes_the_arguments(public, window, monkeypatch):
    if not public:  # as in torch before 2.12
        monkeypatch.setattr(varlen, "_public_function", lambda: None)
    pairs = row(11, LENGTHS["pairs"])
    tensors = [value.detach().to(META, HALF).requires_grad_() for value in states(pairs)]
    with _Calls() as calls:
        output = varlen.varlen(*tensors, pairs.plan(META), 0.3, window, FLASH)
        output.sum().backward()
    assert output.shape == (1, 11 + 38, 4, 8) and tensors[1].grad.shape == tensors[1].shape
    name = (
        "torch_attn::_varlen_attn_backward"
        if public and varlen._public_function()
        else "aten::_flash_attention_backward"
    )
    args, kwargs = calls.seen[name]
    # The backward pass knows the window too: as the number of keys before the query's own, and none after it
    left = -1 if window is None else window - 1
    given = list(args[-1]) if not kwargs else [kwargs["window_size_left"], kwargs["window_size_right"]]
    assert given == [left, 0]
    assert 0.3 in [value for value in (*args, *kwargs.values()) if isinstance(value, float)]


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_memory_efficient_attention_takes_the_arguments(dtype):
    pairs = row(11, LENGTHS["pairs"])
    tensors = [value.detach().to(META, dtype) for value in states(pairs, sizes=(16, 8))]
    with _Calls() as calls:
        output = varlen.varlen(*tensors, pairs.plan(META), 0.3, None, EFFICIENT)
    assert output.shape == (1, 11 + 38, 4, 8)
    args, kwargs = calls.seen["aten::_efficient_attention_forward"]
    arguments = torch.ops.aten._efficient_attention_forward.default._schema.arguments
    named = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    assert (named["dropout_p"], named["custom_mask_type"], named["scale"]) == (0.0, 2, 0.3)
    assert named.get("compute_log_sumexp", False) is False  # for a backward pass alone
    assert named["key"].shape[2] == 4  # it knows no grouped heads


@pytest.mark.parametrize(
    ("version", "parameters", "takes"),
    [
        ("2.10", "query key value cu_seq_q cu_seq_k max_q max_k is_causal return_aux", False),
        ("2.12", "query key value cu_seq_q cu_seq_k max_q max_k return_aux scale window_size enable_gqa", True),
    ],
)
def test_a_public_function_that_lacks_something_is_not_called(version, parameters, takes):
    assert varlen.takes_all(parameters.split()) is takes
