"""`python -m trl_ama` is the `trl-ama` command."""

from trl_ama.cli import main


if __name__ == "__main__":
    raise SystemExit(main())
