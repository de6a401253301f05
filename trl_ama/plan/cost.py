"""How many floating-point operations a pair costs: in products of matrices, two operations for each multiplication and addition."""

from dataclasses import dataclass

import numpy as np
import torch

from .empty_model import base_model
from .lengths import Lengths, common_beginning


@dataclass(frozen=True)
class Products:
    """Multiplications that one token takes, forward.

    Args:
        layers (`float`): With the base's weights, the head aside; of a mixture of experts, with those that a token is sent to.
        adapter (`float`): With the adapter's.
        head (`float`): With the vocabulary, of a token that is scored.
        attention (`float`): With each token that it sees: scores and values.
        full (`bool`): Whether the base is trained; of a frozen weight there is no gradient, which saves one product of three.
        device (`str`): Off the GPU, a frozen head makes its gradient in the forward pass (`fast_path/frozen_head.py`).
    """

    layers: float
    adapter: float
    head: float
    attention: float
    full: bool
    device: str

    @classmethod
    def of(cls, model: torch.nn.Module, full: bool, device: str) -> "Products":
        """Count the weights of a model, which may be on the meta device."""
        inner = base_model(model)
        config = inner.config.get_text_config()
        tables = {
            module.weight
            for module in inner.modules()
            if isinstance(module, torch.nn.Embedding) and isinstance(module.weight, torch.nn.Parameter)
        }
        head = inner.get_output_embeddings()
        tables.add(head.weight)
        layers = adapter = 0.0
        for parameter in model.parameters():
            if parameter.dim() < 2 or parameter in tables:
                continue
            share = 1.0
            if parameter.dim() == 3:  # of experts, those that a token is sent to
                share = min(1.0, (getattr(config, "num_experts_per_tok", None) or 1) / parameter.shape[0])
            if parameter.requires_grad and not full:
                adapter += share * parameter.numel()
            else:
                layers += share * parameter.numel()
        heads = getattr(config, "num_attention_heads", 0)  # a state-space model has none
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
        return cls(layers, adapter, head.weight.numel(), 2 * width * config.num_hidden_layers, full, device)


@dataclass(frozen=True)
class Work:
    """A pair, on average: tokens that pass through the layers, tokens that the head scores, tokens that one sees."""

    products: Products
    tokens: float
    scored: float
    seen: float
    trl: bool = False

    @classmethod
    def of(
        cls,
        products: Products,
        parts: list[Lengths],
        shares: list[float],
        batch_size: int,
        packed: bool,
        trl: bool = False,
    ) -> "Work":
        """Of tasks that are drawn with these shares, in batches of so many pairs; with `trl`, as DPOTrainer runs them."""
        tokens = scored = seen = 0.0
        # What the pairs of a packed row have in common runs once a row; the last token of an answer does not run
        saved = 2 + common_beginning(parts) * (1 - 1 / batch_size)
        for part, share in zip(parts, shares, strict=True):
            rows = part.padded_mean(batch_size)
            answers = float(part.pairs[:, 1:].sum(axis=1).mean())
            tokens += share * (float(part.packed.mean()) - saved if packed else 2 * rows)
            scored += share * (answers if packed or products.device != "cpu" else 2 * (rows - 1))
            seen += share * float(np.mean(part.longest)) / 2  # causal: half of the sequence
        return cls(products, tokens, scored, seen, trl)

    def scoring(self) -> float:
        """Operations of one pass forward."""
        p = self.products
        return 2 * (self.tokens * (p.layers + p.adapter + p.attention * self.seen) + self.scored * p.head)

    def training(self, checkpoints: bool) -> float:
        """Operations of a pass forward and backward; gradient checkpointing runs the layers forward once more.

        Backward, a weight has one product for its input's gradient and, if it is trained, one for its own; attention has two for
        each of its own. The head is computed again by TRL's, in place of its input being kept; a frozen head on the CPU makes
        its gradient in the forward pass instead (`fast_path/frozen_head.py`).
        """
        p = self.products
        attention = p.attention * self.seen
        forward = p.layers + p.adapter + attention
        backward = (2 if p.full else 1) * p.layers + 2 * p.adapter + 2 * attention
        layers = self.tokens * (forward * (2 if checkpoints else 1) + backward)
        ours = not self.trl and not p.full and p.device == "cpu"
        head = self.scored * p.head * (2 if ours else 4 if p.full else 3)
        return 2 * (layers + head)
