"""The fast path gives the plain path's log-probs and gradients on a card, in 32 and in 16 bits."""

import pytest
import torch
from on_card import CARD, needs_card
from prefix_cases import FAST, build, gradients, padded, random_pairs, sharing, weights_for


pytestmark = needs_card
EXACT, ROUNDED = 1e-4, 1e-2  # of the length of all log-probs, or gradients, together
AS_PLAIN = 1.25  # times the plain path's own error, where that is above


def there(call: dict) -> dict:
    return {name: value.to(CARD) if isinstance(value, torch.Tensor) else value for name, value in call.items()}


def run(forward, model, call: dict, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of answers, and the gradients of all parameters, one after the other."""
    outputs = forward(**call)
    found = gradients(outputs, model, weights)
    scores = outputs.log_probs.detach()[call["labels"][:, 1:] != -100]
    return scores.double(), torch.cat([found[name].flatten() for name in sorted(found)]).double()


def off(found: tuple, exact: tuple) -> list[float]:
    return [float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]


@pytest.mark.parametrize("beginning", [0, 11])
@pytest.mark.parametrize("name", FAST)
def test_as_exact_as_the_plain_path(name, beginning):
    model = build(name, FAST[name]).to(CARD)
    call = there(padded(random_pairs(8, seed=0, beginning=beginning)))
    weights = weights_for(call).to(CARD)
    chooser = sharing()
    exact = run(model, model, call, weights)
    assert max(off(run(chooser.forward(model), model, call, weights), exact)) < EXACT
    assert chooser.taken == {"fast": 1, "plain": 0}

    chooser = sharing()
    chooser._trainer.accelerator.mixed_precision = "bf16"
    with torch.autocast(CARD, torch.bfloat16):
        plain = off(run(model, model, call, weights), exact)
        ours = off(run(chooser.forward(model), model, call, weights), exact)
    assert chooser.taken == {"fast": 1, "plain": 0}
    for error, allowed in zip(ours, plain, strict=True):
        assert error < max(ROUNDED, AS_PLAIN * allowed)
