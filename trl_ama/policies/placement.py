"""Which devices a model lies on: its process's own, or those that it was spread over when it was loaded."""

from typing import Any

import torch
from accelerate.logging import get_logger


logger = get_logger(__name__)


def spread(model: torch.nn.Module, device: torch.device) -> list[str]:
    """The places of a model that was loaded with a `device_map` onto others than this process's device; empty if it was not.

    Accelerate's hooks then carry what is computed from place to place, so that the model must not be moved. TRL 1.16 loads a model
    that it is given by name like this where one process sees several GPUs, or one that is full.

    Args:
        model (`torch.nn.Module`): A transformers model, or a `PeftModel` around one.
        device (`torch.device`): The process's.
    """
    device_map = getattr(model, "hf_device_map", None) or {}
    places = {_name(place, device) for place in device_map.values()}
    is_here = len(places) < 2 and places <= {"cpu", _name(device, device)}
    return [] if is_here else sorted(places, key=lambda place: (place in ("cpu", "disk"), place))


def _name(place: Any, device: torch.device) -> str:
    """A place of a device map in one way of writing: `"cuda:0"` for 0, `"cuda"` and `torch.device("cuda", 0)`."""
    if isinstance(place, int):
        return f"{device.type}:{place}"
    name = str(place)
    return name if ":" in name or name in ("cpu", "disk", "mps", "meta") else f"{name}:0"


def on_device(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model on the process's device; one that is spread over several stays where it is."""
    return model if spread(model, device) else model.to(device)


def device_map_like(model: torch.nn.Module, device: torch.device) -> dict[str, Any] | None:
    """The `device_map` that loads another model of the same layers where this one is.

    Without one, TRL spreads what it loads over all GPUs that a process sees, also where each process has a GPU of its own.
    """
    if spread(model, device):
        return dict(model.hf_device_map)
    return None if device.type in ("cpu", "mps") else {"": device}


def tell_of_spread(model: torch.nn.Module, device: torch.device) -> None:
    """Warn of a model that is spread over several places, which a run that names the model has seldom asked for."""
    places = spread(model, device)
    if len(places) > 1:
        logger.warning(
            f"The model is spread over {', '.join(places)}, of which one computes while the others wait"
            + (", and what is not on a GPU is slow and cannot be trained" if {"cpu", "disk"} & set(places) else "")
            + ". To use one GPU, set CUDA_VISIBLE_DEVICES=0; to use all, launch a process for each (`--num_processes`)."
        )
