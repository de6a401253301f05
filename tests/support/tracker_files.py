"""Keeps trackers to one folder and reads what they write there. A module for tests only."""

import contextlib
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def trackio_modules() -> list[str]:
    """What to forget for another TRACKIO_DIR, which Trackio reads once, when it is imported."""
    return [name for name in sys.modules if name.partition(".")[0] == "trackio"]


@contextlib.contextmanager
def local_trackers(folder: Path) -> Iterator[None]:
    """Trackers write below one folder, know no other settings and ask nobody outside this machine."""
    outside = []
    connect = socket.socket.connect

    def record(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            outside.append(address)
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_", "TENSORBOARD_"))]:
            patch.delenv(name)
        patch.delenv("HF_TOKEN", raising=False)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            (folder / name).mkdir()
            patch.setenv(name, str(folder / name))
        patch.setenv("TRACKIO_DIR", str(folder / "TRACKIO_DIR"))
        patch.setattr(socket.socket, "connect", record)
        for name in trackio_modules():
            patch.delitem(sys.modules, name)
        yield
        if "wandb" in sys.modules:
            sys.modules["wandb"].teardown()  # its service, and the settings that it has read
        for name in trackio_modules():
            del sys.modules[name]
    assert outside == []


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """A TensorBoard run: tag → (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(entry.step, entry.value) for entry in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def trackio_runs(project: str) -> dict[str, list[dict]]:
    """Trackio's runs of a project: name → what was logged."""
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    return {run.name: SQLiteStorage.get_logs(project, run.name) for run in Api().runs(project)}


def wandb_records(path: Path) -> Iterator:
    """The records of an offline W&B run: blocks of 32 KiB as in LevelDB's log, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # padding
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(b"".join(parts))
            parts = []


def wandb_runs(folder: Path) -> dict[str, dict]:
    """Offline W&B runs by name: group, kind, exit code (`None` if open) and what was logged."""
    runs = {}
    for path in sorted(folder.rglob("*.wandb")):
        run = {"history": [], "exit_code": None}
        records, waited = list(wandb_records(path)), 0
        # `finish` returns when W&B's own process has heard of it; on a busy machine the file comes later
        while not any(record.HasField("exit") for record in records) and waited < 50:
            time.sleep(0.2)
            records, waited = list(wandb_records(path)), waited + 1
        for record in records:
            if record.HasField("run"):
                name = record.run.display_name
                run |= {"group": record.run.run_group, "kind": record.run.job_type, "project": record.run.project}
            elif record.HasField("history"):
                items = record.history.item
                run["history"].append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
            elif record.HasField("exit"):
                run["exit_code"] = record.exit.exit_code
        assert name not in runs
        runs[name] = run
    return runs
