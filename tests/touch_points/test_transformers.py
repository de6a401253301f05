"""Touch points in transformers: the attention, models without weights, and what a Trainer does in a step."""

import copy
import inspect

import pytest
import torch
from tiny_models import lora, make_model
from tiny_pairs import make_dataset, with_reference_columns
from tiny_runs import QUICK
from touched import dpo_fixture  # noqa: F401 - fixtures
from transformers import Trainer
from trl import DPOConfig, DPOTrainer
from vision_model import make_processor, make_vision_model

from trl_ama import AMATrainer
from trl_ama.sampling.streams import StreamSampler


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


def test_15_trainer_logs_the_evaluation_loops_metrics():
    assert list(inspect.signature(Trainer.evaluation_loop).parameters)[1:] == [
        "dataloader",
        "description",
        "prediction_loss_only",
        "ignore_keys",
        "metric_key_prefix",
    ]


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


def test_53_what_decides_whether_a_process_loads_a_whole_model(monkeypatch):
    from transformers.distributed import fsdp
    from transformers.integrations import deepspeed

    from trl_ama.common.processes import whole_models

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


def test_74_the_batch_size_that_trains(dpo):
    assert dpo._train_batch_size == dpo.args.train_batch_size
    assert "self._train_batch_size" in inspect.getsource(Trainer.train)


def test_78_the_attention_has_a_name(dpo):
    from transformers.integrations import hub_kernels
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.integrations.sdpa_attention import repeat_kv
    from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask

    assert dpo.model.config._attn_implementation == "sdpa"
    assert isinstance(flash_attn_supports_top_left_mask(), bool)
    assert repeat_kv(torch.zeros(1, 2, 3, 4), 2).shape == (1, 4, 3, 4)
    assert hub_kernels.flash_attention_forward is flash_attention_forward  # the wrapper of what a kernel brings


def test_86_the_output_of_a_training_is_a_named_tuple():
    from transformers.trainer_utils import TrainOutput

    assert TrainOutput(1, 2.0, {})._replace(training_loss=7.0) == (1, 7.0, {})


def test_90_hooks_that_capture_outputs_belong_to_the_model(tokenizer):
    model = make_vision_model(make_processor(tokenizer))
    layers = model.model.vision_tower.encoder.layers

    def hooks():
        return [hook.__module__ for layer in layers for hook in layer._forward_hooks.values()]

    assert hooks() == []
    for _ in range(2):
        model.model.vision_tower(torch.zeros(1, 3, 16, 16), output_hidden_states=True)
        assert set(hooks()) == {"transformers.utils.output_capturing"} and len(hooks()) == 2


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


def test_110_a_checkpointed_layer_is_called_through_its_function():
    from functools import partial

    from transformers.modeling_layers import GradientCheckpointingLayer

    model = make_model(20).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) == model.config.num_hidden_layers and all(layer.gradient_checkpointing for layer in layers)
    seen = []

    def own(forward, hidden, *args):
        output = forward(hidden, *args)
        seen.append((type(forward), hidden.shape == output.shape, "position_embeddings" in forward.keywords, args))
        return output

    layers[1]._gradient_checkpointing_func = own
    model(input_ids=torch.arange(6).view(2, 3))
    assert seen == [(partial, True, True, ())]
