"""The order of a module's parameters, by which PEFT nests its wrappers around parameters of experts, and which their use changes."""

import copy

import torch
from peft import PeftConfig


def restore_parameter_order(base: torch.nn.Module, config: PeftConfig) -> None:
    """Put the parameters of modules in the order they were built in, if an adapter goes around several of one module.

    PEFT wraps a module once for each of its parameters in `target_parameters`, in the order in which the module holds them, and saves
    weights by the place of their wrapper. A forward pass takes each parameter out of the module and puts it in again as the last.

    Args:
        base (`torch.nn.Module`): The bare base model.
        config (`PeftConfig`): Of the adapter that is put on it next.
    """
    if len(getattr(config, "target_parameters", None) or ()) < 2:
        return
    with torch.device("meta"):
        built = type(base)(copy.deepcopy(base.config))
    modules = dict(base.named_modules())
    for name, module in built.named_modules():
        held, order = getattr(modules.get(name), "_parameters", {}), list(module._parameters)
        if list(held) != order and set(held) == set(order):
            parameters = dict(held)
            held.clear()
            held.update({name: parameters[name] for name in order})
