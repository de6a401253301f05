"""The places where trl-ama leans on the inside of TRL, transformers and accelerate, one test each.

docs/touch_points.md lists them. If an upgrade breaks one, the test that fails says which.
"""

import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
from conftest import make_dataset, make_model, make_rows
from datasets import Dataset
from test_invariants import lora, with_reference_columns
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from trl_ama import AMATrainer
from trl_ama.step_recorder import RecordedForward


DOC = Path(__file__).parent.parent / "docs" / "touch_points.md"


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

    from trl_ama.task_loading import _commit

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


def test_every_touch_point_is_documented():
    numbered = {int(number) for number in re.findall(r"^\| (\d+) \|", DOC.read_text(), flags=re.MULTILINE)}
    tested = {int(match) for match in re.findall(r"def test_(\d+)_", Path(__file__).read_text())}
    assert numbered == tested
