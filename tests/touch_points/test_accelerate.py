"""Touch points in accelerate: micro-batches, loaders and the launcher."""

import inspect

import pytest
import torch
from tiny_models import lora
from tiny_pairs import make_dataset, with_reference_columns
from touched import dpo_fixture, source_of  # noqa: F401 - fixtures

from trl_ama import AMATrainer


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


def test_72_only_fp16_has_a_scaler(dpo):
    from accelerate import Accelerator

    assert dpo.accelerator.scaler is None
    assert "self.scaler = None" in inspect.getsource(Accelerator.__init__)


def test_83_the_parser_of_accelerate_launch():
    from accelerate.commands.launch import launch_command_parser

    parsed, rest = launch_command_parser().parse_known_args(["--num_processes", "2", "script.py", "--x"])
    assert (parsed.num_processes, parsed.training_script, parsed.training_script_args, rest) == (
        2,
        "script.py",
        ["--x"],
        [],
    )


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


def test_46_accelerate_launch_waits_for_its_child():
    from accelerate.commands import launch

    source = source_of(launch.simple_launcher)
    assert "process=subprocess.Popen(cmd,env=current_env)process.wait()" in source
    assert "raisesubprocess.CalledProcessError(returncode=process.returncode,cmd=cmd)" in source


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


def test_104_loaders_move_a_batch_by_its_own_to_and_the_trainer_keeps_its_tensors(dpo):
    from torch.utils.data import DataLoader

    moved = []

    class Batch(dict):
        def to(self, device, non_blocking=False):
            moved.append(device)
            return self

    loader = dpo.accelerator.prepare(DataLoader([1, 2], 2, collate_fn=lambda rows: Batch(rows=torch.tensor(rows))))
    (batch,) = loader
    assert type(batch) is Batch and moved == [dpo.accelerator.device]
    inputs = dpo._prepare_inputs(batch)
    assert type(inputs) is Batch and inputs["rows"] is batch["rows"]


def test_38_accelerate_asks_fsdp2_to_cast_what_a_model_gives_back():
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from trl.models.utils import prepare_fsdp

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16")
    assert plugin.mixed_precision_policy.output_dtype is torch.bfloat16  # once it is not, dpo/precision.py can go
    assert all(
        "mixed_precision_policy" in inspect.getsource(prepare) for prepare in (fsdp2_prepare_model, prepare_fsdp)
    )


def test_39_where_a_model_was_put(model_dir, tmp_path):
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import create_model_from_path

    on_cpu = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {**dict.fromkeys(on_cpu, "cpu"), "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(model_dir, device_map=device_map, offload_folder=tmp_path)
    assert model.hf_device_map == device_map
    with pytest.raises(RuntimeError, match="can't move a model that has some modules offloaded"):
        model.to("cpu")
    source = inspect.getsource(create_model_from_path)
    assert 'if "device_map" not in kwargs:' in source and 'else "auto"' in source
