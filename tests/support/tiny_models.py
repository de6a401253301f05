"""Tiny models and tokenizers, made in process."""

import torch
from peft import LoraConfig
from tiny_pairs import WORDS


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Shows all that a template can read of a message: each key, nulls, and their order
WHOLE_TEMPLATE = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% if style %}[{{ style }}]{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message | tojson }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


# Of every tiny model: a step takes milliseconds
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


def make_tokenizer(words=("<user>", "<assistant>", "list", "sort", "brief", *WORDS), chat_template=CHAT_TEMPLATE):
    """A tokenizer of words between white space, each of which is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    fast.chat_template = chat_template
    return fast


def make_config(vocab_size: int, **changes):
    """The configuration of such a model."""
    from transformers import LlamaConfig

    known = {"max_position_embeddings": 512, "initializer_range": 0.2, "tie_word_embeddings": True}
    return LlamaConfig(vocab_size=vocab_size, **{**SIZES, **SPECIAL, **known, **changes})


def make_model(vocab_size: int, seed: int = 0, **changes):
    """A random Llama of about 20,000 parameters."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(make_config(vocab_size, **changes))


def save(model, tokenizer, folder) -> str:
    """Save a model with its tokenizer, or processor. Returns the folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_letters():
    """A tokenizer to which no text is unknown, with a template that hides nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<pad>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.chat_template = WHOLE_TEMPLATE
    return fast


def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
