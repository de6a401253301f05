"""What a trial may conclude, and what it may not: errors that say nothing of the model, other processes, precision in use, and
tokens that meet by less than rounding."""

from types import SimpleNamespace

import pytest
import torch
from prefix_cases import EXPERTS, FAST, HEADS_OF_8, TINY, build, padded, random_pairs, sharing

import trl_ama.fast_path.choice as choice
from trl_ama import AMAError
from trl_ama.fast_path.failures import is_out_of_memory, says_nothing
from trl_ama.fast_path.leak import routes_tokens, why_tokens_meet, with_other_tokens
from trl_ama.fast_path.packing import CannotShare, pack_pairs
from trl_ama.fast_path.proof import prove
from trl_ama.fast_path.rules import _rounds_products, computes_in_32_bits


CALL = padded(random_pairs(3, seed=0, prompts=(4, 9), answers=(4, 9)))
ACCELERATOR_ERROR = getattr(torch, "AcceleratorError", RuntimeError)


def row_of(call):
    return pack_pairs(call["input_ids"], call["attention_mask"], call["labels"] != -100)


def raises_once(error, when=lambda kwargs: True):
    left = [error]

    def hook(module, args, kwargs):
        if left and when(kwargs):
            raise left.pop()

    return hook


# ---- Errors that are about the device ----


@pytest.mark.parametrize(
    ("error", "no_memory", "nothing"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), True, True),
        (torch.OutOfMemoryError("what another allocator says"), True, True),
        (ACCELERATOR_ERROR("CUDA error: out of memory"), True, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, True),
        (ACCELERATOR_ERROR("CUDA error: device-side assert triggered"), False, True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, False),
        (TypeError("forward() got an unexpected keyword argument"), False, False),
    ],
)
def test_what_errors_mean(error, no_memory, nothing):
    assert (is_out_of_memory(error), says_nothing(error)) == (no_memory, nothing)


def test_a_broken_device_is_no_verdict_on_the_model():
    """Taken for one, the run would go on, on a device on which everything fails, and on the plain path for ever."""
    for error in (
        ACCELERATOR_ERROR("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: unspecified"),
    ):
        model, chooser = build("Llama", TINY), sharing()
        handle = model.register_forward_pre_hook(raises_once(error), with_kwargs=True)
        with pytest.raises(type(error), match="CUDA error"):
            chooser.pack(model, CALL)
        assert not chooser._trials
        handle.remove()
        model.register_forward_pre_hook(raises_once(error, lambda kwargs: "packed_pairs" in kwargs), with_kwargs=True)
        with pytest.raises(type(error), match="CUDA error"):
            prove(model, CALL, row_of(CALL), exact=True)


def test_a_trial_without_memory_is_tried_again_shorter(monkeypatch):
    """Also one that ends at a window; what it had in memory is let go of first."""
    cleared = []
    monkeypatch.setattr("trl_ama.fast_path.trial.clear_device_cache", lambda **kwargs: cleared.append(kwargs))
    window = {"num_experts": 4, "num_experts_per_tok": 2, "use_sliding_window": True, "sliding_window": 30,
              "moe_intermediate_size": 32}  # fmt: skip
    model, chooser = build("Qwen2Moe", {**TINY, **window}), sharing()
    too_long = raises_once(
        torch.OutOfMemoryError("CUDA out of memory."), lambda kwargs: kwargs["input_ids"].shape == (2, 30)
    )
    model.register_forward_pre_hook(too_long, with_kwargs=True)
    assert chooser.pack(model, CALL) is not None
    (tried,) = chooser._trials.values()
    longest = row_of(CALL).longest + 1
    assert tried.length == max(15, longest) and tried.beyond is None and cleared == [{"garbage_collection": True}]


# ---- Processes of one mind ----


def passes(monkeypatch, others, hook=None):
    """How often the model runs in a trial, where another process finds what `others` says at each question."""
    asked = []

    def of_all(own):
        asked.append(own)
        return [own, others.get(len(asked), own if isinstance(own, int) else None)]

    monkeypatch.setattr(choice, "of_all", of_all)
    monkeypatch.setattr(choice, "_several_processes", lambda: True)
    model, chooser, count = build("Llama", TINY), sharing(max_length=None), []
    if hook is not None:
        model.model.layers[0].mlp.register_forward_hook(hook)
    model.register_forward_pre_hook(lambda *_: count.append(1))
    chooser._trainer.accelerator.distributed_type = "DistributedType.FSDP"
    taken = chooser.pack(model, CALL, "policy") is not None
    return len(count), taken, asked, chooser


def leaky(module, args, output):
    return output + 0.5 * output.roll(1, dims=1)


def test_all_processes_run_a_shared_out_model_equally_often(monkeypatch):
    """One that stopped at the first difference would leave the others waiting in the next forward pass."""
    count, taken, asked, _ = passes(monkeypatch, {})
    length = row_of(CALL).longest + 1
    assert taken and asked == [
        length,
        None,
        None,
        None,
        None,
    ]  # length, twice whether they moved, the verdict, the proof's
    here = passes(monkeypatch, {}, leaky)
    there = passes(
        monkeypatch, {**dict.fromkeys(range(2, 6), "they moved"), 6: "another reason"}
    )  # asked twice of each row
    assert here[0] == there[0] > count and not here[1] and not there[1]
    assert list(there[3]._trials.values()) == ["another reason"]


def test_a_trial_is_as_long_on_all_processes(monkeypatch):
    """Without max_length it is as long as a process's own batch asks for: one of them has the longest."""
    *_, chooser = passes(monkeypatch, {1: 40})
    assert [tried.length for tried in chooser._trials.values()] == [80]
    count, taken, asked, chooser = passes(monkeypatch, {1: None})  # another process's batch cannot be packed
    assert (count, taken, len(asked)) == (0, False, 2) and not chooser._trials and not chooser._said


def test_a_shared_out_model_is_not_tried_by_one_process_alone(monkeypatch):
    monkeypatch.setattr(choice, "of_all", lambda own: pytest.fail("nobody answers"))
    monkeypatch.setattr(choice, "_several_processes", lambda: True)
    model, chooser = build("Llama", TINY), sharing()
    chooser._trainer.accelerator.distributed_type = "DistributedType.FSDP"
    assert chooser.pack(model, CALL) is None
    assert not chooser._trials


# ---- Tokens that meet ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leak", [1e-3, 0.0])
def test_a_leak_far_below_rounding_is_seen(dtype, leak):
    """By less than a thousandth of what rounding in 16 bits does to log-probs, and than float32 is asked for."""
    model = build("Llama", TINY).to(dtype)
    model.model.layers[0].register_forward_hook(lambda _, args, output: output + leak * output.roll(1, dims=1))
    if not leak:
        assert sharing(True).pack(model, CALL) is not None
        return
    with pytest.raises(AMAError, match="with the tokens of another: tokens meet elsewhere than in attention"):
        sharing(True).pack(model, CALL)


@pytest.mark.parametrize("name", FAST)
def test_in_16_bits_nothing_moves_that_must_not(name):
    assert sharing(True).pack(build(name, FAST[name]).bfloat16(), CALL) is not None


def test_other_tokens_in_one_branch_of_every_pair():
    call = padded([([5, 6, 7], [8, 9, 10], [8, 11]), ([20], [21, 22], [23, 24, 25])])
    pairs = row_of(call)  # 5 6 7 8 | 9 | - || 20 | 21 | 23 24
    pairs.cache["layers"] = 3
    other = with_other_tokens(pairs, 25)
    assert other.input_ids.tolist() == [[5, 6, 7, 8, 10, 20, 21, 24, 0]]
    assert other.lengths == pairs.lengths and not other.cache and pairs.cache and pairs.input_ids[0, -1] == 24


DENSE, ROUTED = build("Llama", TINY).config, build("Qwen3Moe", EXPERTS).config


@pytest.mark.parametrize(
    ("config", "moves", "rows_move", "again", "is_leak"),
    [
        (DENSE, 0.0, 0.0, 0.0, False),
        (DENSE, 1e-6, 0.0, 0.0, True),
        (DENSE, 1e-6, 1e-6, 0.0, False),  # as rows of the plain path do: scales of a batch
        (DENSE, 1e-6, 0.0, 1e-7, False),  # kernels that never give the same bits
        (ROUTED, 1e-6, 0.0, 0.0, False),  # experts get other numbers of tokens
        (ROUTED, 0.1, 0.0, 0.0, True),
        (DENSE, 0.1, 0.1, 0.01, True),
    ],
)
@pytest.mark.parametrize("exact", [True, False])
def test_what_may_move_by_rounding(config, moves, rows_move, again, is_leak, exact):
    pairs, calls = row_of(CALL), []

    def packed(batch):
        calls.append(batch)
        moved = moves if batch is not pairs else again * len(calls)
        return torch.full(CALL["labels"][:, 1:].shape, -1.0) - moved

    def plain(call):
        return (
            torch.full(CALL["labels"][:, 1:].shape, -1.0) - rows_move * (call["input_ids"] != CALL["input_ids"]).any()
        )

    reason = why_tokens_meet(packed, plain, CALL, pairs, config, exact)
    assert (reason is not None) == is_leak
    # What is known of the row saves a pass where nothing moves, and decides nothing where it was computed otherwise
    for off, passes in ((0.0, 1 if not moves else 3), (1e-5, 2 if not moves else 3)):
        calls.clear()
        known = torch.full(CALL["labels"][:, 1:].shape, -1.0) + off
        assert why_tokens_meet(packed, plain, CALL, pairs, config, exact, known=known) == reason
        assert len(calls) == passes


def test_which_models_have_experts():
    routed = {name for name in FAST if routes_tokens(build(name, FAST[name]).config)}
    assert routed == {"Qwen3Moe", "DeepseekV3"}
    assert routes_tokens(build("Mixtral", {**HEADS_OF_8, "num_local_experts": 4}).config)


# ---- Precision in use ----


needs_new_settings = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch 2.9 has them")


@pytest.fixture
def precision():
    """All settings of it are as before afterwards, also those that only follow another."""
    places = [torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "none"
    yield
    for place, value in zip(places, before, strict=True):
        place.fp32_precision = value


@needs_new_settings
def test_float32_is_asked_what_it_is(precision):
    """TF32 rounds as 16 bits do: held to 1e-3 nats, a model in it was refused for a reason that was none."""
    model = build("Llama", TINY)
    assert computes_in_32_bits(model) and not computes_in_32_bits(model.bfloat16())
    model.float()
    torch.set_float32_matmul_precision("medium")  # bfloat16, where a CPU has products of it
    assert not computes_in_32_bits(model) and not sharing()._is_exact(model)
    torch.set_float32_matmul_precision("high")
    assert _rounds_products("cuda")
    torch.set_float32_matmul_precision("highest")
    assert computes_in_32_bits(model) and not _rounds_products("cuda")


@needs_new_settings
def test_tf32_as_transformers_switches_it_on(precision, monkeypatch):
    from transformers.utils.import_utils import enable_tf32

    enable_tf32(True)
    assert _rounds_products("cuda") and _rounds_products("cpu")
    enable_tf32(False)
    assert not _rounds_products("cuda") and not _rounds_products("cpu")
    older = SimpleNamespace(allow_tf32=True)  # torch 2.6
    monkeypatch.setattr(torch.backends.cuda, "matmul", older)
    assert _rounds_products("cuda")
    older.allow_tf32 = False
    assert not _rounds_products("cuda")
    monkeypatch.undo()  # before the settings are put back


def test_a_convolution_and_a_failure_are_verdicts():
    model = build("Llama", TINY)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: torch.ones(3, 5))
    with pytest.raises(CannotShare, match="a trial failed \\(RuntimeError"):
        sharing().check(model, row_of(CALL), CALL)
