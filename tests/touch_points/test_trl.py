"""Touch points in TRL: its names and commands, what prepares pairs, and its parser."""

import copy
import inspect
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from tiny_models import lora
from tiny_pairs import make_dataset, make_rows
from touched import dpo_fixture  # noqa: F401 - fixtures
from trl import DPOConfig, DPOTrainer
from vision_model import make_processor, make_vision_model, make_vision_rows

from trl_ama import AMAConfig, AMATrainer


def test_1_trl_lazy_table_of_names():
    import trl

    import trl_ama  # noqa: F401

    assert isinstance(trl._class_to_module, dict) and trl._class_to_module["DPOTrainer"] == "trainer"
    assert trl.AMATrainer is AMATrainer


def test_2_trl_command_list():
    from trl.cli import commands
    from trl.cli.accelerate_config import resolve_accelerate_config_argument
    from trl.cli.accelerate_launcher import launch_training_script
    from trl.cli.commands.base import Command

    (program,) = entry_points(group="console_scripts", name="trl")
    assert program.value == "trl.cli:main"
    assert all(isinstance(command, Command) for command in commands.get_commands())
    assert resolve_accelerate_config_argument(["--accelerate_config", "single_gpu"])[0] == "--config_file"
    assert list(inspect.signature(launch_training_script).parameters)[:3] == [
        "script_name",
        "launch_args",
        "training_script_args",
    ]


def test_8_dpo_preparation_keeps_other_columns(dpo):
    assert {"task", "prompt_ids", "chosen_ids", "rejected_ids"} <= set(dpo.train_dataset.column_names)


def test_9_trl_model_helpers():
    from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id, use_adapter

    assert "outputs" in inspect.signature(add_fused_lm_head).parameters
    assert list(inspect.signature(use_adapter).parameters) == ["model", "adapter_name"]
    assert callable(create_model_from_path) and callable(get_config_model_id)


def test_17_trl_renders_our_template(dpo, model_dir, quick_args):
    from trl.trainer import utils

    assert "templates/{template_file}" in inspect.getsource(utils.generate_model_card)
    data = make_dataset({"list": 8, "sort": 8})
    trainer = AMATrainer(model_dir, args=quick_args(mixing="uniform"), train_dataset=data, peft_config=lora())
    trainer.create_model_card(model_name="mine")
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert (
        "one model for several preference tasks" in card and "Tasks: list, sort." in card and "@inproceedings" in card
    )


def test_30_pairs_are_tokenised_without_a_trainer(tokenizer, tmp_path):
    from types import SimpleNamespace

    from trl import DPOConfig

    rows = Dataset.from_list(make_rows("list", 3, seed=0))
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_length=None)
    tokenised = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "pairs")
    assert len(tokenised) == 3 and {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(tokenised.column_names)


def test_52_precomputed_log_probs_go_where_the_dataset_says():
    source = inspect.getsource(DPOTrainer._precompute_ref_logps)
    assert "dataset._get_cache_file_path(fingerprint)" in source and "Dataset.from_file(cache_file)" in source
    assert Dataset.from_dict({"a": [1]}).cache_files == []


def test_73_pairs_are_prepared_through_a_method(model_dir, tmp_path, quick_args):
    names = []

    class Watched(DPOTrainer):
        def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
            names.append(dataset_name)
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    data = make_dataset({"list": 2}).remove_columns("task")
    trainer = Watched(model_dir, args=quick_args(DPOConfig), train_dataset=data, eval_dataset=data, peft_config=lora())
    trainer.evaluate({"other": data})
    assert names == ["train", "eval", "other"]


def test_76_the_card_is_made_of_class_attributes():
    from trl.trainer.utils import generate_model_card

    assert isinstance(DPOTrainer._tag_names, list) and isinstance(DPOTrainer._name, str)
    assert {"title", "id", "citation"} <= set(DPOTrainer._paper) and hasattr(DPOTrainer, "_template_file")
    assert set(inspect.signature(generate_model_card).parameters) >= {
        "base_model", "model_name", "hub_model_id", "dataset_name", "tags", "wandb_url", "trackio_url", "trainer_name",
        "trainer_citation", "template_file", "paper_title", "paper_id",
    }  # fmt: skip


def test_82_the_parser_gives_back_what_it_does_not_know(tmp_path):
    from trl import TrlParser

    (tmp_path / "config.yaml").write_text("mixing: ama_s\nnum_machines: 2\n")
    parser = TrlParser((AMAConfig,))
    assert list(parser.dataclass_types) == [AMAConfig] and "mixing" in {action.dest for action in parser._actions}
    argv = ["--config", str(tmp_path / "config.yaml"), "--num_processes", "2", "--use_cpu", "--bf16", "false"]
    args, of_config, of_flags = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    assert args.mixing == "ama_s" and of_config == ["--num_machines", "2"] and of_flags == ["--num_processes", "2"]


def test_89_pairs_about_images_are_prepared_in_the_collator(tokenizer, tmp_path):
    from peft import LoraConfig
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    processor = make_processor(tokenizer)
    data = Dataset.from_list([{**row, "ref_chosen_logps": -1.0} for row in make_vision_rows("name", 2)])
    args = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "report_to": "none"}

    def build(**more):
        model = make_vision_model(processor)
        given = {
            "processing_class": processor,
            "train_dataset": data,
            "peft_config": LoraConfig(target_modules=["q_proj"]),
        }
        return DPOTrainer(model, args=DPOConfig(**args, **more), **given)

    trainer = build()
    assert trainer.train_dataset.column_names == data.column_names
    assert isinstance(trainer.data_collator, DataCollatorForVisionPreference)
    batch = trainer.data_collator([data[0]])
    assert batch["completion_mask"].shape == batch["input_ids"].shape and "ref_chosen_logps" not in batch
    with pytest.raises(ValueError, match="precompute_ref_log_probs"):
        build(precompute_ref_log_probs=True)


def test_63_dpo_prepares_a_stream_lazily(dpo):
    read = []

    def rows():
        for row in make_rows("list", 20, 0):
            read.append(row)
            yield {**row, "task": "list"}

    stream = IterableDataset.from_generator(rows)
    prepared = dpo._prepare_dataset(stream, dpo.processing_class, dpo.args, "train")
    assert len(read) < 5
    expected = [{**row, "task": "list"} for row in make_rows("list", 20, 0)]
    in_memory = dpo._prepare_dataset(Dataset.from_list(expected), dpo.processing_class, dpo.args, "train")
    names = ("task", "prompt_ids", "chosen_ids", "rejected_ids")
    for ours, theirs in zip(prepared, in_memory, strict=True):
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    short = copy.copy(dpo.args)
    short.max_length = 7
    kept = list(dpo._prepare_dataset(stream, dpo.processing_class, short, "train"))
    assert 0 < len(kept) < 20 and all(len(row["prompt_ids"]) < 7 for row in kept)


def test_95_the_name_of_precomputed_references():
    source = inspect.getsource(DPOTrainer._precompute_ref_logps)
    assert "model_hash = self._precompute_model_hash" in source and "(dataset._fingerprint, model_hash)" in source


def test_87_where_an_answer_begins(dpo):
    from trl.data_utils import common_prefix_length
    from trl.trainer import dpo_trainer

    assert common_prefix_length([1, 2, 3], [1, 2, 4, 5]) == 2 and common_prefix_length([1], [1, 2]) == 1
    assert dpo_trainer.common_prefix_length is common_prefix_length
