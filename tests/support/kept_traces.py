"""Traces of a plan, run once for each model, batch and settings: most plans of the tests differ in a stage or two."""

import dataclasses
import json

import pytest

from trl_ama.plan import memory
from trl_ama.plan.empty_model import base_model
from trl_ama.plan.trace import CannotTrace, trace_pass


_KEPT: dict = {}
# Which a trace does not look at
_OTHERS = {"optim": "", "distributed": False}


def _words(config) -> str:
    """All that a configuration says, or a quantisation or an adapter."""
    values = {**(config.to_dict() if hasattr(config, "to_dict") else vars(config)), "_name_or_path": None}
    return json.dumps(
        values, default=lambda value: repr(sorted(value) if isinstance(value, set) else value), sort_keys=True
    )


def _kept_pass(model, settings, pairs, packed, trains, common=0):
    plain = dataclasses.replace(settings, **_OTHERS)
    parts = [None if part is None else _words(part) for part in (plain.quantization, plain.peft_config)]
    rest = dataclasses.replace(plain, quantization=None, peft_config=None)
    key = (_words(base_model(model).config), *parts, rest, tuple(pairs), packed, trains, common)
    if key not in _KEPT:
        try:
            _KEPT[key] = trace_pass(model, settings, pairs, packed, trains, common)
        except (memory.CannotShare, CannotTrace) as reason:
            _KEPT[key] = reason
    if isinstance(_KEPT[key], ValueError):
        raise type(_KEPT[key])(*_KEPT[key].args)
    return _KEPT[key]


@pytest.fixture(name="kept_traces")
def kept_traces_fixture(monkeypatch):
    """What the memory of a plan is made of, traced once in a process; gives what was, to be forgotten."""
    monkeypatch.setattr(memory, "trace_pass", _kept_pass)
    return _KEPT
