"""Whether the fast path is no slower: by the counts and estimates of `fast_path/worth.py`, batch by batch, and alike where processes
must be of one mind. No GPU is needed to ask."""

from types import SimpleNamespace

import pytest
import torch
from prefix_cases import HEADS_OF_8, TINY, build, padded, random_pairs, sharing

import trl_ama.fast_path.choice as choice
import trl_ama.fast_path.worth as rule
from trl_ama.fast_path.packing import pack_pairs
from trl_ama.fast_path.varlen import Card
from trl_ama.fast_path.worth import is_worth_it, seconds_a_layer


def worth(width, pairs, packed, padded_tokens, common=False, trains=True, device="cuda", varlen=False):
    config = SimpleNamespace(hidden_size=width)
    config.get_text_config = lambda: config
    row = SimpleNamespace(input_ids=torch.empty(1, packed), lengths=[(1, 1, 1)] * pairs, common=8 * common)
    return is_worth_it(device, varlen, config, row, padded_tokens, trains)


@pytest.mark.parametrize(
    ("width", "pairs", "length", "expected"),
    [
        (576, 8, 256, False),  # launches are all that such a step waits for
        (576, 32, 256, False),
        (576, 32, 1024, True),
        (4096, 2, 1024, True),
        (4096, 8, 2048, True),
        (4096, 64, 32, False),
    ],
)
@pytest.mark.parametrize("trains", [True, False])
def test_launches_must_be_hidden_behind_work(width, pairs, length, expected, trains):
    tokens = 2 * pairs * length
    if trains or expected:
        assert worth(width, pairs, tokens // 2, tokens, trains=trains) == expected
    for device, varlen in (("cpu", False), ("cuda", True), ("mps", True)):
        assert worth(width, pairs, tokens // 2, tokens, trains=trains, device=device, varlen=varlen)


def test_what_makes_it_less_likely():
    assert worth(1024, 8, 8192, 16384)
    assert not worth(1024, 8, 16384, 16384)  # no token is left out
    assert not worth(128, 8, 8192, 16384)  # a smaller model
    assert not worth(1024, 120, 8192, 16384)  # more, shorter pairs
    assert worth(1024, 40, 8192, 16384) and not worth(1024, 40, 8192, 16384, common=True)  # masks in every block
    assert seconds_a_layer(1024, 8192, 8, True, False) < seconds_a_layer(1024, 8192, 8, True, True)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """One without a variable-length kernel."""
    monkeypatch.setattr(choice, "_device_of", lambda kwargs: torch.device("cuda"))
    monkeypatch.setattr(rule, "card_of", lambda device: None)


FEW, MANY = padded(random_pairs(2, seed=0)), padded(random_pairs(8, seed=1))


def few_pairs(device, varlen, config, pairs, padded_tokens, trains):
    return len(pairs.lengths) < 4


def test_every_batch_is_asked(on_a_gpu, monkeypatch, caplog):
    monkeypatch.setattr(choice, "is_worth_it", few_pairs)
    model, chooser = build("Llama", TINY), sharing()
    for call in (MANY, MANY):
        assert chooser.pack(model, call, "policy") is None
    assert not chooser._trials and not chooser._proofs.get(model)  # nothing was run for it
    assert chooser.pack(model, FEW, "policy") is not None and chooser.pack(model, MANY, "policy") is None
    assert len(chooser._trials) == 1 and list(chooser._proofs[model].values()) == [None]
    assert chooser.taken == {"fast": 1, "plain": 3}
    (said,) = [
        record.message
        for record in caplog.records
        if "Prefix sharing" in record.message and "on for" not in record.message
    ]
    assert "would be slower for LlamaForCausalLM" in said and "prefix_sharing: true takes the fast path" in said


def test_who_asks_for_it_gets_it(on_a_gpu):
    """Whoever sets `prefix_sharing: true` has measured; a kernel for all pairs at once is asked no more."""
    model = build("Llama", TINY)
    assert sharing().pack(model, MANY) is None
    assert sharing(True).pack(model, MANY) is not None
    assert sharing(False).pack(model, FEW) is None
    model.config._attn_implementation = "flash_attention_2"
    chooser = sharing()
    assert chooser._why_slow(model, MANY, None) is None
    model.config._attn_implementation = "sdpa"


@pytest.mark.parametrize(
    ("capability", "precision", "window", "is_slow"),
    [
        ((8, 6), "bf16", None, False),
        ((8, 6), "bf16", 4, False),  # flash attention knows windows
        ((7, 5), "fp16", None, False),
        ((7, 5), "fp16", 4, True),
        ((7, 5), "fp16", 4096, False),  # that no sequence reaches
        ((9, 0), "no", None, False),
        ((9, 0), "no", 4, True),
    ],
)
def test_by_the_kernel_that_a_card_has(capability, precision, window, is_slow, on_a_gpu, monkeypatch):
    monkeypatch.setattr(rule, "card_of", lambda device: Card(capability))
    model, chooser = build("Mistral", {**HEADS_OF_8, "sliding_window": window}), sharing()
    chooser._trainer.accelerator.mixed_precision = precision
    pairs = pack_pairs(MANY["input_ids"], MANY["attention_mask"], MANY["labels"] != -100)
    assert (chooser._why_slow(model, MANY, pairs) is not None) == is_slow


def test_several_processes_may_differ_and_do_not_wait_for_each_other(on_a_gpu, monkeypatch):
    """Every process proves the first batch, as others do; then each decides by its own batches and asks nobody."""
    asked = []
    monkeypatch.setattr(choice, "is_worth_it", few_pairs)
    monkeypatch.setattr(choice, "_several_processes", lambda: True)
    monkeypatch.setattr(choice, "of_all", lambda own: asked.append(own) or [own, None])
    model, chooser = build("Llama", TINY), sharing()
    assert chooser.pack(model, MANY, "policy") is None
    assert asked == [None, None] and list(chooser._proofs[model].values()) == [None]
    assert chooser.pack(model, FEW, "policy") is not None and chooser.pack(model, MANY, "policy") is None
    assert len(asked) == 2


def test_a_model_that_is_shared_out_takes_one_path_on_all_processes(on_a_gpu, monkeypatch):
    monkeypatch.setattr(choice, "is_worth_it", few_pairs)
    monkeypatch.setattr(choice, "_several_processes", lambda: True)
    monkeypatch.setattr(choice, "of_all", lambda own: pytest.fail("another process may not ask"))
    model, chooser = build("Llama", TINY), sharing()
    chooser._trainer.accelerator.distributed_type = "DistributedType.FSDP"
    left = {**FEW, "attention_mask": FEW["attention_mask"].flip(1)}
    for call in (FEW, MANY, left):
        assert chooser.pack(model, call, "policy") is None


def test_a_sweep_decides_by_its_first_batch(on_a_gpu, monkeypatch):
    from contextlib import contextmanager

    monkeypatch.setattr(choice, "is_worth_it", few_pairs)
    model, chooser = build("Llama", TINY), sharing()
    chooser._trainer.accelerator.autocast = contextmanager(lambda: iter([None]))

    @contextmanager
    def policy():
        yield model

    assert chooser.plain_policies({"a_": policy}, MANY, 8) == {"a_"} and not chooser._trials
    assert chooser.plain_policies({"a_": policy}, FEW, 8) == set() and len(chooser._trials) == 1
