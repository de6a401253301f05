"""Layers whose output is known are computed in the backward pass alone, unless that would not be the same."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from trl_ama.fast_path.kept_layers import KeptLayers


class Layer(GradientCheckpointingLayer):
    """Notes how many rows it is run on, and what other layers share with it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 3))
        self.rows = []

    def forward(self, hidden, scale=None, shared=None):
        self.rows.append(len(hidden))
        if shared is not None:
            shared.setdefault("first", hidden)
            hidden = hidden + shared["first"]
        return torch.tanh(hidden @ self.weight) * (1 if scale is None else scale)


class Model(torch.nn.Module):
    def __init__(self, calls):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([Layer() for _ in {*calls}])
        for layer in self.layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        self.calls = calls

    def forward(self, hidden, **kwargs):
        for number in self.calls:
            hidden = self.layers[number](hidden, **kwargs)
        return hidden


TRAINED = torch.tensor(2.0, requires_grad=True)


@pytest.mark.parametrize(
    ("calls", "make", "runs"),
    [
        ((0, 1, 2), dict, [5, 2]),  # forward in the first pass, and once for the backward pass
        ((0, 1, 2), lambda: {"scale": torch.tensor(2.0)}, [5, 2]),
        ((0, 1, 2), lambda: {"scale": TRAINED}, [5, 2, 2]),  # with a gradient of its own
        ((0, 1, 2), lambda: {"shared": {}}, [5, 2, 2]),  # what a layer before has left
        ((0, 1, 0), dict, [5, 5, 2, 2, 2, 2]),  # one that is called twice has two outputs
    ],
    ids=["alone", "read", "trained", "shared", "twice"],
)
@pytest.mark.parametrize("has_gradient", [True, False])
def test_gradients_and_how_often_a_layer_runs(calls, make, runs, has_gradient):
    model = Model(calls).train()
    hidden, keep = torch.randn(5, 3), torch.tensor([True, False, False, True, False])
    kept = KeptLayers(model)
    with torch.no_grad(), kept.keep():
        whole = model(hidden, **make())
    part = hidden[keep].requires_grad_(has_gradient)
    with kept.use(lambda states: states[keep]):
        ours = model(part, **make())
    assert torch.allclose(ours, whole[keep])
    ours.square().sum().backward()
    assert model.layers[0].rows == runs
    found = [model.layers[number].weight.grad.clone() for number in {*calls}] + [part.grad, TRAINED.grad]
    model.zero_grad()
    part.grad = TRAINED.grad = None
    model(part, **make()).square().sum().backward()
    expected = [model.layers[number].weight.grad for number in {*calls}] + [part.grad, TRAINED.grad]
    TRAINED.grad = None
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None and theirs is None) or torch.allclose(ours, theirs, atol=1e-6)
    assert expected[-2] is not None or not has_gradient
