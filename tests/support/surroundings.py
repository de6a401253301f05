"""The environment of a test, with a Hub of our own. Imported before any Hugging Face library, which read the environment then."""

import atexit
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hub_server import HubServer


# The Hugging Face libraries read the environment when they are imported, so all of this comes first
assert "huggingface_hub" not in sys.modules, "import surroundings before the libraries that read the environment"

# Nothing of the user's own setup may show in a test: no token, no caches, no offline mode, no other endpoint
_OWN = ("HF_", "HUGGING", "TRANSFORMERS_")


def _clean(environ: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith(_OWN)}


# A shell starts jobs in the background with Ctrl-C ignored, and what they start ignores it too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

for _name in set(os.environ) - set(_clean(dict(os.environ))):
    del os.environ[_name]
server = HubServer().start()
_home = tempfile.mkdtemp(prefix="trl_ama_tests_")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
HUB_ENVIRONMENT = {
    "HF_ENDPOINT": server.url,
    "HF_HOME": _home,
    # Xet uploads go to a server of their own, which cannot be replaced: LFS is used in its place
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
    # Two things that would go to other hosts
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}
os.environ.update(HUB_ENVIRONMENT)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A run brings every file that it finishes to the disk, which takes milliseconds each: tests write to memory, where it has room
_MEMORY = "/dev/shm"
with contextlib.suppress(OSError):
    if shutil.disk_usage(_MEMORY).free > 4 * 2**30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", _MEMORY)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def client_env(home: str | os.PathLike, token: str | None = None) -> dict[str, str]:
    """The environment of a process with an identity and caches of its own.

    A cache must not be shared between identities: what one of them has downloaded, the other one is given too.
    """
    environ = {**_clean(dict(os.environ)), **HUB_ENVIRONMENT, "HF_HOME": str(home)}
    return environ if token is None else {**environ, "HF_TOKEN": token}


def forget_downloads() -> None:
    """Empties what this process has cached of the Hub: repositories of earlier tests had the same names."""
    from huggingface_hub import HfFileSystem

    HfFileSystem.clear_instance_cache()
    shutil.rmtree(Path(_home, "hub"), ignore_errors=True)
    for path in Path(_home, "datasets").glob("*___*"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def logged_in() -> Iterator[HubServer]:
    """An empty Hub, this process logged in as `alice`: as the fixture `hub`, for what tests share."""
    before = os.environ.get("HF_TOKEN")
    server.reset()
    forget_downloads()
    os.environ["HF_TOKEN"] = server.WRITE_TOKEN
    try:
        yield server
    finally:
        server.reset()
        os.environ.pop("HF_TOKEN")
        os.environ.update({} if before is None else {"HF_TOKEN": before})
