"""Training steps and scoring of AMATrainer and DPOTrainer, taking turns on the same batches in one process."""

import importlib.util
import os
import statistics
import time

from gpu_card import CUDA
from gpu_cases import GIB, HALF, CardBench, allocated, free, made_model, made_nf4, made_pairs
from gpu_report import NotHere, Report


# Of one model: pairs of a batch, max_length, gradient checkpointing (TRL's default is with it); most valuable first
CASES = {
    "135M": [(8, 1024, True), (8, 256, False), (4, 2048, True)],
    "1B": [(4, 1024, True), (8, 256, True), (2, 2048, True)],
    "8B": [(2, 1024, True), (4, 256, True), (2, 2048, True)],
}
TINY = [(2, 64, True), (2, 32, False)]
ROUNDS = 6  # at most; as many as there is time for, and at least two
KINDS = {"ours": ("ours", True), "trl": ("trl", True), "trl live": ("trl", False)}


def steps(report: Report, name: str) -> None:
    """LoRA of rank 16 on all linear layers, in bf16 or, of the 8B model, on a base in 4 bits with a paged optimizer."""
    if name == "8B" and importlib.util.find_spec("bitsandbytes") is None:
        raise NotHere("bitsandbytes is not installed (the extra `quantization`)")
    quantised, cases, rounds = name == "8B", CASES[name], ROUNDS
    if report.rehearse:
        name, cases, rounds = "tiny", TINY, 2
    for number, (batch, length, checkpoints) in enumerate(cases):
        shown = f"{name}{' NF4' if quantised else ''}, {batch} pairs of up to {length}"
        with report.row(shown + ("" if checkpoints else ", no checkpointing")) as row:
            row["length"] = length
            until = time.monotonic() + report.left / (len(cases) - number)
            plan = _measure(row, name, quantised, batch, length, checkpoints, rounds, until)
            report.note(row["case"], plan | {"model": name, "max_length": length, "checkpoints": checkpoints})
        free()


def _measure(
    row: dict, name: str, quantised: bool, batch: int, length: int, checkpoints: bool, rounds: int, until: float
) -> dict:
    """Fill in a row. Returns what a plan of the same steps needs."""
    benches, first = {}, {}
    data = made_pairs((rounds + 2) * batch, length)
    settings = {"bf16": CUDA, "gradient_checkpointing": checkpoints}
    if quantised:
        settings["optim"] = "paged_adamw_8bit"
    for kind in ("ours", "trl"):
        before = allocated()
        model = made_nf4(name) if quantised else made_model(name, HALF)
        benches[kind] = CardBench(kind, model, data, batch, length, before, **settings)
        first[kind] = benches[kind].warm(range(2))
    benches["trl"].warm(range(1), precomputed=False)
    held = sum(bench.held for bench in benches.values())
    seconds, peaks = {kind: [] for kind in KINDS}, {kind: [] for kind in KINDS}
    for turn in range(rounds):
        if turn >= 2 and time.monotonic() > until:
            break
        for kind in list(KINDS) if turn % 2 else list(KINDS)[::-1]:
            bench, precomputed = benches[KINDS[kind][0]], KINDS[kind][1]
            taken, peak = bench.timed(turn + 2, precomputed)
            seconds[kind].append(taken)
            peaks[kind].append(peak - (held - bench.held))  # without the other trainer's
    middle = {kind: statistics.median(values) for kind, values in seconds.items()}
    ours, trl, live = (
        [own / other for own, other in zip(seconds["ours"], seconds[kind], strict=True)] for kind in KINDS
    )
    row |= {f"{kind} ms": 1e3 * value for kind, value in middle.items()}
    row |= {"ours / trl": statistics.median(trl), "ours / live": statistics.median(live), "rounds": len(ours)}
    if CUDA:
        row |= {f"{kind} GiB": max(values) / GIB for kind, values in peaks.items()}
        row["ours, first steps GiB"] = first["ours"] / GIB
    row |= benches["ours"].trainer.prefix_sharing.taken
    worst = max(range(len(peaks["ours"])), key=lambda turn: (peaks["ours"][turn], turn))
    rows = benches["ours"].rows_of(worst + 2)
    prompts = [one["prompt_ids"] for one in rows]
    return {
        "measured": peaks["ours"][worst],
        "pairs": [[len(one[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")] for one in rows],
        "common": len(os.path.commonprefix(prompts)) if len(rows) > 1 else 0,
        "quantised": quantised,
        "optim": settings.get("optim", "adamw_torch_fused" if CUDA else "adamw_torch"),
    }


def scoring(report: Report) -> None:
    """Reference log-probs of pairs: `score_pairs` against what `precompute_ref_log_probs` of DPOTrainer runs."""
    name, length, batch, count = ("tiny", 64, 4, 16) if report.rehearse else ("135M", 512, 32, 512)
    data = made_pairs(count, length)
    benches = {
        kind: CardBench(kind, made_model(name, HALF), data, batch, length, allocated(), bf16=CUDA)
        for kind in ("ours", "trl")
    }
    with report.row(f"{name}, {count} pairs of up to {length}, {batch} at a time") as row:
        seconds = {kind: [] for kind in benches}
        for turn in range(4):
            if turn >= 2 and report.left < 2 * sum(values[-1] for values in seconds.values()):
                break
            for kind, bench in benches.items():
                columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
                pairs = bench.trainer.train_dataset.select_columns(columns)
                seconds[kind].append(bench.score(pairs, batch))
        # The first pass of each is warming up
        rates = {kind: count / statistics.median(values[1:]) for kind, values in seconds.items()}
        row |= {f"{kind} pairs/s": rate for kind, rate in rates.items()}
        row["ours / trl"] = rates["trl"] / rates["ours"]  # of the time
        row |= benches["ours"].trainer.prefix_sharing.taken
