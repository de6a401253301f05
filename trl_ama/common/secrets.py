"""What nobody else may read: settings that hold a secret, and texts without the tokens and paths in them."""

import re
from pathlib import Path

from huggingface_hub import get_token


_PRIVATE = re.compile(r"(?i)(^|_)(token|secret|password|passwd|api_key|apikey|credentials?)$|secret|password|api_key")
_NO_SECRETS = re.compile(r"(pad|eos|bos|unk|sep|cls|mask|image|stop)_token")
# Secrets within a value: tokens of the Hub, and what addresses may carry
_SECRETS = (
    (re.compile(r"\bhf_\w{16,}"), "hf_…"),
    (re.compile(r"(?<=://)[^/\s@]+@"), ""),
    (re.compile(r"(?<=://)([^\s?#]*)[?#]\S*"), r"\1"),  # a query may sign or name anybody
)


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret, as `hub_token` does and `pad_token` does not."""
    return bool(_PRIVATE.search(name)) and not _NO_SECRETS.fullmatch(name)


def public_name(path: str) -> str:
    """A file's or folder's name without the way to it, or an address without what may be secret in it."""
    text = without_secrets(str(path))
    return text if "://" in text else Path(text).name


def without_secrets(text: str, token: str | None = None) -> str:
    """`text` without `token`, other tokens of the Hub, and what addresses may carry."""
    text = redact(text, token)
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def redact(text: str, token: str | None = None) -> str:
    """`text` without the token, whoever put it there."""
    for secret in (token, get_token()):
        if secret:
            text = text.replace(secret, "hf_…")
    return text
