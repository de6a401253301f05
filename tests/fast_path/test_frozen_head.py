"""TRL's fused head and ours give the same numbers and gradients; ours is taken where it is meant to be."""

import pytest
import torch
import trl.trainer.utils
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from trl_ama.fast_path.frozen_head import OUTPUTS, FrozenHead, frozen_head


TOKENS, HIDDEN, VOCABULARY = 300, 24, 401  # more than two tiles of tokens


@pytest.fixture
def problem():
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN)
    hidden[:40] *= 12  # tokens that the head is sure of
    weight, bias = torch.randn(VOCABULARY, HIDDEN), torch.randn(VOCABULARY)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    targets[:20] = (hidden[:20] @ weight.t()).argmax(dim=1)
    return hidden, weight, bias, targets, torch.randn(TOKENS)


def run(function, hidden, *arguments, grad):
    hidden = hidden.clone().requires_grad_(True)
    outputs = function.apply(hidden, *arguments)
    (gradient,) = torch.autograd.grad(outputs[0], hidden, grad)
    return outputs, gradient


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("temperature", "logit_scale"), [(1.0, 1.0), (0.7, 0.25)])
def test_same_numbers_and_gradients_as_trl(problem, with_bias, temperature, logit_scale):
    hidden, weight, bias, targets, grad = problem
    bias = bias if with_bias else None
    expected, theirs = run(
        ChunkedLogProbFunction, hidden, weight, bias, targets, temperature, 128, None, logit_scale, OUTPUTS, grad=grad
    )
    found, ours = run(FrozenHead, hidden, weight, bias, targets, logit_scale / temperature, OUTPUTS[1:], grad=grad)
    for name, a, b in zip(OUTPUTS, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert [value.requires_grad for value in found] == [True, False, False, False, False]


def test_only_what_is_asked_for(problem):
    hidden, weight, _, targets, _ = problem
    found = FrozenHead.apply(hidden, weight, None, targets, 1.0, ("is_top1",))
    assert [name for name, value in zip(OUTPUTS, found, strict=True) if value is not None] == ["log_probs", "is_top1"]


def test_no_tokens(problem):
    _, weight, _, targets, _ = problem
    found, gradient = run(
        FrozenHead, torch.zeros(0, HIDDEN), weight, None, targets[:0], 1.0, OUTPUTS[1:], grad=torch.zeros(0)
    )
    assert found[0].shape == (0,) and gradient.shape == (0, HIDDEN)


def test_16_bits_are_no_further_from_32_than_trl(problem):
    hidden, weight, _, targets, grad = problem
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    exact, slopes = run(
        ChunkedLogProbFunction,
        hidden.float(), weight.float(), None, targets, 1.0, 128, None, 1.0, ("log_probs",), grad=grad,
    )  # fmt: skip
    theirs, their_slopes = run(
        ChunkedLogProbFunction, hidden, weight, None, targets, 1.0, 128, None, 1.0, ("log_probs",), grad=grad
    )
    ours, our_slopes = run(FrozenHead, hidden, weight, None, targets, 1.0, (), grad=grad)

    def distance(value, reference):
        return (value.float() - reference).norm() / reference.norm()

    assert distance(ours[0], exact[0]) <= 1.01 * distance(theirs[0], exact[0])
    assert distance(our_slopes, slopes) <= 1.1 * distance(their_slopes, slopes)
    # Tokens that the head is sure of have small gradients, which rounding must not drown
    assert distance(our_slopes[:20], slopes[:20]) <= 1.1 * distance(their_slopes[:20], slopes[:20])


class _Spy:
    def __init__(self):
        self.calls = []

    def apply(self, *arguments):
        self.calls.append(arguments)
        return ChunkedLogProbFunction.apply(*arguments)


@pytest.mark.parametrize(
    ("trained", "softcap", "grad", "theirs"),
    [(False, None, True, False), (True, None, True, True), (True, None, False, False), (False, 30.0, True, True)],
)
def test_which_head_is_taken(problem, monkeypatch, trained, softcap, grad, theirs):
    hidden, weight, _, targets, _ = problem
    spy = _Spy()
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", spy)
    weight.requires_grad_(trained)
    with torch.set_grad_enabled(grad), frozen_head():
        head = trl.trainer.utils._ChunkedLogProbFunction
        found = head.apply(hidden, weight, None, targets, 1.0, 128, softcap, 1.0, ("log_probs", "entropy"))
    assert bool(spy.calls) == theirs
    assert found[1] is not None
    assert trl.trainer.utils._ChunkedLogProbFunction is spy  # put back


def test_without_metrics_only_log_probs_are_computed(problem):
    hidden, weight, _, targets, _ = problem
    with frozen_head(metrics=False):
        found = trl.trainer.utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, 128, None, 1.0, OUTPUTS
        )
    assert found[0] is not None and found[1:] == (None,) * 4


def test_put_back_after_an_error():
    before = trl.trainer.utils._ChunkedLogProbFunction
    with pytest.raises(ZeroDivisionError), frozen_head():
        assert trl.trainer.utils._ChunkedLogProbFunction is not before
        1 / 0  # noqa: B018
    assert trl.trainer.utils._ChunkedLogProbFunction is before
