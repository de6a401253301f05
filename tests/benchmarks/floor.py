"""The floor of a step: the operations that nobody can leave out, over the rate at which this machine does them.

What must be done is counted on the real modules of a model, while it runs packed pairs once: of every linear layer the product
with its weight, the gradient of its input where something before it learns, the gradient of its weight where that learns; of
attention every key that a query sees, and two and a half times that backwards; of the head the tokens that are scored alone.
How fast it can be done is measured on products of the same shapes, in the same run, before and after the steps.

The floor is strict: thin products (adapters) and attention count as if they ran as fast as the others do on average, and
element-wise operations, casts, memory and Python count as nothing. `above` says where the time above it went.
"""

import contextlib
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from trl_ama.fast_path.attention import PairAttention
from trl_ama.fast_path.forward import causal_lm, packed_forward
from trl_ama.fast_path.packing import PackedPairs, pack_pairs
from trl_ama.policies.switching import reference_policy


TILE = 128  # rows of the head's product that are measured: more of them are larger than any cache
LAYERS, ADAPTERS, HEAD, ATTENTION = "layers", "adapters", "head", "attention"


class Product(NamedTuple):
    """One matrix product, (rows, inner) @ (inner, columns); `turned` if the second lies as (columns, inner) in memory."""

    part: str
    rows: int
    inner: int
    columns: int
    turned: bool

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns


class Work:
    """What a forward pass, and the backward pass that follows, have to compute."""

    def __init__(self):
        self.products: Counter[Product] = Counter()
        self.attention = 0.0  # FLOPs

    def flops(self) -> dict[str, float]:
        """Operations by part."""
        found = {LAYERS: 0.0, ADAPTERS: 0.0, HEAD: 0.0, ATTENTION: self.attention}
        for product, times in self.products.items():
            found[product.part] += product.flops * times
        return found

    def linear(self, part: str, rows: int, sizes: tuple[int, int], of_input: bool, of_weight: bool) -> None:
        """Add a layer from `sizes[0]` to `sizes[1]` features, and the gradients that it passes on."""
        before, after = sizes
        self.products[Product(part, rows, before, after, True)] += 1
        if of_input:
            self.products[Product(part, rows, after, before, False)] += 1
        if of_weight:
            self.products[Product(part, after, rows, before, False)] += 1


def keys_seen(pairs: PackedPairs, window: int | None = None) -> int:
    """How many keys the queries of packed pairs see, all together."""
    blocks = [(pairs.common, pairs.common)]
    for prefix, chosen, rejected in pairs.lengths:
        blocks.append((prefix + chosen, pairs.common + prefix + chosen))
        blocks.append((rejected, pairs.common + prefix + rejected))
    seen = 0
    for queries, keys in blocks:
        first = keys - queries + 1  # keys that the first query sees
        full = queries if window is None else min(queries, max(0, window - first + 1))
        seen += full * first + full * (full - 1) // 2 + (queries - full) * (window or 0)
    return seen


def _sizes(module: torch.nn.Module) -> tuple[int, int] | None:
    if isinstance(module, torch.nn.Linear):  # those of 4 and 8 bits as well
        return module.in_features, module.out_features
    return (module.nx, module.nf) if isinstance(module, Conv1D) else None


@contextlib.contextmanager
def counted(model: torch.nn.Module, pairs: PackedPairs) -> Iterator[Work]:
    """Count while one forward pass over packed pairs runs: with gradients, if they are on, what the backward pass must do.

    Recomputation (gradient checkpointing) is not counted: it saves memory and is no part of the problem.
    """
    work, inner = Work(), causal_lm(model)
    head = inner.get_output_embeddings()
    adapters = {
        part
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for part in set(layer.modules()) - set(layer.get_base_layer().modules())
    }

    def note(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        before, after = _sizes(module)
        learns = torch.is_grad_enabled() and module.weight.requires_grad
        of_input = torch.is_grad_enabled() and args[0].requires_grad
        part = ADAPTERS if module in adapters else LAYERS
        work.linear(part, args[0].numel() // before, (before, after), of_input, learns)

    attend = PairAttention.__call__

    def note_attention(self, module, query, key, value, mask, *args, sliding_window=None, **kwargs):
        backwards = 2.5 if torch.is_grad_enabled() and query.requires_grad else 0.0
        size = query.shape[1] * (query.shape[3] + value.shape[3])
        work.attention += 2 * keys_seen(pairs, sliding_window) * size * (1 + backwards)
        return attend(self, module, query, key, value, mask, *args, sliding_window=sliding_window, **kwargs)

    handles = [
        module.register_forward_hook(note)
        for module in model.modules()
        if _sizes(module) is not None and module is not head
    ]
    try:
        with mock.patch.object(PairAttention, "__call__", note_attention):
            yield work
    finally:
        for handle in handles:
            handle.remove()
    grads = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())
    learns = grads and head.weight.requires_grad
    work.linear(HEAD, len(pairs.score_positions), _sizes(head), grads, learns)


# ---- The rate of this machine ----


class Stopwatch:
    """Seconds of a call: of the processor for this process, or between two events of a card."""

    def __init__(self, device: str, clock: Callable[[], float] = time.process_time):
        self._is_cuda, self._clock = torch.device(device).type == "cuda", clock

    def __call__(self, call: Callable[[], Any]) -> float:
        if not self._is_cuda:
            start = self._clock()
            call()
            return self._clock() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def measured_rates(
    work: Work, dtype: torch.dtype, watch: Stopwatch, device: str = "cpu", flops: float = 1.5e9
) -> dict[Product, float]:
    """FLOPs a second of every product of the layers and the head, each run until it has done `flops`."""
    rates = {}
    for product in work.products:
        if product.part == ADAPTERS:
            continue
        rows = min(product.rows, TILE) if product.part == HEAD else product.rows
        left = torch.randn(rows, product.inner, device=device, dtype=dtype)
        right = torch.randn(product.inner, product.columns, device=device, dtype=dtype)
        if product.turned:
            right = right.t().contiguous().t()
        out = torch.empty(rows, product.columns, device=device, dtype=dtype)
        each = 2 * rows * product.inner * product.columns
        torch.mm(left, right, out=out)  # warms up
        times = max(1, round(flops / each))

        def run(left=left, right=right, out=out, times=times):
            for _ in range(times):
                torch.mm(left, right, out=out)

        rates[product] = times * each / watch(run)
    return rates


def floor_seconds(work: Work, rates: list[dict[Product, float]]) -> dict[str, float]:
    """The least seconds by part, at the median of rates that were measured at several times."""
    found = {LAYERS: 0.0, HEAD: 0.0}
    for product, times in work.products.items():
        if product.part != ADAPTERS:
            found[product.part] += times * product.flops / statistics.median(rate[product] for rate in rates)
    flops = work.flops()
    rate = (flops[LAYERS] + flops[HEAD]) / sum(found.values())
    return {**found, ADAPTERS: flops[ADAPTERS] / rate, ATTENTION: flops[ATTENTION] / rate}


# ---- Where the time above it goes ----

COPIES = (
    "_to_copy",
    "copy_",
    "clone",
    "cat",
    "index",
    "fill_",
    "zero_",
    "constant_pad",
    "embedding",
    "scatter",
    "gather",
)
_PRODUCTS = {"mm": 0, "addmm": 1, "addmm_": 1, "bmm": 0}  # name → where the two matrices are among the arguments


class Spent(TorchDispatchMode):
    """While open, processor time of every operator, by part; on a CPU, where an operator is done when it returns."""

    def __init__(self, work: Work, vocabulary: int, clock: Callable[[], float] = time.process_time):
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._clock, self._vocabulary = clock, vocabulary
        self._thin = {
            tuple(sorted((product.rows, product.inner, product.columns)))
            for product in work.products
            if product.part == ADAPTERS
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = self._clock()
        result = func(*args, **(kwargs or {}))
        seconds = self._clock() - start
        self.seconds[self._part(func, args, result)] += seconds
        return result

    def _part(self, func: Any, args: tuple, result: Any) -> str:
        name = func.overloadpacket.__name__
        tensors = [value for value in (*args, result) if isinstance(value, torch.Tensor)]
        of_head = any(self._vocabulary in tensor.shape for tensor in tensors)
        if name in _PRODUCTS and not (name == "bmm" and of_head):  # the head's metrics are dot products, row by row
            left, right = args[_PRODUCTS[name] :][:2]
            shape = tuple(sorted((*left.shape[-2:], right.shape[-1])))
            return HEAD if of_head else ADAPTERS if shape in self._thin else LAYERS
        if "attention" in name:
            return ATTENTION
        if of_head and name not in ("embedding",):
            return "head, element by element"
        return "copies and casts" if name.startswith(COPIES) else "element by element"


def above(spent: dict[str, float], floor: dict[str, float], step: float) -> dict[str, float]:
    """Seconds of a step above its floor, by part; what no operator took is Python's and the dispatcher's.

    Args:
        spent (`dict[str, float]`): Of the operators of a step that was watched.
        floor (`dict[str, float]`): As [`floor_seconds`] gives it.
        step (`float`): Seconds of a step that was not.
    """
    found = {part: seconds - floor.get(part, 0.0) for part, seconds in spent.items()}
    found["outside of operators"] = step - sum(spent.values())
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


# ---- The part `floor` of speed.py ----


def measure(trl: Any, ours: Any, rows: list[dict], batch_size: int, batches: int) -> dict[str, Any]:
    """Steps and scoring of two benches (`speed.Bench`) over their floors, the trainers taking turns; on a CPU with one thread."""
    trainer, device = ours.trainer, ours.trainer.accelerator.device
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    watch = Stopwatch(device)
    dtype = torch.bfloat16 if trainer.args.bf16 else trainer.model.dtype
    ratios: defaultdict[str, list[float]] = defaultdict(list)
    floors, flops, shares = [], [], {}
    for number in range(batches):
        batch = ours.batch(rows[number * batch_size : (number + 1) * batch_size])
        on_device = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
        pairs = pack_pairs(*(on_device[key] for key in ("input_ids", "attention_mask", "completion_mask")))

        def forward(model, metrics, pairs=pairs):
            with trainer.accelerator.autocast():
                packed_forward(model, pairs, metrics, use_cache=False)

        def score_ours(forward=forward):
            with torch.no_grad(), reference_policy(trainer) as model:
                model.eval()
                forward(model, False)

        def score_trl(batch=batch):
            trl.model.eval()
            trl.trainer.compute_ref_log_probs(trl.model, trl.trainer._prepare_inputs(batch))

        ours.model.train()
        with counted(ours.model, pairs) as work:
            forward(ours.model, True)
        with torch.no_grad(), reference_policy(trainer) as model, counted(model, pairs) as scoring:
            forward(model, False)
        steps = {"trl": lambda batch=batch: trl.step(batch), "ours": lambda batch=batch: ours.step(batch)}
        scores = {"scoring_trl": score_trl, "scoring_ours": score_ours}
        if number == 0:  # where every model is tried and proven
            ours.step(batch)
        rates = [measured_rates(work, dtype, watch, device)]
        order = list({**steps, **scores}.items())
        seconds = {name: watch(call) for name, call in (order if number % 2 else order[::-1])}
        rates.append(measured_rates(work, dtype, watch, device))
        floor = floor_seconds(work, rates)
        least = sum(floor.values())
        for name in steps:
            ratios[name].append(seconds[name] / least)
        for name in scores:
            ratios[name].append(seconds[name] / sum(floor_seconds(scoring, rates).values()))
        floors.append(least)
        flops.append(work.flops())
        if number == 0 and device.type == "cpu":
            with Spent(work, trainer.model.config.get_text_config().vocab_size) as spent:
                ours.step(batch)
            shares = {part: value / least for part, value in above(spent.seconds, floor, seconds["ours"]).items()}
    torch.set_num_threads(threads)
    return {
        "floor_seconds": statistics.median(floors),
        "gigaflops": {part: statistics.median(entry[part] for entry in flops) / 1e9 for part in flops[0]},
        **{name: statistics.median(values) for name, values in ratios.items()},
        "ratios": {name: [round(value, 3) for value in values] for name, values in ratios.items()},
        "above": shares,
    }


def table(tasks: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown of what [`measure`] found, by task."""
    lines = [
        "| times the floor | floor, s | step, TRL | step, ours | scoring, TRL | scoring, ours |",
        "| --- " + "| ---: " * 5 + "|",
    ]
    for task, found in tasks.items():
        cells = [f"{found[key]:.2f}" for key in ("floor_seconds", "trl", "ours", "scoring_trl", "scoring_ours")]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    parts = sorted({part for found in tasks.values() for part in found["above"]})
    if parts:
        lines += ["", f"| above the floor, of it | {' | '.join(parts)} |", "| --- " + "| ---: " * len(parts) + "|"]
        for task, found in tasks.items():
            cells = [f"{found['above'][part]:.2f}" if part in found["above"] else "" for part in parts]
            lines.append(f"| {task} | {' | '.join(cells)} |")
    return lines
