"""Environments that have nothing but what a test puts into them, to see what an installed package does there."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


HOOK = ("trl_ama_register.pth", "trl_ama_register.py", "trl_ama_register.start")
# As pip writes it for `trl = trl.cli:main`
TRL = "#!{python}\nimport sys\nfrom trl.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


class Environment:
    """A bare environment; `borrow` puts the packages of the running one on its path, without their `.pth` files."""

    def __init__(self, path: Path, borrow: bool = True):
        venv.create(path, with_pip=False, symlinks=True)
        self.python = str(path / "bin" / "python")
        self.trl = path / "bin" / "trl"
        self.site_packages = next((path / "lib").glob("python*/site-packages"))
        self.path = path
        if borrow:
            (self.site_packages / "zz_borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
            self.trl.write_text(TRL.format(python=self.python))
            self.trl.chmod(0o755)

    def run(self, *args: str | Path, **environ: str) -> subprocess.CompletedProcess:
        """Run python away from the repository, so that only what is installed is found."""
        return self.execute(self.python, *args, **environ)

    def execute(self, *command: str | Path, **environ: str) -> subprocess.CompletedProcess:
        """Run a program."""
        dropped = ("PYTHONPATH", "TRL_AMA_NO_HOOK")
        env = {key: value for key, value in os.environ.items() if key not in dropped} | environ
        return subprocess.run(
            [str(word) for word in command], cwd=self.path, env=env, capture_output=True, text=True, timeout=60
        )

    def pip(self, *args: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.python, *args]
        result = subprocess.run(command, cwd=self.path, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr

    def install(self, *what: str) -> None:
        self.pip("install", "-q", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", *what)

    def trl_commands(self, *command: str | Path, **environ: str) -> list[str]:
        """The commands that `trl --help` lists, or that `command` does in its place."""
        result = self.execute(*(command or (self.trl,)), "--help", **environ)
        assert result.returncode == 0, result.stderr
        names = result.stdout[result.stdout.index("{") + 1 : result.stdout.index("}")]
        return names.split(",")
