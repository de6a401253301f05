"""Touch points in torch and bitsandbytes: storages, hooks, signals, and a 4-bit layer."""

import inspect

import pytest
import torch
from touched import dpo_fixture, source_of  # noqa: F401 - fixtures


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


def test_35_a_4_bit_layer_packs_its_weight_only_where_its_flag_says_so():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    source = inspect.getsource(bitsandbytes.nn.Linear4bit)
    assert "self.support_avx512bf16_for_cpu" in source and "packing_format_for_cpu" in source
    layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16).to("cpu").eval()
    layer.support_avx512bf16_for_cpu = False
    layer(torch.zeros(2, 64, dtype=torch.bfloat16))
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


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

    from trl_ama.training.checkpoints import could_not_write

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


def test_105_kernels_for_sequences_of_different_lengths_and_their_masks():
    from torch.nn.attention.bias import CausalVariant

    assert int(CausalVariant.LOWER_RIGHT) == 2  # aligned at the end of queries and keys

    def names(operator):
        return [argument.name for argument in operator.default._schema.arguments]

    flash = names(torch.ops.aten._flash_attention_forward)
    assert flash[:7] == ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k"]
    assert flash[7:10] == ["dropout_p", "is_causal", "return_debug_mask"]
    assert {"scale", "window_size_left", "window_size_right"} <= set(flash[10:])
    efficient = names(torch.ops.aten._efficient_attention_forward)
    assert efficient[:6] == ["query", "key", "value", "bias", "cu_seqlens_q", "cu_seqlens_k"]
    assert efficient[6:11] == ["max_seqlen_q", "max_seqlen_k", "dropout_p", "custom_mask_type", "compute_log_sumexp"]
    assert "scale" in efficient[11:]
