"""A trainer of TRL's own to be looked into, and the source of what others wrote."""

import inspect
import re

import pytest
from tiny_models import lora
from tiny_pairs import make_dataset
from trl import DPOConfig, DPOTrainer


@pytest.fixture(name="dpo", scope="module")
def dpo_fixture(model_dir, tmp_path_factory):
    args = DPOConfig(
        str(tmp_path_factory.mktemp("dpo")),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        max_length=64,
        disable_tqdm=True,
    )
    return DPOTrainer(model_dir, args=args, train_dataset=make_dataset({"list": 8}), peft_config=lora())


def batch_of(trainer, rows=4):
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in range(rows)]))


def source_of(function) -> str:
    """A function's code without white space, as lines may be broken elsewhere."""
    return re.sub(r"\s", "", inspect.getsource(function))
