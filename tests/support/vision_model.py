"""A tiny Llava-like model with its processor, made in process, and preference pairs about images of one colour."""

import numpy as np
import pytest
from tiny_models import CHAT_TEMPLATE, make_config, save
from tiny_pairs import WORDS


COLOURS = {"apple": (220, 30, 30), "river": (30, 60, 220), "grape": (120, 30, 160), "lemon": (230, 220, 40)}
IMAGE_TOKENS = 4  # of an image of 16 by 16 pixels, in patches of 8
# As tiny_models', for content in parts
_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}",
)


def make_processor(tokenizer):
    """A `LlavaProcessor` on a copy of a tokenizer."""
    import copy

    import transformers

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    # Without torchvision there is a class of this name that runs on Pillow
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return transformers.LlavaProcessor(
        image_processor=kind(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def make_vision_model(processor, seed: int = 0):
    """A random Llava with a language model of about 20,000 parameters."""
    import torch
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
        initializer_range=0.2,
        initializer_factor=3.0,
    )
    text = make_config(len(processor.tokenizer), tie_word_embeddings=False)
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=token, vision_feature_layer=-1)
    config.initializer_range = 0.2
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = 1
    return model


def make_image(name: str, seed: int = 0):
    """An image of a colour, not two of which are quite the same."""
    from PIL import Image

    noise = np.random.default_rng([seed, sum(map(ord, name))]).integers(-20, 20, size=(20, 20, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8))


def make_vision_rows(task: str, count: int, seed: int = 0, parts: bool = False, column: str = "images") -> list[dict]:
    """Preference pairs about an image: the right word comes first (`name`) or last (`end`).

    Args:
        task (`str`): `name` or `end`.
        count, seed (`int`): How many, and which.
        parts (`bool`): Whether the prompt says where the image goes, with a part `{type: image}`.
        column (`str`): `images` (a list) or `image`.
    """
    rng = np.random.default_rng([seed, sum(map(ord, task))])
    rows = []
    for number in range(count):
        colour, other = (str(word) for word in rng.choice(list(COLOURS), size=2, replace=False))
        word = str(rng.choice(WORDS))
        text = f"{'list' if task == 'name' else 'sort'} {word}"
        right, wrong = (f"{colour} {word}", f"{other} {word} {word}")
        if task == "end":
            right, wrong = (f"{word} {colour}", f"{word} {word} {other}")
        image = make_image(colour, seed=1000 * seed + number)
        content = [{"type": "image", "text": None}, {"type": "text", "text": text}] if parts else text
        rows.append(
            {
                "prompt": [{"role": "user", "content": content}],
                "chosen": [{"role": "assistant", "content": _content(right, parts)}],
                "rejected": [{"role": "assistant", "content": _content(wrong, parts)}],
                column: [image] if column == "images" else image,
            }
        )
    return rows


def _content(text: str, parts: bool) -> "str | list[dict]":
    return [{"type": "text", "text": text}] if parts else text


@pytest.fixture(name="processor", scope="module")
def processor_fixture(tokenizer):
    return make_processor(tokenizer)


@pytest.fixture(name="vision_dir", scope="module")
def vision_dir_fixture(processor, tmp_path_factory):
    """A saved tiny vision-language model with its processor."""
    path = tmp_path_factory.mktemp("llava")
    return save(make_vision_model(processor), processor, path)


def trl_logps(trainer, model, rows) -> np.ndarray:
    """What TRL's own `compute_ref_log_probs` gives for raw rows under a model, a pair at a time. # (N, 2)"""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model.get_base_model() if hasattr(model, "get_base_model") else model)
    model.eval()
    found = []
    for row in range(len(rows)):
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row]]))
        found.append([side.item() for side in trainer.compute_ref_log_probs(model, batch)])
    return np.array(found)
