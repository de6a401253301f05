"""Chat templates that write today's date: without a fixed one the same pairs are other tokens tomorrow.

A fingerprint holds the template's text, which is the same every day, so losses of one day would pass for those of another.
"""

import datetime
import json
import re
from pathlib import Path

from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

from ..common.errors import AMAError


_CALL = re.compile(
    r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)"""
)  # transformers gives templates this function, and no other clock


def asks_for_the_day(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> bool:
    """Whether the chat template writes today's date into the prompt, or may do so."""
    return any("strftime_now(" in template for template in _templates(tokenizer).values())


def fix_date(tokenizer: PreTrainedTokenizerBase | ProcessorMixin, date: str) -> bool:
    """Let a tokenizer's chat template write `date` in place of today's; in place.

    Args:
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`): Its template may ask for the day, or not.
        date (`str`): As `2025-07-08`.

    Returns:
        Whether that changed anything.

    Raises:
        AMAError: If the template asks in a way that is not understood.
    """
    if not asks_for_the_day(tokenizer):
        return False
    day = datetime.date.fromisoformat(date)
    fixed = {
        name: _CALL.sub(lambda call: json.dumps(day.strftime(call[2]), ensure_ascii=False), template)
        for name, template in _templates(tokenizer).items()
    }
    if any("strftime_now(" in template for template in fixed.values()):
        name = getattr(tokenizer, "tokenizer", tokenizer).name_or_path
        raise AMAError(
            f"The chat template of '{name}' asks for the date in a way that template_date cannot answer. Save a "
            "copy of the model with a date in its template, and leave template_date out."
        )
    tokenizer.chat_template = fixed if isinstance(tokenizer.chat_template, dict) else fixed[""]
    return True


def _templates(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> dict[str, str]:
    template = tokenizer.chat_template
    return template if isinstance(template, dict) else {"": template or ""}


def restore_template(folder: Path, template: str | dict[str, str]) -> None:
    """Give the tokenizer saved in `folder` the template that asks for the day: the date was for training, not for use."""
    tokenizer = AutoProcessor.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
