"""Batches that come packed from their loader: always those of the very tensors of the call, or none."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from accelerate.utils import send_to_device
from accelerate.utils.operations import concatenate, slice_tensors
from prefix_cases import TINY, build, sharing
from torch.utils.data import DataLoader
from transformers import BatchEncoding
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_ama.fast_path.collating import PackingCollator, PairBatch, ready_pairs
from trl_ama.fast_path.packing import pack_pairs


CPU = torch.device("cpu")
FIELDS = ("input_ids", "position_ids", "labels", "score_positions", "slots", "scored")
ROWS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10], "rejected_ids": [8, 11], "ref_chosen_logps": -1.0},
    {"prompt_ids": [20], "chosen_ids": [21, 22], "rejected_ids": [23, 24, 25], "ref_chosen_logps": -2.0},
    {"prompt_ids": [30, 31, 32, 33, 34, 35], "chosen_ids": [36], "rejected_ids": [37, 38], "ref_chosen_logps": -3.0},
]
TRLS = DataCollatorForPreference(pad_token_id=0, max_length=6)  # which cuts some answers


def batch(device=CPU) -> PairBatch:
    return PackingCollator(TRLS, device)(ROWS)


def same(ours, theirs) -> bool:
    return ours.lengths == theirs.lengths and all(
        torch.equal(getattr(ours, name), getattr(theirs, name)) for name in FIELDS
    )


def packed_from(tensors):
    return pack_pairs(tensors["input_ids"], tensors["attention_mask"], tensors["completion_mask"])


def test_whoever_reads_the_batch_finds_what_trls_collator_made():
    expected, made = TRLS(ROWS), batch()
    assert isinstance(made, dict) and list(made) == list(expected)
    assert all(torch.equal(made[name], value) for name, value in expected.items())
    assert made["input_ids"].shape[1] == 6 and same(made.packed, packed_from(expected))  # after cutting


def test_a_plan_is_made_where_it_will_be_used():
    assert not batch().packed._plans and len(batch(torch.device("cuda")).packed._plans) == 1


def test_packed_pairs_come_with_the_batch_to_its_device():
    moved = send_to_device(batch(torch.device("cuda")), torch.device("meta"), non_blocking=True)
    assert type(moved) is PairBatch and moved["completion_mask"].is_meta
    pairs = ready_pairs(moved).pairs_of(moved)
    assert pairs is moved.packed and pairs.slots.is_meta and pairs.plan(torch.device("meta")).gather.is_meta
    # As the Trainer and we hand it on: other dicts, the same tensors
    inputs = {**moved, "ref_rejected_logps": torch.zeros(3, device="meta")}
    assert ready_pairs({name: value.to(device="meta") for name, value in inputs.items()}).pairs_of(moved) is pairs


def test_packed_pairs_survive_a_loaders_process_and_pinning(monkeypatch):
    made = batch(torch.device("cuda"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # for which there must be a card
    for other in (pickle.loads(ForkingPickler.dumps(made)), made.pin_memory()):
        assert other.packed is not made.packed and len(other.packed._plans) == 1
        arrived = other.to(CPU)
        assert same(ready_pairs(arrived).pairs_of(arrived), packed_from(made))


CHANGES = {
    "another mask": lambda inputs: {**inputs, "completion_mask": inputs["completion_mask"].clone()},
    "another attention mask": lambda inputs: {**inputs, "attention_mask": inputs["attention_mask"] * 1},
    "other tokens": lambda inputs: {**inputs, "input_ids": inputs["input_ids"].clone()},
    "a copy of the tokens": lambda inputs: {**inputs, "input_ids": copy.copy(inputs["input_ids"])},
    "cut columns": lambda inputs: {name: value[:, :4] if value.dim() > 1 else value for name, value in inputs.items()},
    "tokens written into": lambda inputs: (inputs["input_ids"].masked_fill_(inputs["input_ids"] == 8, 9), inputs)[1],
    "a mask written into": lambda inputs: (inputs["completion_mask"][0].zero_(), inputs)[1],
    "no mask": lambda inputs: {name: value for name, value in inputs.items() if name != "completion_mask"},
    "put together by Accelerate": lambda inputs: concatenate([inputs, inputs]).to(CPU),
    "shared out by Accelerate": lambda inputs: slice_tensors(inputs, slice(0, 4)).to(CPU),
    "on no device yet": lambda inputs: batch(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_they_are_not_used_for_other_tensors(change):
    inputs = batch().to(CPU)
    assert ready_pairs(inputs) is not None
    assert ready_pairs(CHANGES[change](inputs)) is None


def test_a_call_with_other_tensors_is_packed_anew():
    model, chooser, inputs = build("Llama", TINY), sharing(True), batch().to(CPU)
    ready = ready_pairs(inputs)
    call = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "labels": inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100),
        "fused_lm_head": True,
    }
    with torch.no_grad():
        assert chooser.pack(model, call, ready=ready).input_ids is inputs.packed.input_ids
        other = {**call, "input_ids": call["input_ids"].clone()}
        pairs = chooser.pack(model, other, ready=ready)
        assert pairs.input_ids is not inputs.packed.input_ids and same(pairs, inputs.packed)
        call["input_ids"].add_(1)
        assert chooser.pack(model, call, ready=ready).input_ids is not inputs.packed.input_ids


def test_batches_are_let_go(monkeypatch):
    """Nothing holds a batch in a circle, which would keep its memory on the device until Python looks for such."""
    import gc
    import weakref

    gc.disable()
    try:
        made = batch().to(CPU)
        held = [weakref.ref(made["input_ids"]), weakref.ref(made.packed)]
        del made
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()


def _left_padded(rows):
    made = TRLS(rows)
    return {name: value.flip(1) if value.dim() == 2 else value for name, value in made.items()}


OTHERS = {
    "padded on the left": _left_padded,
    "another type": lambda rows: BatchEncoding(TRLS(rows)),
    "no mask": lambda rows: {name: value for name, value in TRLS(rows).items() if name != "completion_mask"},
    "lists": lambda rows: {**TRLS(rows), "input_ids": TRLS(rows)["input_ids"].tolist()},
    "another shape": lambda rows: {**TRLS(rows), "completion_mask": TRLS(rows)["completion_mask"][:, :2]},
    "no batch": lambda rows: rows,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_other_collators_make_stays_as_it_is(kind):
    made = PackingCollator(OTHERS[kind], CPU)(ROWS)
    assert type(made) is type(OTHERS[kind](ROWS)) and not isinstance(made, PairBatch)


def test_a_loader_hands_it_on():
    (made,) = DataLoader(ROWS, batch_size=3, collate_fn=PackingCollator(TRLS, CPU))
    assert same(made.to(CPU).packed, packed_from(made))
