"""The card itself: versions, and how fast products, copies and launches are on it. Imports torch alone."""

import platform
import time
from collections.abc import Callable
from importlib import metadata

import torch
from gpu_report import NotHere, Report


CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PACKAGES = ("torch", "trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "triton", "trl-ama")


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def environment(report: Report) -> None:
    """Versions, the card, and how fast products, copies and launches are on it."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions |= {"cuda": torch.version.cuda or torch.version.hip, "cudnn": torch.backends.cudnn.version()}
    report.note("versions", versions)
    if not CUDA:
        report.note("card", None)
        if not report.rehearse:
            raise NotHere(f"torch {torch.__version__} sees no CUDA device")
    else:
        card = torch.cuda.get_device_properties(0)
        report.note("card", card.name)
        report.note("capability", f"{card.major}.{card.minor}")
        report.note("gib", round(card.total_memory / 2**30, 1))
        report.note("multiprocessors", card.multi_processor_count)
    size = 256 if report.rehearse else 8192
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        n = size // 2 if dtype == torch.float32 else size
        with report.row(f"matrix product {str(dtype)[6:]}, {n} x {n}") as row:
            a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
            row |= {"rate": 2 * n**3 / _seconds(lambda a=a, b=b: a @ b) / 1e12, "unit": "TFLOP/s"}
    with report.row("copy") as row:
        source = torch.zeros(2**20 if report.rehearse else 2**28, device=DEVICE)
        target = torch.empty_like(source)
        row |= {"rate": 8 * source.numel() / _seconds(lambda: target.copy_(source)) / 1e9, "unit": "GB/s"}
    with report.row("launch of a kernel that does nothing") as row:
        small, count = torch.zeros(8, device=DEVICE), 100 if report.rehearse else 5000
        for _ in range(10):
            small.add_(1)
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            small.add_(1)
        row |= {"rate": (time.perf_counter() - start) / count * 1e6, "unit": "µs"}  # of the host
        synchronize()


def _seconds(work: Callable[[], object], times: int = 10) -> float:
    for _ in range(3):
        work()
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize()
    return (time.perf_counter() - start) / times
