"""The places where trl-ama leans on the inside of TRL, transformers and accelerate, one test each.

docs/touch_points.md lists them. If an upgrade breaks one, the test that fails says which.
"""

import copy
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Json, concatenate_datasets
from datasets.distributed import split_dataset_by_node
from datasets.iterable_dataset import BufferShuffledExamplesIterable
from places import DOCS, path_of
from tiny_models import lora, make_model
from tiny_pairs import make_dataset, make_rows, with_reference_columns
from tiny_runs import QUICK
from transformers import Trainer
from trl import DPOConfig, DPOTrainer
from vision_model import make_image, make_processor, make_vision_model, make_vision_rows

from trl_ama import AMAConfig, AMATrainer
from trl_ama.pair_batches import RecordedForward
from trl_ama.stream_sources import _own_copy
from trl_ama.streaming import StreamSampler


DOC = DOCS / "touch_points.md"


@pytest.fixture(scope="module")
def dpo(model_dir, tmp_path_factory):
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

    assert all(isinstance(command, Command) for command in commands.get_commands())
    assert resolve_accelerate_config_argument(["--accelerate_config", "single_gpu"])[0] == "--config_file"
    assert list(inspect.signature(launch_training_script).parameters)[:3] == [
        "script_name",
        "launch_args",
        "training_script_args",
    ]


def test_3_dpo_loss_only_calls_its_model(dpo):
    forward = RecordedForward(dpo.model)
    inputs = batch_of(dpo)
    loss = dpo.compute_loss(forward, dict(inputs))
    assert loss.requires_grad and forward.outputs.log_probs.requires_grad
    assert forward.outputs.log_probs.shape == (8, inputs["input_ids"].shape[1] - 1)


def test_4_dpo_loss_reads_reference_log_probs_from_the_batch(dpo, monkeypatch):
    inputs = batch_of(dpo)
    reference = dpo.compute_ref_log_probs(dpo.model, inputs)
    plain = dpo.compute_loss(dpo.model, dict(inputs))
    monkeypatch.setattr(dpo, "precompute_ref_logps", True)
    for shift in (0.0, 1.0):
        given = {**inputs, "ref_chosen_logps": reference[0] - shift, "ref_rejected_logps": reference[1]}
        loss = dpo.compute_loss(dpo.model, given)
        assert torch.isclose(loss, plain, atol=1e-5) == (shift == 0.0)


def test_5_dpo_precompute_hook(dpo):
    assert list(inspect.signature(DPOTrainer._precompute_ref_logps).parameters) == [
        "self",
        "dataset",
        "name",
        "batch_size",
    ]
    assert list(inspect.signature(DPOTrainer.compute_ref_log_probs).parameters) == ["self", "model", "inputs"]
    source = inspect.getsource(DPOTrainer.__init__)
    assert "self._precompute_ref_logps(" in source and "args.precompute_ref_log_probs" in source


def test_6_dpo_signature_columns(dpo):
    dpo._signature_columns = None
    dpo._set_signature_columns_if_needed()
    assert {"prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps"} <= set(dpo._signature_columns)


def test_7_dpo_metrics_are_averaged_into_the_log(dpo):
    dpo.model.train()
    dpo._metrics["train"]["ama/test"] += [1.0, 2.0]
    logs = {}
    dpo.log(logs)
    assert logs["ama/test"] == 1.5 and not dpo._metrics["train"]


def test_8_dpo_preparation_keeps_other_columns(dpo):
    assert {"task", "prompt_ids", "chosen_ids", "rejected_ids"} <= set(dpo.train_dataset.column_names)


def test_9_trl_model_helpers():
    from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id, use_adapter

    assert "outputs" in inspect.signature(add_fused_lm_head).parameters
    assert list(inspect.signature(use_adapter).parameters) == ["model", "adapter_name"]
    assert callable(create_model_from_path) and callable(get_config_model_id)


def test_10_trainer_sampler_hook():
    assert list(inspect.signature(Trainer._get_train_sampler).parameters) == ["self", "train_dataset"]


def test_11_trainer_fetches_a_steps_batches_at_once(model_dir, quick_args):
    sizes = []

    class Watched(AMATrainer):
        def get_batch_samples(self, *args):
            batches, items = super().get_batch_samples(*args)
            sizes.append([len(batch["task"]) for batch in batches])
            return batches, items

    data = with_reference_columns(make_dataset({"list": 10, "sort": 8}))
    trainer = Watched(
        model_dir,
        args=quick_args(max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2),
        train_dataset=data,
        peft_config=lora(),
    )
    trainer.train()
    assert sizes == [[4, 4], [4, 4], [2]]


def test_12_trainer_sets_sync_gradients_before_the_last_micro_batch(model_dir, quick_args):
    seen = []

    class Watched(AMATrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            seen.append(self.accelerator.sync_gradients)
            return loss

    data = with_reference_columns(make_dataset({"list": 10, "sort": 8}))
    Watched(
        model_dir,
        args=quick_args(max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2),
        train_dataset=data,
        peft_config=lora(),
    ).train()
    assert seen == [False, True, False, True, True]


def test_13_trainer_state_carries_our_state():
    from transformers.trainer_callback import TrainerState

    source = inspect.getsource(Trainer._save_checkpoint)
    assert "self.state.save_to_json" in source
    assert isinstance(TrainerState().stateful_callbacks, dict)


def test_14_trainer_begins_training_after_reading_the_state():
    source = inspect.getsource(Trainer._inner_training_loop)
    order = [
        source.index(name)
        for name in ("get_train_dataloader", "_init_training_state", "on_train_begin", "_run_epoch(")
    ]
    assert order == sorted(order)


def test_15_trainer_logs_the_evaluation_loops_metrics():
    assert list(inspect.signature(Trainer.evaluation_loop).parameters)[1:] == [
        "dataloader",
        "description",
        "prediction_loss_only",
        "ignore_keys",
        "metric_key_prefix",
    ]


def test_16_accelerate_skips_batches_through_the_batch_sampler():
    from accelerate import skip_first_batches
    from torch.utils.data import DataLoader

    drawn = []

    class Sampler(torch.utils.data.Sampler):
        def __len__(self):
            return 6

        def __iter__(self):
            for index in range(6):
                drawn.append(index)
                yield index

    loader = skip_first_batches(DataLoader(list(range(6)), batch_size=2, sampler=Sampler()), 2)
    assert [batch.tolist() for batch in loader] == [[4, 5]]
    assert drawn == list(range(6))  # replayed from the start: the sampler must answer for what is skipped


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


def test_18_trainer_creates_the_repository():
    assert list(inspect.signature(Trainer.init_hf_repo).parameters) == ["self", "token", "private"]
    source = inspect.getsource(Trainer.init_hf_repo)
    assert "self.hub_model_id = " in source and "self.push_in_progress = None" in source


def test_19_internal_saves_are_not_pushed():
    assert "if self.args.push_to_hub and not _internal_call" in inspect.getsource(Trainer.save_model)


def test_20_pickled_arguments_hold_no_token(quick_args, tmp_path):
    args = quick_args(hub_token="hf_secret", model_init_kwargs={"token": "hf_secret", "dtype": "float32"})
    torch.save(args, tmp_path / "training_args.bin")
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()
    assert args.hub_token == copy.copy(args).hub_token == copy.deepcopy(args).hub_token == "hf_secret"
    assert "hf_secret" not in repr(args) + str(args)


def test_21_datasets_names_its_cache_by_commit(hub):
    from datasets import load_dataset

    from trl_ama.exact_texts import _commit

    commit = hub.write("dataset", "org/rows", {"train.jsonl": '{"a": 1}\n'})
    assert _commit(load_dataset("org/rows", split="train")) == commit
    assert _commit(make_dataset({"list": 2})) is None


def test_22_one_client_with_a_time_limit():
    from huggingface_hub import get_session

    from trl_ama import hub

    before = get_session().timeout
    with hub.time_limit():
        assert get_session().timeout.read == hub.TIMEOUT
    assert get_session().timeout == before


def test_23_files_that_are_there_make_no_commit(hub, tmp_path):
    from huggingface_hub import HfApi

    (tmp_path / "weights.safetensors").write_bytes(b"some weights")
    (tmp_path / "README.md").write_text("A card")
    HfApi().create_repo("org/twice")
    for _ in range(2):
        HfApi().upload_folder(repo_id="org/twice", folder_path=tmp_path)
    assert len(hub.commits("model", "org/twice")) == 2  # the one that made the repository, and one


def test_24_peft_says_what_did_not_fit(dpo, tmp_path):
    from peft import load_peft_weights
    from peft.utils import set_peft_model_state_dict

    dpo.model.save_pretrained(tmp_path)
    weights = load_peft_weights(str(tmp_path), device="cpu")
    weights["base_model.model.nobody.lora_A.weight"] = weights.pop(next(iter(weights)))
    result = set_peft_model_state_dict(dpo.model, weights)
    assert [key for key in result.missing_keys if "lora_" in key] and result.unexpected_keys


def test_25_tracker_callbacks():
    from transformers.integrations import TensorBoardCallback, WandbCallback

    source = inspect.getsource(TensorBoardCallback)
    assert "self.logging_dir" in source and "self.tb_writer" in source
    assert "self._wandb.run is None" in inspect.getsource(WandbCallback.setup)


def test_26_keyword_arguments_and_a_mask_of_four_dimensions_reach_the_attention(dpo):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append((attention_mask.shape, kwargs.pop("ours", None)))
        return before(module, query, key, value, None, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("sdpa", spy)
    try:
        with torch.no_grad():
            dpo.model(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 1, 1, 1).bool(), ours="told")
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", before)
    assert seen == [(torch.Size([1, 1, 1, 1]), "told")] * 2  # layers


def test_27_fused_head_takes_shifted_labels(dpo):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        usual = dpo.model(input_ids=ids, labels=ids, fused_lm_head=True)
        shifted = dpo.model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:], fused_lm_head=True)
    assert torch.allclose(usual.log_probs, shifted.log_probs, atol=1e-6)


def test_28_fused_head_is_looked_up_at_every_call(dpo, monkeypatch):
    import trl.trainer.utils

    theirs, calls = trl.trainer.utils._ChunkedLogProbFunction, []

    class Spy:
        @staticmethod
        def apply(*arguments):
            calls.append(arguments)
            return theirs.apply(*arguments)

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Spy)
    ids = torch.tensor([[5, 6, 7, 8]])
    dpo.model(input_ids=ids, labels=ids, fused_lm_head=True)
    ((hidden, weight, bias, targets, temperature, chunk, softcap, scale, outputs),) = calls
    assert hidden.shape == (3, weight.shape[1]) and targets.tolist() == [6, 7, 8] and bias is None
    assert (temperature, softcap, scale) == (1.0, None, 1.0) and isinstance(chunk, int) and "log_probs" in outputs


def test_29_dataset_of_a_table_and_row_numbers():
    from datasets import Dataset

    dataset = Dataset.from_dict({"a": [5, 6, 7, 8]})
    assert dataset._indices is None
    selected = dataset.select([3, 1, 1])
    assert selected.data.num_rows == 4 and selected._indices.column(0).to_pylist() == [3, 1, 1]
    again = Dataset(
        selected.data, info=selected.info, split=selected.split, indices_table=selected._indices,
        fingerprint=selected._fingerprint,
    )  # fmt: skip
    assert again["a"][:] == [8, 6, 6]


def test_30_pairs_are_tokenised_without_a_trainer(tokenizer, tmp_path):
    from types import SimpleNamespace

    from trl import DPOConfig

    rows = Dataset.from_list(make_rows("list", 3, seed=0))
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_length=None)
    tokenised = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "pairs")
    assert len(tokenised) == 3 and {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(tokenised.column_names)


def test_31_tiles_of_the_fused_head_are_folded_by_functions_that_are_looked_up(dpo, monkeypatch):
    import trl.kernels.chunked_logprob as head

    calls = []
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        theirs = getattr(head, name)

        def spy(*args, theirs=theirs, name=name, **kwargs):
            calls.append(name)
            assert theirs(*args, **kwargs) is None

        monkeypatch.setattr(head, name, spy)
    ids = torch.tensor([[5, 6, 7, 8]])
    dpo.model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum().backward()
    assert calls == [
        "_forward_tile",
        "_backward_tile",
        "_addmm_fp32",
    ]  # one tile; of a frozen head, its input's gradient


def test_32_a_training_step_runs_on_fake_tensors_and_every_storage_is_seen(dpo):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    storage = leaf.untyped_storage()
                    seen.add((storage._cdata, storage.nbytes()))
            return result

    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = torch.empty(7, 5, requires_grad=True)
        with Watch():
            (torch.empty(3, 7) @ weights).sum().backward()
        assert isinstance(weights.grad, torch._subclasses.FakeTensor)
        assert {nbytes for _, nbytes in seen} >= {4 * 3 * 7, 4 * 3 * 5, 4 * 7 * 5}


def test_33_a_quantiser_puts_its_layers_on_the_meta_device():
    pytest.importorskip("bitsandbytes")
    from accelerate import init_empty_weights
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(make_model(64).config)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    AutoHfQuantizer.from_config(config).preprocess_model(model, device_map=None)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit" and layer.weight.device.type == "meta"
    assert (layer.in_features, layer.compute_dtype) == (32, torch.bfloat16)
    assert layer.weight.compress_statistics is False and type(model.lm_head) is torch.nn.Linear
    model.is_loaded_in_4bit = True
    wrapped = get_peft_model(model, lora(), low_cpu_mem_usage=True)
    adapted = [module for module in wrapped.modules() if type(module).__module__ == "peft.tuners.lora.bnb"]
    assert adapted and {type(module).__name__ for module in adapted} == {"Linear4bit"}


def test_34_adapters_on_a_quantised_base_are_trained_in_bf16():
    source = inspect.getsource(DPOTrainer.__init__)
    assert "if _is_quantized_model:" in source and "param.data = param.data.to(torch.bfloat16)" in source


def test_35_a_4_bit_layer_packs_its_weight_only_where_its_flag_says_so():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    source = inspect.getsource(bitsandbytes.nn.Linear4bit)
    assert "self.support_avx512bf16_for_cpu" in source and "packing_format_for_cpu" in source
    layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16).to("cpu").eval()
    layer.support_avx512bf16_for_cpu = False
    layer(torch.zeros(2, 64, dtype=torch.bfloat16))
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def test_50_micro_batches_are_dealt_out_in_turn_and_repeats_come_last():
    from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
    from accelerate.state import GradientState
    from torch.utils.data import BatchSampler, SequentialSampler

    batches = BatchSampler(SequentialSampler(range(11)), batch_size=2, drop_last=False)
    shards = [list(BatchSamplerShard(batches, num_processes=4, process_index=rank)) for rank in range(4)]
    assert shards == [[[0, 1], [8, 9]], [[2, 3], [10, 0]], [[4, 5], [1, 2]], [[6, 7], [3, 4]]]
    loader = DataLoaderShard(list(range(11)), batch_sampler=BatchSamplerShard(batches, 4, 1))
    assert [GradientState().end_of_dataloader for _ in loader] == [False, True]


def test_51_the_loader_that_skips_nothing_reaches_the_sampler():
    from accelerate import skip_first_batches
    from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
    from torch.utils.data import DataLoader
    from transformers.trainer_callback import CallbackHandler

    loader = DataLoader(list(range(64)), batch_size=4, shuffle=True)
    loader = prepare_data_loader(loader, num_processes=2, process_index=1, use_seedable_sampler=True, data_seed=3)
    skipping = skip_first_batches(loader, 5)
    sampler = loader.batch_sampler.batch_sampler.sampler
    assert isinstance(sampler, SeedableRandomSampler)
    loader.set_epoch(2)
    assert sampler.epoch == 2 and skipping.batch_sampler.batch_sampler.batch_sampler.sampler is sampler
    assert "train_dataloader=self.train_dataloader" in inspect.getsource(CallbackHandler.call_event)


def test_52_precomputed_log_probs_go_where_the_dataset_says():
    source = inspect.getsource(DPOTrainer._precompute_ref_logps)
    assert "dataset._get_cache_file_path(fingerprint)" in source and "Dataset.from_file(cache_file)" in source
    assert Dataset.from_dict({"a": [1]}).cache_files == []


def test_53_what_decides_whether_a_process_loads_a_whole_model(monkeypatch):
    from transformers.distributed import fsdp
    from transformers.integrations import deepspeed

    from trl_ama.processes import whole_models

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(fsdp, "_is_torch_distributed_initialized", lambda: True)

    class Zero3:
        def is_zero3(self):
            return True

    config = Zero3()
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: config)
    assert fsdp.is_fsdp_enabled() and deepspeed.is_deepspeed_zero3_enabled()
    with whole_models():
        assert not fsdp.is_fsdp_enabled() and not deepspeed.is_deepspeed_zero3_enabled()
    assert fsdp.is_fsdp_enabled() and deepspeed.is_deepspeed_zero3_enabled()


def test_70_gradient_norm_comes_once_a_step_before_the_optimizer(model_dir, quick_args):
    order = []

    class Watched(AMATrainer):
        def _get_grad_norm(self, model, grad_norm=None):
            norm = super()._get_grad_norm(model, grad_norm=grad_norm)
            order.append(("norm", float(norm)))
            return norm

    trainer = Watched(
        model_dir,
        args=quick_args(max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=1e-3),
        train_dataset=with_reference_columns(make_dataset({"list": 4, "sort": 4})),
        peft_config=lora(),
    )
    trainer.create_optimizer_and_scheduler(2)
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: order.append(("step", _norm_of(optimizer))))
    trainer.train()
    assert [name for name, _ in order] == ["norm", "step"] * 2
    assert order[0][1] > 1e-3 and order[1][1] == pytest.approx(1e-3, rel=1e-2)  # before clipping, and what is clipped
    weight = torch.nn.Parameter(torch.ones(2))
    torch.optim.AdamW([weight], lr=1.0, weight_decay=0.5).step()
    assert weight.tolist() == [1.0, 1.0]


def _norm_of(optimizer):
    grads = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    return torch.nn.utils.get_total_norm(grads).item()


def test_71_what_the_last_callback_says_of_saving_counts(dpo):
    from transformers import DefaultFlowCallback

    callbacks = [type(callback).__name__ for callback in dpo.callback_handler.callbacks]
    assert callbacks[0] == DefaultFlowCallback.__name__
    source = inspect.getsource(Trainer._run_epoch)
    assert source.index("callback_handler.on_step_end") < source.index("_maybe_log_save_evaluate")
    assert "if self.control.should_save:" in inspect.getsource(Trainer._maybe_log_save_evaluate)


def test_72_only_fp16_has_a_scaler(dpo):
    from accelerate import Accelerator

    assert dpo.accelerator.scaler is None
    assert "self.scaler = None" in inspect.getsource(Accelerator.__init__)


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


def test_74_the_batch_size_that_trains(dpo):
    assert dpo._train_batch_size == dpo.args.train_batch_size
    assert "self._train_batch_size" in inspect.getsource(Trainer.train)


def test_75_pushes_of_checkpoints_go_through_a_method():
    assert list(inspect.signature(Trainer._push_from_checkpoint).parameters) == ["self", "checkpoint_folder"]
    assert "self._push_from_checkpoint(output_dir)" in inspect.getsource(Trainer._save_checkpoint)


def test_76_the_card_is_made_of_class_attributes():
    from trl.trainer.utils import generate_model_card

    assert isinstance(DPOTrainer._tag_names, list) and isinstance(DPOTrainer._name, str)
    assert {"title", "id", "citation"} <= set(DPOTrainer._paper) and hasattr(DPOTrainer, "_template_file")
    assert set(inspect.signature(generate_model_card).parameters) >= {
        "base_model", "model_name", "hub_model_id", "dataset_name", "tags", "wandb_url", "trackio_url", "trainer_name",
        "trainer_citation", "template_file", "paper_title", "paper_id",
    }  # fmt: skip


def test_77_what_the_loss_reads_of_the_trainer(dpo):
    assert dpo.beta == dpo.args.beta and dpo.ld_alpha is None and dpo.ref_model is None
    assert dpo.aux_loss_enabled is False
    assert "self.router_aux_loss_coef" in inspect.getsource(DPOTrainer)
    with dpo.maybe_activation_offload_context:
        pass


def test_78_the_attention_has_a_name(dpo):
    from transformers.integrations.sdpa_attention import repeat_kv
    from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask

    assert dpo.model.config._attn_implementation == "sdpa"
    assert isinstance(flash_attn_supports_top_left_mask(), bool)
    assert repeat_kv(torch.zeros(1, 2, 3, 4), 2).shape == (1, 4, 3, 4)


def test_79_a_new_client_comes_from_a_factory(monkeypatch):
    from huggingface_hub import get_session
    from huggingface_hub.utils import _http

    made = []
    theirs = _http._GLOBAL_CLIENT_FACTORY
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", lambda: made.append(1) or theirs())
    _http.close_session()
    get_session()
    assert made == [1]


def test_80_peft_layers_know_what_they_wrap(dpo):
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    layer = next(module for module in dpo.model.modules() if isinstance(module, BaseTunerLayer))
    assert type(layer.get_base_layer()) is torch.nn.Linear
    assert issubclass(TrainableTokensWrapper, AuxiliaryTrainingWrapper)
    assert "self.original_module" in inspect.getsource(AuxiliaryTrainingWrapper)
    assert "LORA" in PEFT_TYPE_TO_CONFIG_MAPPING and PEFT_TYPE_TO_PREFIX_MAPPING["LORA"] == "lora_"


def test_81_hooks_and_parameters_of_a_module():
    module = torch.nn.Linear(1, 1)
    handle = module.register_forward_hook(lambda *_: torch.full((1,), 7.0))
    assert list(module._forward_hooks) == [handle.id]
    del module._forward_hooks[handle.id]
    handle = module.register_forward_pre_hook(lambda *_: None)
    assert list(module._forward_pre_hooks) == [handle.id]
    del module._forward_pre_hooks[handle.id]
    assert list(torch.nn.Sequential(module)._modules) == ["0"]
    module._parameters["weight"] = torch.nn.Parameter(torch.full((1, 1), 3.0))
    assert module(torch.ones(1)).item() == pytest.approx(3.0 + module.bias.item())


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


def test_83_the_parser_of_accelerate_launch():
    from accelerate.commands.launch import launch_command_parser

    parsed, rest = launch_command_parser().parse_known_args(["--num_processes", "2", "script.py", "--x"])
    assert (parsed.num_processes, parsed.training_script, parsed.training_script_args, rest) == (
        2,
        "script.py",
        ["--x"],
        [],
    )


def test_84_a_datasets_fingerprint_is_of_its_rows():
    data = make_dataset({"list": 4})
    assert data._fingerprint != data.select([0, 1])._fingerprint != data.shuffle(seed=0)._fingerprint


def test_85_the_best_checkpoint_is_the_folder_of_the_best_step(model_dir, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(DPOTrainer, "_load_best_model", lambda self: loaded.append(self.state.best_model_checkpoint))
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    args = DPOConfig(
        **{"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "report_to": "none", "max_length": 64, "disable_tqdm": True},
        **{**settings, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True},
    )  # fmt: skip
    data = make_dataset({"list": 8})
    for folders, expected in (([], None), (["checkpoint-1"], str(tmp_path / "checkpoint-1"))):
        for name in folders:
            (tmp_path / name).mkdir()
        trainer = DPOTrainer(model_dir, args=args, train_dataset=data, eval_dataset=data, peft_config=lora())
        trainer.train()
        assert trainer.state.best_global_step == 1 and trainer.state.best_model_checkpoint == expected
    assert loaded == [str(tmp_path / "checkpoint-1")]


def test_86_the_output_of_a_training_is_a_named_tuple():
    from transformers.trainer_utils import TrainOutput

    assert TrainOutput(1, 2.0, {})._replace(training_loss=7.0) == (1, 7.0, {})


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


def test_90_hooks_that_capture_outputs_belong_to_the_model(tokenizer):
    model = make_vision_model(make_processor(tokenizer))
    layers = model.model.vision_tower.encoder.layers

    def hooks():
        return [hook.__module__ for layer in layers for hook in layer._forward_hooks.values()]

    assert hooks() == []
    for _ in range(2):
        model.model.vision_tower(torch.zeros(1, 3, 16, 16), output_hidden_states=True)
        assert set(hooks()) == {"transformers.utils.output_capturing"} and len(hooks()) == 2


def test_91_images_are_stored_as_bytes_and_paths():
    import io

    from datasets import Image

    buffer = io.BytesIO()
    make_image("apple").save(buffer, "JPEG")
    data = Dataset.from_dict({"image": [{"bytes": buffer.getvalue(), "path": None}]}).cast_column("image", Image())
    data = data.map(lambda row, number: {"number": number}, with_indices=True)
    stored = [row for batch in data.with_format("arrow").iter(2) for row in batch.to_pylist()]
    assert stored == [{"image": {"bytes": buffer.getvalue(), "path": None}, "number": 0}]


@pytest.mark.parametrize(("asked", "tells"), [(2, True), (1, False)])
def test_101_one_process_in_place_of_several(asked, tells, monkeypatch):
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    for name in ("MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    args = launch_command_parser().parse_args(["--cpu", "--num_processes", str(asked), "script.py"])
    args.num_machines, args.mixed_precision, args.dynamo_backend, args.use_cpu = 1, "no", "no", True
    args.num_cpu_threads_per_process = 1
    _, environment = prepare_simple_launcher_cmd_env(args)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no" and "WORLD_SIZE" not in environment
    assert (environment.get("MASTER_ADDR") == "127.0.0.1") is tells


def test_102_loaders_take_the_collator_when_they_are_made(model_dir, tmp_path):
    args = DPOConfig(str(tmp_path), **QUICK)
    data = make_dataset({"list": 4})
    trainer = DPOTrainer(model_dir, args=args, train_dataset=data, eval_dataset=data, peft_config=lora())
    own = trainer.data_collator
    trainer.data_collator = lambda rows: {"rows": len(rows)}
    loaders = [
        trainer.get_train_dataloader(),
        trainer.get_eval_dataloader(),
        trainer.get_test_dataloader(trainer.eval_dataset),
    ]
    trainer.data_collator = own
    assert [next(iter(loader)) for loader in loaders] == [{"rows": 4}] * 3


def numbers(count=10):
    for number in range(count):
        yield {"number": number}


def test_60_streams_continue_from_their_state():
    stream = IterableDataset.from_generator(numbers).map(lambda row: {"twice": 2 * row["number"]})
    stream = stream.filter(lambda row: row["number"] != 5)
    rows = iter(stream)
    assert [next(rows)["twice"] for _ in range(3)] == [0, 2, 4]
    state = json.loads(json.dumps(stream.state_dict()))
    stream.load_state_dict(state)
    assert [row["number"] for row in stream] == [3, 4, 6, 7, 8, 9]
    stream.load_state_dict(None)
    assert next(iter(stream))["number"] == 0


def test_61_a_stream_is_a_chain_of_objects_that_note_how_far_they_were_read():
    whole = IterableDataset.from_generator(numbers)
    even, odd = (
        whole.filter(lambda row, rest: row["number"] % 2 == rest, fn_kwargs={"rest": rest}) for rest in (0, 1)
    )
    assert even._ex_iterable.ex_iterable is not None
    joined = concatenate_datasets([even, odd])
    assert [type(part).__name__ for part in joined._ex_iterable.ex_iterables] == ["FilteredExamplesIterable"] * 2
    ours, theirs = (_own_copy(stream, "list") for stream in (even, odd))
    for own, rest in ((ours, 0), (theirs, 1)):
        rows = iter(own)
        assert [next(rows)["number"] for _ in range(2)] == [rest, rest + 2]
    for own, rest in ((ours, 0), (theirs, 1)):  # neither has moved the other
        own.load_state_dict(own.state_dict())
        assert next(iter(own))["number"] == rest + 4
    assert next(iter(even))["number"] == 0


def test_62_shuffled_and_split_streams_can_be_told():
    stream = IterableDataset.from_generator(numbers)
    assert stream._distributed is None
    assert isinstance(stream.shuffle(seed=1)._ex_iterable, BufferShuffledExamplesIterable)
    assert split_dataset_by_node(stream, 0, 2)._distributed is not None


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


def test_64_trainer_takes_any_dataset_and_a_sampler_whose_length_is_the_run(model_dir, quick_args):
    """One epoch of `max_steps` steps; rows lose what the collator does not know; no process reads for another."""
    data = with_reference_columns(make_dataset({"list": 6, "sort": 5})).remove_columns("task")
    parts = {"list": data.select(range(6)), "sort": data.select(range(6, 11))}
    trainer = AMATrainer(
        model_dir,
        args=quick_args(max_steps=5, per_device_train_batch_size=4, gradient_accumulation_steps=2),
        train_dataset={task: part.to_iterable_dataset() for task, part in parts.items()},
        peft_config=lora(),
    )
    loader = trainer.get_train_dataloader()
    assert isinstance(trainer.mixture.sampler, StreamSampler) and len(trainer.mixture.sampler) == 40
    assert trainer.args.accelerator_config.dispatch_batches is False
    assert trainer.set_initial_training_values(trainer.args, loader)[:2] == (1, 5)
    assert "prompt" not in next(iter(loader))


def source_of(function) -> str:
    """A function's code without white space, as lines may be broken elsewhere."""
    return re.sub(r"\s", "", inspect.getsource(function))


def test_40_checkpoints_are_pushed_and_rotated_when_their_files_are_there():
    from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

    source = source_of(Trainer._save_checkpoint)
    steps = (
        "self.save_model(output_dir,_internal_call=True)",
        "self._save_optimizer_and_scheduler(output_dir)",
        "self.state.save_to_json(",
        "ifself.args.push_to_hub:self._push_from_checkpoint(output_dir)",
        "rotate_checkpoints(output_dir=run_dir,save_total_limit=self.args.save_total_limit,",
    )
    places = [source.index(step) for step in steps]
    assert places == sorted(places)
    assert list(inspect.signature(rotate_checkpoints).parameters)[:4] == [
        "output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime",
    ]  # fmt: skip
    assert "sort_checkpoints(output_dir,checkpoint_prefix,use_mtime)" in source_of(rotate_checkpoints)
    assert list(inspect.signature(sort_checkpoints).parameters)[:3] == ["output_dir", "checkpoint_prefix", "use_mtime"]


def test_41_what_waits_for_the_next_log_entry(dpo):
    source = source_of(Trainer._inner_training_loop)
    begins = source.index("self.callback_handler.on_train_begin(")
    for line in (
        "self._tr_loss=torch.tensor(0.0",
        "self._total_loss_scalar=0.0",
        "self._globalstep_last_logged=self.state.global_step",
    ):
        assert source.index(line) < begins
    assert 'metrics["train_loss"]=train_loss' in source_of(Trainer._finalize_training)
    assert isinstance(dpo._metrics["train"], dict) and type(dpo._total_train_tokens) is int


def test_42_an_epoch_does_a_step_also_when_all_are_done():
    assert "global_step>=" not in source_of(Trainer._run_epoch)
    assert "self._run_epoch(" in source_of(Trainer._inner_training_loop)


def test_43_evaluation_on_start():
    assert list(inspect.signature(Trainer._evaluate).parameters)[1:] == [
        "trial",
        "ignore_keys_for_eval",
        "skip_scheduler",
    ]
    start = "ifargs.eval_on_start:self._evaluate(trial,ignore_keys_for_eval,skip_scheduler=True)"
    assert start in source_of(Trainer._inner_training_loop)
    assert "skip_scheduler" not in source_of(Trainer._maybe_log_save_evaluate).split("):", 1)[1]


def test_44_the_end_of_a_step():
    assert list(inspect.signature(Trainer._maybe_log_save_evaluate).parameters)[1:5] == [
        "tr_loss",
        "grad_norm",
        "model",
        "trial",
    ]
    source = source_of(Trainer._run_epoch)
    for event in ("on_step_end", "on_epoch_end"):
        assert (
            f"self.callback_handler.{event}(self.args,self.state,self.control)self._maybe_log_save_evaluate(" in source
        )
    source = source_of(Trainer._maybe_log_save_evaluate)
    assert (
        source.index("self.log(")
        < source.index("self._evaluate(")
        < source.index("self._save_checkpoint(model,trial)")
    )


def test_45_jit_checkpoints_take_a_signal(model_dir, tmp_path):
    import signal

    before = signal.getsignal(signal.SIGTERM)
    args = {"bf16": False, "use_cpu": True, "report_to": "none", "max_length": 64, "enable_jit_checkpoint": True}
    try:
        for trainer, config, takes in ((DPOTrainer, DPOConfig, True), (AMATrainer, AMAConfig, False)):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            given = config(str(tmp_path), gradient_checkpointing=False, disable_tqdm=True, **args)
            pairs = make_dataset({"list": 8, "sort": 8})
            made = trainer(model_dir, args=given, train_dataset=pairs, peft_config=lora())
            assert (signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL) is takes
            assert given.enable_jit_checkpoint and made.args.enable_jit_checkpoint is takes
    finally:
        signal.signal(signal.SIGTERM, before)


def test_46_accelerate_launch_waits_for_its_child():
    from accelerate.commands import launch

    source = source_of(launch.simple_launcher)
    assert "process=subprocess.Popen(cmd,env=current_env)process.wait()" in source
    assert "raisesubprocess.CalledProcessError(returncode=process.returncode,cmd=cmd)" in source


def test_47_the_elastic_agent_passes_signals_on():
    import signal

    from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    assert SignalException("…", signal.SIGTERM).sigval == signal.SIGTERM
    assert "self._shutdown(e.sigval" in source_of(SimpleElasticAgent.run)
    assert 'kwargs["start_new_session"]=True' in source_of(SubprocessHandler._popen)


class WhoHandles(torch.utils.data.Dataset):
    """Says whether a data loader's process has our handlers of two signals."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        import signal

        ours = [signal.getsignal(number) is _a_handler for number in (signal.SIGUSR1, signal.SIGTERM)]
        return [int(torch.utils.data.get_worker_info() is not None), *map(int, ours)]


def _a_handler(number, frame):
    pass


def _take_sigterm(worker):
    import signal

    signal.signal(signal.SIGTERM, _a_handler)


def test_48_signals_in_a_data_loaders_processes():
    import signal

    from accelerate import skip_first_batches

    before = signal.signal(signal.SIGUSR1, _a_handler)
    try:
        loader = torch.utils.data.DataLoader(WhoHandles(), batch_size=2, num_workers=1, worker_init_fn=_take_sigterm)
        for one in (loader, skip_first_batches(loader, 1)):
            assert [column.tolist() for column in next(iter(one))] == [[1, 1]] * 3
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert torch.utils.data.get_worker_info() is None


def test_49_errors_of_files_that_cannot_be_written(tmp_path):
    import resource

    from safetensors.torch import save_file

    from trl_ama.checkpoints import could_not_write

    limits, errors = resource.getrlimit(resource.RLIMIT_FSIZE), []
    tensors = {"x": torch.zeros(5000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        for save in (
            lambda: torch.save(tensors, tmp_path / "x.pt"),
            lambda: save_file(tensors, tmp_path / "x.safetensors"),
        ):
            try:
                save()
            except Exception as error:
                errors.append(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(errors) == 2 and all(map(could_not_write, errors)), errors
    assert not could_not_write(RuntimeError("CUDA out of memory")) and not could_not_write(ConnectionResetError())


def test_93_adapters_are_made_by_names_that_can_be_watched(model_dir, monkeypatch, tmp_path):
    import trl.trainer.dpo_trainer
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    made = []
    create = trl.trainer.dpo_trainer.get_peft_model
    monkeypatch.setattr(
        trl.trainer.dpo_trainer, "get_peft_model", lambda *args, **kwargs: made.append(args) or create(*args, **kwargs)
    )
    args = DPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True)
    data = make_dataset({"list": 4})
    DPOTrainer(model_dir, args=args, train_dataset=data, peft_config=lora())
    assert len(made) == 1 and type(made[0][0]).__name__ == "LlamaForCausalLM"
    policy, added = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), lora()), []
    add = policy.add_adapter
    policy.add_adapter = lambda *args, **kwargs: added.append(args) or add(*args, **kwargs)
    DPOTrainer(policy, args=args, train_dataset=data)
    assert [name for name, _ in added] == ["ref"]


def test_94_writes_are_told_of_before():
    from torch.utils._python_dispatch import TorchDispatchMode

    written = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            for position, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[position] if position < len(args) else (kwargs or {})[argument.name]
                    written.append((value.untyped_storage().data_ptr(), value.flatten()[0].item()))
            return func(*args, **(kwargs or {}))

    weight = torch.nn.Parameter(torch.ones(4))
    with Watch(), torch.no_grad():
        weight.data.add_(1)
        weight.view(2, 2)[0] = 5
        torch.add(weight, 1, out=weight)
    assert written == [(weight.untyped_storage().data_ptr(), before) for before in (1, 2, 5)]


def test_95_the_name_of_precomputed_references():
    source = inspect.getsource(DPOTrainer._precompute_ref_logps)
    assert "model_hash = self._precompute_model_hash" in source and "(dataset._fingerprint, model_hash)" in source


def test_87_where_an_answer_begins(dpo):
    from trl.data_utils import common_prefix_length
    from trl.trainer import dpo_trainer

    assert common_prefix_length([1, 2, 3], [1, 2, 4, 5]) == 2 and common_prefix_length([1], [1, 2]) == 1
    assert dpo_trainer.common_prefix_length is common_prefix_length


def test_88_json_columns_keep_what_was_written():
    features = Features({"x": Json()})
    rows = Dataset.from_list([{"x": '{"a": 30e-2}'}, {"x": '{"a": 1}'}], features=features)
    for mapped in (rows.map(lambda x: {"y": 1}, input_columns=["x"]), rows.map(lambda row: {"y": 1})):
        assert mapped.data.column("x").to_pylist() == ['{"a": 30e-2}', '{"a": 1}']
        assert mapped["x"][:] == [{"a": 0.3}, {"a": 1}]


def test_98_a_model_without_weights(model_dir):
    from transformers import AutoConfig, LlamaForCausalLM
    from trl.trainer.utils import create_model_from_path

    config = AutoConfig.from_pretrained(model_dir)
    model = create_model_from_path(None, LlamaForCausalLM, config=config, state_dict={}, device_map="meta")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_99_a_trainer_around_a_model_without_weights():
    from transformers import TrainingArguments
    from trl.trainer.base_trainer import _BaseTrainer

    assert isinstance(TrainingArguments.place_model_on_device, property)
    assert callable(_BaseTrainer._send_telemetry)
    assert "self.accelerator = " in inspect.getsource(Trainer.create_accelerator_and_postprocess)


def test_100_trainable_tokens_of_a_tied_head():
    from peft import LoraConfig, get_peft_model
    from peft.utils.other import TrainableTokensWrapper

    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5])
    heads = [
        get_peft_model(make_model(26, tie_word_embeddings=tied), config).get_output_embeddings()
        for tied in (True, False)
    ]
    assert [isinstance(head, TrainableTokensWrapper) for head in heads] == [True, False]


def test_every_touch_point_is_documented():
    numbered = {int(number) for number in re.findall(r"^\| (\d+) \|", DOC.read_text(), flags=re.MULTILINE)}
    tested = {int(match) for match in re.findall(r"def test_(\d+)_", path_of("test_touch_points.py").read_text())}
    assert numbered == tested


def test_92_datasets_names_the_files_that_it_read(hub):
    from datasets import ReadInstruction, load_dataset, load_dataset_builder

    commit = hub.write("dataset", "org/rows", {"train.jsonl": '{"a": 1}\n{"a": 2}\n', "test.jsonl": '{"a": 3}\n'})
    assert load_dataset("org/rows", split="train").info.builder_name == "json"
    builder = load_dataset_builder("org/rows")
    files = {str(split): [str(file) for file in files] for split, files in builder.config.data_files.items()}
    assert files == {name: [f"hf://datasets/org/rows@{commit}/{name}.jsonl"] for name in ("train", "test")}
    assert (builder.hash, builder.repo_id, builder.config.encoding, builder.config.field) == (
        commit,
        "org/rows",
        "utf-8",
        None,
    )
    parts = ReadInstruction.from_spec("train[50%:]+test").to_absolute({"train": 2, "test": 1})
    assert [(part.splitname, part.from_, part.to) for part in parts] == [("train", 1, 2), ("test", 0, 1)]


def test_96_the_loss_reads_the_reference_after_it_has_called_the_model(dpo):
    inputs, expected = dict(batch_of(dpo)), dpo.compute_ref_log_probs(dpo.model, batch_of(dpo))
    loss = dpo.compute_loss(dpo.model, dict(inputs))
    added = lambda: inputs.update(zip(("ref_chosen_logps", "ref_rejected_logps"), expected, strict=True))  # noqa: E731
    dpo.precompute_ref_logps = True
    try:
        later = dpo.compute_loss(RecordedForward(dpo.model, then=added), inputs)
    finally:
        dpo.precompute_ref_logps = False
    assert later.item() == pytest.approx(loss.item())


def test_97_hooks_are_counted_and_a_lack_of_memory_is_known():
    from accelerate.utils.memory import should_reduce_batch_size

    module = torch.nn.Linear(2, 2)
    hooks = module._forward_hooks, module._forward_pre_hooks
    module.register_forward_hook(lambda module, args, output: output)
    module.register_forward_pre_hook(lambda module, args: args)
    assert [len(one) for one in hooks] == [1, 1]
    assert should_reduce_batch_size(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
    assert should_reduce_batch_size(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    )
    assert not should_reduce_batch_size(RuntimeError("shapes cannot be multiplied"))
