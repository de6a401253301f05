"""Models with random weights, made-up pairs and trainers that the parts of `make gpu` measure with."""

import gc
import tempfile
import time
from functools import cache
from typing import Any

import torch
from accelerate import init_empty_weights
from datasets import Dataset
from gpu_card import CUDA, DEVICE, synchronize
from peft import LoraConfig
from speed import Bench
from tiny_models import make_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from trl import DPOConfig, DPOTrainer

from trl_ama import AMAConfig, AMATrainer


GIB = 2**30
# On a card as people train; a rehearsal is of the code, and most CPUs take a hundred times as long over 16 bits
HALF = torch.bfloat16 if CUDA else torch.float32
WORDS = 2000
BEGINNING = 24  # tokens that all prompts begin with, as a chat template's system prompt
# Shapes of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B
MODELS = {
    "135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": WORDS + 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}


def model_config(name: str) -> LlamaConfig:
    known = {"max_position_embeddings": 8192, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaConfig(**MODELS[name], **known, initializer_range=0.05)


def made_model(name: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(model_config(name), dtype=dtype)


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def made_nf4(name: str) -> PreTrainedModel:
    """A model in 4 bits, as bitsandbytes would make it of a checkpoint: drawn and quantised matrix by matrix on the device, so
    that the whole is never there in 16 bits."""
    import bitsandbytes  # optional

    settings, dtype = nf4(), torch.bfloat16
    torch.manual_seed(0)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(model_config(name), dtype=dtype)
    quantizer = AutoHfQuantizer.from_config(settings)
    quantizer.preprocess_model(model, device_map=None)
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            packed = isinstance(module, bitsandbytes.nn.Linear4bit) and key == "weight"
            shape = (module.out_features, module.in_features) if packed else parameter.shape
            is_norm = len(shape) == 1
            value = torch.ones(shape, dtype=dtype, device=DEVICE)
            value = value if is_norm else value.normal_(std=0.02)
            if packed:
                weight = bitsandbytes.nn.Params4bit(
                    value, requires_grad=False, compress_statistics=True, quant_type="nf4", module=module
                )
                module._parameters[key] = weight.to(DEVICE)
            else:
                module._parameters[key] = torch.nn.Parameter(value, requires_grad=False)
    model.tie_weights()
    model.model.rotary_emb.to(DEVICE)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.hf_quantizer, model.quantization_method = quantizer, settings.quant_method
    model.config.quantization_config = settings
    return model


@cache
def tokenizer():
    return make_tokenizer([f"w{number}" for number in range(WORDS)], chat_template=None)


def made_pairs(count: int, length: int, beginning: int = BEGINNING, seed: int = 0) -> Dataset:
    """Pairs of random words: prompts of an eighth to a half of `length` tokens, answers of a sixteenth to a half, all equally likely,
    and all prompts with the same first words."""
    rng = torch.Generator().manual_seed(seed)

    def size(low: int) -> int:
        return int(torch.randint(low, length // 2 - 1, (1,), generator=rng))

    def words(count: int) -> str:
        return " ".join(f"w{number}" for number in torch.randint(WORDS, (count,), generator=rng).tolist())

    system = words(beginning)
    rows = [
        {
            "prompt": f"{system} {words(max(1, size(length // 8) - beginning))} ",
            "chosen": words(size(length // 16)),
            "rejected": words(size(length // 16)),
            "task": "words",
            "ref_chosen_logps": -50.0,
            "ref_rejected_logps": -50.0,
        }
        for _ in range(count)
    ]
    return Dataset.from_list(rows)


def lora(rank: int = 16) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer_of(
    kind: str, model: PreTrainedModel, data: Dataset, length: int, adapter: bool = True, **settings: Any
) -> DPOTrainer:
    """An `AMATrainer` (`"ours"`) or a `DPOTrainer` (`"trl"`), with everything else alike."""
    ours = kind == "ours"
    common = {
        "output_dir": settings.pop("output_dir", None) or tempfile.mkdtemp(prefix="gpu_figures-"),
        "max_length": length,
        "use_cpu": not CUDA,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        **({"mixing": "proportional"} if ours else {}),
    }
    trainer = (AMATrainer if ours else DPOTrainer)(
        model,
        args=(AMAConfig if ours else DPOConfig)(**{**common, **settings}),
        train_dataset=data if ours else data.remove_columns("task"),
        processing_class=tokenizer(),
        peft_config=lora() if adapter else None,
    )
    if ours:
        trainer.reference_unchecked = False  # made-up reference log-probs
    return trainer


class CardBench(Bench):
    """A trainer of either kind for single steps, whose end is waited for, and what it holds of the card's memory."""

    def __init__(
        self, kind: str, model: PreTrainedModel, data: Dataset, batch: int, length: int, held: int, **settings
    ):
        sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
        super().__init__(trainer_of(kind, model, data, length, **sizes, **settings))
        self.rows, self.size = list(self.trainer.train_dataset), batch
        self._before, self.held = held, allocated() - held

    def rows_of(self, number: int) -> list[dict]:
        """The pairs of a step, in turn."""
        start = number * self.size
        return [self.rows[(start + place) % len(self.rows)] for place in range(self.size)]

    def timed(self, number: int, precomputed: bool = True) -> tuple[float, int]:
        """Seconds of a step, and the bytes at its worst moment."""
        batch = self.batch(self.rows_of(number))
        synchronize()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        self.step(batch, precomputed)
        synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated() if CUDA else 0

    def score(self, dataset: Dataset, batch_size: int) -> float:
        synchronize()
        start = time.perf_counter()
        super().score(dataset, batch_size)
        synchronize()
        return time.perf_counter() - start

    def warm(self, numbers: range, precomputed: bool = True) -> int:
        """Take some steps first: trial and proof of the fast path, states of the optimizer, kernels that are looked for. Bytes at the
        worst moment."""
        before, peak = allocated(), 0
        for number in numbers:
            peak = max(peak, self.timed(number, precomputed)[1])
        self.held += allocated() - before
        return peak


def allocated() -> int:
    return torch.cuda.memory_allocated() if CUDA else 0


def free() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The length of the difference, relative to that of what is exact."""
    return float((found.float() - exact).norm() / exact.norm())
