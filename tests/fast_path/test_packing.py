"""Packed pairs have the numbers of padded ones: per token and per gradient, for pairs of every kind; other batches take the
plain path. Models: `test_prefix_architectures.py`, training: `test_prefix_training.py`, GPUs: `test_prefix_flash.py`."""

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from prefix_cases import (
    TINY,
    VOCABULARY,
    assert_same_gradients,
    build,
    exact_gradients,
    gradients,
    padded,
    random_pairs,
    sharing,
    weights_for,
)
from tiny_models import make_model
from trl.trainer.utils import add_fused_lm_head

from trl_ama import AMAConfig, AMAError
from trl_ama.dpo.losses import sequence_logps
from trl_ama.fast_path.packing import CannotShare, PackedPairs, pack_pairs


@pytest.fixture(scope="module")
def llama():
    return build("Llama", TINY)


# ---- Pairs of every kind ----


@pytest.mark.parametrize("beginning", [0, 7, 8, 20])
@pytest.mark.parametrize("seed", range(3))
def test_log_probs_of_every_pair(seed, beginning):
    model, chooser = build("Llama", TINY), sharing()
    for batch in range(6):
        call = padded(random_pairs(8, seed=10 * seed + batch, beginning=beginning))
        with torch.no_grad():
            ours = sequence_logps(chooser.forward(model)(**call).log_probs, (call["labels"] != -100).long())
            theirs = sequence_logps(model(**call).log_probs, (call["labels"] != -100).long())
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
    assert chooser.taken["fast"] == 6


@pytest.mark.parametrize("beginning", [0, 12])
def test_a_branch_does_not_see_the_other_nor_another_pair(beginning):
    model, chooser = build("Llama", TINY), sharing()
    pairs = random_pairs(3, seed=5, prompts=(3, 8), answers=(5, 9), beginning=beginning)
    before = chooser.forward(model)(**padded(pairs)).log_probs
    prompt, chosen, rejected = pairs[0]
    changed = [(prompt, [token % 90 + 4 for token in chosen], rejected), *pairs[1:]]
    after = chooser.forward(model)(**padded(changed)).log_probs
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    assert torch.allclose(before[1:], after[1:], atol=1e-5)


def test_a_packed_row_holds_every_token_once():
    call = padded([([5, 6, 7], [8, 9, 10], [8, 11]), ([20], [21, 22], [23, 24, 25])])
    pairs = pack_pairs(call["input_ids"], call["attention_mask"], call["labels"] != -100)
    # The common 8 belongs to the prefix; the last token of an answer predicts nothing
    assert pairs.input_ids.tolist() == [[5, 6, 7, 8, 9, 20, 21, 23, 24]]
    assert pairs.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 1, 2]]
    assert pairs.lengths == [(4, 1, 0), (1, 1, 2)]
    assert pairs.labels.tolist() == [[8, 9, 10, 21, 22, 11, 23, 24, 25]]
    assert pairs.score_positions.tolist() == [2, 3, 4, 5, 6, 3, 5, 7, 8]
    assert pairs.unpack(torch.arange(9.0)[None] + 1).tolist() == [
        [0, 0, 1, 2, 3],
        [4, 5, 0, 0, 0],
        [0, 0, 1, 6, 0],
        [7, 8, 9, 0, 0],
    ]


def test_a_packed_batch_is_no_dataclass():
    """FSDP makes another object of every dataclass that it finds among inputs, and what layers note would be lost."""
    assert not hasattr(PackedPairs, "__dataclass_fields__")


def test_what_all_pairs_begin_with_is_in_the_row_once():
    system = list(range(50, 58))
    call = padded(
        [([*system, 5, 6], [7, 8], [9, 10]), ([*system, 20], [21, 22], [21, 23, 24]), (system, [5, 30], [5, 31])]
    )
    pairs = pack_pairs(call["input_ids"], call["attention_mask"], call["labels"] != -100)
    assert pairs.common == 8
    assert pairs.input_ids.tolist() == [[*system, 5, 6, 7, 9, 20, 21, 23, 5]]
    assert pairs.position_ids.tolist() == [[*range(8), 8, 9, 10, 10, 8, 9, 10, 8]]
    assert pairs.lengths == [(2, 1, 1), (2, 0, 1), (1, 0, 0)]
    # The third pair's first answer token is predicted by the last token that all have in common
    assert pairs.score_positions.tolist() == [9, 10, 12, 13, 7, 15, 9, 11, 13, 14, 15]
    assert pairs.longest == 11
    short = padded([([*system[1:], 5], [7], [9]), ([*system[1:], 6], [7], [9])])  # not worth it
    assert pack_pairs(short["input_ids"], short["attention_mask"], short["labels"] != -100).common == 0


def test_pairs_with_one_prompt(llama):
    """The whole prompt is what all begin with, and predicts the first token of every answer."""
    prompt = list(range(40, 52))
    call = padded([(prompt, [7, 8, 9], [10]), (prompt, [7, 9], [11, 12]), (prompt, [7, 9], [7, 9])])
    assert pack_pairs(call["input_ids"], call["attention_mask"], call["labels"] != -100).common == 12
    ours, theirs = both_paths(llama, call)
    assert torch.allclose(ours, theirs, atol=1e-5)


# (prompt, chosen, rejected, why)
EDGES = {
    "both answers are the same": ([5, 6], [7, 8, 9], [7, 8, 9]),
    "chosen is where rejected begins": ([5, 6], [7, 8], [7, 8, 9, 10]),
    "rejected is where chosen begins": ([5, 6], [7, 8, 9, 10], [7]),
    "answers of one token": ([5], [7], [8]),
    "an empty chosen answer": ([5, 6, 4], [], [8, 9]),
    "an empty rejected answer": ([5, 6, 4], [8, 9], []),
    "answers that differ in the last token": ([5, 6], [7, 8, 9, 10], [7, 8, 9, 11]),
    "answers that differ in the first token": ([5, 6], [7, 8, 9], [10, 8, 9]),
    "a long prompt": ([5, 6, 7] * 12, [8, 9], [10]),
}


def both_paths(model, call) -> tuple[torch.Tensor, torch.Tensor]:
    chooser = sharing(True)  # an error rather than the plain path
    shared, plain = chooser.forward(model)(**call), model(**call)
    weights = weights_for(call)
    assert_same_gradients(
        gradients(shared, model, weights), gradients(plain, model, weights), exact_gradients(model, call, weights)
    )
    return shared.log_probs, plain.log_probs


@pytest.mark.parametrize("case", EDGES)
def test_pairs_of_every_kind(llama, case):
    """Alone, and between two others."""
    others = random_pairs(2, seed=1)
    for pairs in ([EDGES[case]], [others[0], EDGES[case], others[1]]):
        ours, theirs = both_paths(llama, padded(pairs))
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert bool((theirs != 0).any())


@pytest.mark.parametrize("length", [4, 7, 9, 12])
def test_answers_that_max_length_cuts(llama, length):
    call = padded(random_pairs(6, seed=2, prompts=(1, 6), answers=(6, 14)))
    cut = {name: call[name][:, :length] if isinstance(call[name], torch.Tensor) else call[name] for name in call}
    ours, theirs = both_paths(llama, cut)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_prompts_that_are_tokenised_differently(llama):
    """The answer's first character may change the prompt's last token, or how many there are."""
    call = padded(random_pairs(4, seed=3, prompts=(5, 9), answers=(4, 9)))
    call["input_ids"][0, 3] = 50  # within the prompt of one sequence of a pair
    call["input_ids"][1, 0] = 51  # so that nothing is shared
    call["labels"][2, 4] = -100
    ours, theirs = both_paths(llama, call)
    assert torch.allclose(ours, theirs, atol=1e-5)
    lengths = pack_pairs(call["input_ids"], call["attention_mask"], call["labels"] != -100).lengths
    assert lengths[0][0] == 3 and lengths[1][0] == 0


def test_tokens_inside_of_answers_that_are_not_scored(llama):
    """Also where only one of the two sequences scores a token that they share."""
    call = padded([([5, 6], [7, 8, 9, 10, 11], [7, 8, 12, 13]), ([5], [9, 8, 7, 6], [9, 8, 7, 5])])
    call["labels"][0, 4] = call["labels"][2, 3] = call["labels"][3, 1:3] = call["labels"][1, 2] = -100
    ours, theirs = both_paths(llama, call)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.equal(ours != 0, call["labels"][:, 1:] != -100)


def test_ld_alpha_reads_the_lengths_of_the_padded_batch(llama):
    call = padded(random_pairs(8, seed=4))
    mask = (call["labels"] != -100).long()
    ours, theirs = both_paths(llama, call)
    for alpha in (0.0, 0.3, 1.0):
        for one, other in zip(sequence_logps(ours, mask, alpha), sequence_logps(theirs, mask, alpha), strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_random_pairs_over_few_tokens(llama, seed, monkeypatch):
    """Three tokens only, so that sequences agree by chance in many ways."""
    monkeypatch.setattr("trl_ama.fast_path.packing.WORTH_SHARING", 1)
    generator = torch.Generator().manual_seed(seed)

    def tokens(low):
        size = int(torch.randint(low, 7, (1,), generator=generator))
        return torch.randint(3, 6, (size,), generator=generator).tolist()

    call = padded([(tokens(1), tokens(0), tokens(1)) for _ in range(5)])
    hidden = torch.rand(call["labels"].shape, generator=generator) < 0.2
    call["labels"] = call["labels"].masked_fill(hidden, -100)
    ours, theirs = both_paths(llama, call)
    assert torch.allclose(ours, theirs, atol=1e-5)


# ---- Where it is not taken ----


def test_a_batch_that_is_no_pairs_takes_the_plain_path():
    model, chooser = build("Llama", TINY), sharing()
    call = padded(random_pairs(4, seed=0))
    left = {**call, "attention_mask": call["attention_mask"].flip(1)}
    for other in ({"token_type_ids": torch.zeros(8, 5)}, {"output_router_logits": True}):
        assert chooser.pack(model, {**call, **other}) is None
    assert chooser.pack(model, left) is None
    with pytest.raises(AMAError, match="not padded on the right"):
        sharing(True).pack(model, left)
    assert chooser.pack(model, {**call, "fused_lm_head": False}) is None
    with pytest.raises(CannotShare, match="none of its tokens is scored"):
        pack_pairs(call["input_ids"], call["attention_mask"], torch.zeros_like(call["labels"]))
    assert isinstance(chooser.pack(model, call), PackedPairs)


def test_dropout_prompt_learning_and_compiling_take_the_plain_path():
    call = padded(random_pairs(2, seed=0))
    model = make_model(VOCABULARY, attention_dropout=0.1)
    add_fused_lm_head(model)
    assert sharing().pack(model.train(), call) is None
    with pytest.raises(AMAError, match="dropout is on"):
        sharing(True).pack(model.train(), call)
    assert sharing().pack(model.eval(), call) is not None
    assert sharing(n_gpu=2).pack(model, call) is None  # DataParallel would split the row
    assert sharing(torch_compile=True).pack(model, call) is None
    assert sharing(False).pack(model, call) is None
    learned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    wrapper = torch.nn.Module()  # as DistributedDataParallel holds a model
    wrapper.module = learned
    for model in (learned, wrapper):
        with pytest.raises(AMAError, match="learns a prompt"):
            sharing(True).pack(model, call)


def test_the_field_takes_strings_and_refuses_others(tmp_path):
    for given, meant in (("auto", "auto"), ("true", True), ("False", False), (True, True)):
        assert AMAConfig(str(tmp_path), prefix_sharing=given, bf16=False).prefix_sharing == meant
    with pytest.raises(AMAError, match="'auto', True or False, got 'on'"):
        AMAConfig(str(tmp_path), prefix_sharing="on", bf16=False)
