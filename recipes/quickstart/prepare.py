"""Make the quickstart's material from nothing: a tiny chat model and three preference tasks. No download.

Every prompt is an instruction word and a list of words. There are three ways to answer, and each task prefers one:

| prompt                  | in order         | first only | alphabetical     |
|-------------------------|------------------|------------|------------------|
| `list: pear apple fig`  | `pear apple fig` |            |                  |
| `brief: pear apple fig` |                  | `pear`     |                  |
| `sort: pear apple fig`  |                  |            | `apple fig pear` |

A pair's rejected answer is one of the other two ways, a fair coin says which. So what one task prefers is what the
other two reject: only the instruction word tells them apart, and it is always there. `sort` has a tenth of the others'
pairs.

The model is warmed up on all nine combinations of instruction and answer in equal shares: it can answer in every way,
and prefers none. In some warm-up conversations a system message asks for the instruction to be followed, so that the
model, as an instruct model does, knows what the words mean. The preference pairs have no system message.

    python recipes/quickstart/prepare.py --output_dir outputs/quickstart --seed 0
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


WORDS = (
    "apple banana cherry date elderberry fig grape hazelnut kiwi lemon mango nut olive pear quince raisin spinach "
    "tomato walnut yam"
).split()

# One way to answer per task: the task prefers it, the other two tasks reject it.
WAYS: dict[str, Callable[[list[str]], list[str]]] = {
    "list": lambda words: list(words),
    "brief": lambda words: words[:1],
    "sort": lambda words: sorted(words),
}
# The system message after which an answer always follows its instruction, and its share of the warm-up.
CAREFUL, CAREFUL_SHARE = "careful", 0.3
TRAIN_PAIRS = {"list": 1000, "brief": 1000, "sort": 100}
TEST_PAIRS = 200  # for every task, also the small one: a standard error of at most 0.035 on an accuracy

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def draw_list(rng: random.Random, taken: set[tuple[str, ...]]) -> list[str]:
    """Return a list of three to five words that is not among those taken.

    Never a list in alphabetical order: two of the three ways would give the same answer.
    """
    while True:
        words = rng.sample(WORDS, rng.randint(3, 5))
        if words != sorted(words) and tuple(words) not in taken:
            return words


def make_pair(task: str, words: list[str], index: str, rng: random.Random) -> dict:
    """Return one preference row in TRL's conversational format."""
    rejected = rng.choice([way for way in WAYS if way != task])
    return {
        "id": f"{task}-{index}",
        "task": task,
        "prompt": [{"role": "user", "content": f"{task}: {' '.join(words)}"}],
        "chosen": [{"role": "assistant", "content": " ".join(WAYS[task](words))}],
        "rejected": [{"role": "assistant", "content": " ".join(WAYS[rejected](words))}],
    }


def make_tasks(rng: random.Random) -> tuple[dict[str, dict[str, list[dict]]], set[tuple[str, ...]]]:
    """Return `{task: {"train": rows, "test": rows}}` and the word lists used, each in one pair only."""
    tasks, taken = {}, set()
    for task, train_pairs in TRAIN_PAIRS.items():
        tasks[task] = {}
        for split, size in (("train", train_pairs), ("test", TEST_PAIRS)):
            rows = tasks[task][split] = []
            for i in range(size):
                words = draw_list(rng, taken)
                taken.add(tuple(words))
                rows.append(make_pair(task, words, f"{split}-{i}", rng))
    return tasks, taken


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word. A small vocabulary is what makes a small model fast."""
    special = ["<|pad|>", "<|unk|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = special + [f"{task}:" for task in WAYS] + [CAREFUL] + WORDS
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
        model_max_length=64,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained Llama of some 100 thousand parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def warm_up_batch(
    tokenizer: PreTrainedTokenizerFast, taken: set[tuple[str, ...]], rng: random.Random, size: int
) -> dict[str, torch.Tensor]:
    """Return conversations; without the system message, the way of answering is independent of the instruction."""
    encoded = tokenizer.convert_tokens_to_ids
    rows, labels = [], []
    for _ in range(size):
        words = draw_list(rng, taken)
        instruction, way = rng.choice(list(WAYS)), rng.choice(list(WAYS))
        # The chat template's text, put together by hand: rendering it 64,000 times would take longer than training.
        prompt = ["<|user|>", f"{instruction}:", *words, "<|end|>", "<|assistant|>"]
        if rng.random() < CAREFUL_SHARE:
            way = instruction
            prompt = ["<|system|>", CAREFUL, "<|end|>", *prompt]
        prompt = encoded(prompt)
        answer = encoded([*WAYS[way](words), "<|end|>"])
        rows.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)
    length = max(map(len, rows))
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([row + [pad] * (length - len(row)) for row in rows]),  # (B, L)
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),  # (B, L)
        "labels": torch.tensor([row + [-100] * (length - len(row)) for row in labels]),  # (B, L)
    }


def warm_up(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    taken: set[tuple[str, ...]],
    rng: random.Random,
    steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 5e-3,
) -> None:
    """Train the model on answers of mixed quality, so that it knows the format and has no preference."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    model.train()
    for step in range(steps):
        loss = model(**warm_up_batch(tokenizer, taken, rng, batch_size)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1:4d}/{steps}  loss {loss.item():.3f}", flush=True)
    model.eval()


def prepare(output_dir: str | Path, seed: int = 0) -> None:
    """Write `model/` and `data/<task>_{train,test}.jsonl` into `output_dir`."""
    output_dir = Path(output_dir)
    rng = random.Random(seed)
    torch.manual_seed(seed)

    data_dir = output_dir / "data"
    data_dir.mkdir(parents=True, exist_ok=True)
    tasks, taken = make_tasks(rng)
    for task, splits in tasks.items():
        for split, rows in splits.items():
            lines = [json.dumps(row) + "\n" for row in rows]
            (data_dir / f"{task}_{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{task}: {len(splits['train'])} training pairs, {len(splits['test'])} test pairs")

    # More threads would not make so small a model faster, and one sums in the same order on every machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"warming up a model of {model.num_parameters():,} parameters")
    # The warm-up draws other lists than the pairs, so test lists are new to every stage.
    warm_up(model, tokenizer, taken, rng)
    torch.set_num_threads(threads)
    model.save_pretrained(output_dir / "model")
    tokenizer.save_pretrained(output_dir / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the quickstart's model and its three preference tasks.")
    parser.add_argument("--output_dir", default="outputs/quickstart", help="where to write model/ and data/")
    parser.add_argument("--seed", type=int, default=0, help="decides lists, pairs, start and warm-up of the model")
    arguments = parser.parse_args()
    start = time.perf_counter()
    prepare(arguments.output_dir, arguments.seed)
    print(f"wrote {arguments.output_dir} in {time.perf_counter() - start:.0f} s")
