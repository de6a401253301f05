"""Touch points in TRL's loss and fused head: who is called, and what is read from where."""

import inspect

import pytest
import torch
from touched import batch_of, dpo_fixture  # noqa: F401 - fixtures
from trl import DPOTrainer

from trl_ama.dpo.pair_batches import RecordedForward


def test_3_dpo_loss_only_calls_its_model(dpo):
    forward = RecordedForward(dpo.model)
    inputs = batch_of(dpo)
    loss = dpo.compute_loss(forward, dict(inputs))
    assert loss.requires_grad and forward.outputs.log_probs.requires_grad
    assert forward.outputs.log_probs.shape == (8, inputs["input_ids"].shape[1] - 1)


def test_4_dpo_loss_reads_reference_log_probs_from_the_batch(dpo, monkeypatch):
    inputs = batch_of(dpo)
    reference = dpo.compute_ref_log_probs(dpo.model, inputs)
    plain = dpo.compute_loss(dpo.model, dict(inputs))
    monkeypatch.setattr(dpo, "precompute_ref_logps", True)
    for shift in (0.0, 1.0):
        given = {**inputs, "ref_chosen_logps": reference[0] - shift, "ref_rejected_logps": reference[1]}
        loss = dpo.compute_loss(dpo.model, given)
        assert torch.isclose(loss, plain, atol=1e-5) == (shift == 0.0)


def test_5_dpo_precompute_hook(dpo):
    assert list(inspect.signature(DPOTrainer._precompute_ref_logps).parameters) == [
        "self",
        "dataset",
        "name",
        "batch_size",
    ]
    assert list(inspect.signature(DPOTrainer.compute_ref_log_probs).parameters) == ["self", "model", "inputs"]
    source = inspect.getsource(DPOTrainer.__init__)
    assert "self._precompute_ref_logps(" in source and "args.precompute_ref_log_probs" in source


def test_6_dpo_signature_columns(dpo):
    dpo._signature_columns = None
    dpo._set_signature_columns_if_needed()
    assert {"prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps"} <= set(dpo._signature_columns)


def test_7_dpo_metrics_are_averaged_into_the_log(dpo):
    dpo.model.train()
    dpo._metrics["train"]["ama/test"] += [1.0, 2.0]
    logs = {}
    dpo.log(logs)
    assert logs["ama/test"] == 1.5 and not dpo._metrics["train"]


def test_27_fused_head_takes_shifted_labels(dpo):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        usual = dpo.model(input_ids=ids, labels=ids, fused_lm_head=True)
        shifted = dpo.model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:], fused_lm_head=True)
    assert torch.allclose(usual.log_probs, shifted.log_probs, atol=1e-6)


def test_28_fused_head_is_looked_up_at_every_call(dpo, monkeypatch):
    import trl.trainer.utils

    theirs, calls = trl.trainer.utils._ChunkedLogProbFunction, []

    class Spy:
        @staticmethod
        def apply(*arguments):
            calls.append(arguments)
            return theirs.apply(*arguments)

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Spy)
    ids = torch.tensor([[5, 6, 7, 8]])
    dpo.model(input_ids=ids, labels=ids, fused_lm_head=True)
    ((hidden, weight, bias, targets, temperature, chunk, softcap, scale, outputs),) = calls
    assert hidden.shape == (3, weight.shape[1]) and targets.tolist() == [6, 7, 8] and bias is None
    assert (temperature, softcap, scale) == (1.0, None, 1.0) and isinstance(chunk, int) and "log_probs" in outputs
    # Whether it leaves positions without a label out is asked at every call, too; that is for positions alone
    labels, lengths = torch.tensor([[5, -100, 7, 8]]), []
    for picks in (True, False):
        monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda device, picks=picks: picks)
        dpo.model(input_ids=ids, labels=labels, fused_lm_head=True)
        lengths.append(len(calls[-1][0]))
    assert lengths == [2, 3]


def test_31_tiles_of_the_fused_head_are_folded_by_functions_that_are_looked_up(dpo, monkeypatch):
    import trl.kernels.chunked_logprob as head

    calls = []
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        theirs = getattr(head, name)

        def spy(*args, theirs=theirs, name=name, **kwargs):
            calls.append(name)
            assert theirs(*args, **kwargs) is None

        monkeypatch.setattr(head, name, spy)
    ids = torch.tensor([[5, 6, 7, 8]])
    dpo.model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum().backward()
    assert calls == [
        "_forward_tile",
        "_backward_tile",
        "_addmm_fp32",
    ]  # one tile; of a frozen head, its input's gradient


def test_77_what_the_loss_reads_of_the_trainer(dpo):
    assert dpo.beta == dpo.args.beta and dpo.ld_alpha is None and dpo.ref_model is None
    assert dpo.aux_loss_enabled is False
    assert "self.router_aux_loss_coef" in inspect.getsource(DPOTrainer)
    with dpo.maybe_activation_offload_context:
        pass


def test_96_the_loss_reads_the_reference_after_it_has_called_the_model(dpo):
    inputs, expected = dict(batch_of(dpo)), dpo.compute_ref_log_probs(dpo.model, batch_of(dpo))
    loss = dpo.compute_loss(dpo.model, dict(inputs))
    added = lambda: inputs.update(zip(("ref_chosen_logps", "ref_rejected_logps"), expected, strict=True))  # noqa: E731
    dpo.precompute_ref_logps = True
    try:
        later = dpo.compute_loss(RecordedForward(dpo.model, then=added), inputs)
    finally:
        dpo.precompute_ref_logps = False
    assert later.item() == pytest.approx(loss.item())


def test_103_labels_are_those_of_the_batch_and_its_tensors_reach_the_model_as_they_are(dpo):
    inputs, calls = batch_of(dpo), []

    def model(**kwargs):
        calls.append(kwargs)
        return dpo.model(**kwargs)

    dpo.compute_ref_log_probs(model, inputs)
    dpo.compute_loss(model, dict(inputs))
    expected = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    assert len(calls) == 2
    for call in calls:
        assert call["input_ids"] is inputs["input_ids"] and call["attention_mask"] is inputs["attention_mask"]
        assert torch.equal(call["labels"], expected)
