"""What makes tokens of a model's pairs, and pixels of their images, as `DPOTrainer` loads it."""

from pathlib import Path

from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from ..common.errors import AMAError, sentence
from .objects import check_is_model


def load_processor(
    model_name: str, revision: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """A base model's tokenizer, or the processor of a model that takes images, too; with a pad token.

    Raises:
        AMAError: If it cannot be read, or is an adapter.
    """
    if model_name.startswith((".", "/", "~")) and not Path(model_name).is_dir():
        raise AMAError(f"There is no folder '{model_name}'. Check model_name_or_path.")
    check_is_model(model_name)
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        # It may bring code of its own too, and what is refused should be so before anything is trained
        config = AutoConfig.from_pretrained(model_name, **source)
        # DPOTrainer always asks for the processor, which a text model does not have
        kind = AutoTokenizer if config.get_text_config() is config else AutoProcessor
        processor = kind.from_pretrained(model_name, **source)
    except (OSError, ValueError) as error:
        check_is_model(model_name, revision, error)
        raise AMAError(
            f"The base model '{model_name}' cannot be read: {sentence(error)} Check model_name_or_path, or your network."
        ) from error
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor
