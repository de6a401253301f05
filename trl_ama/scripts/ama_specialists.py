"""
# One specialist per task:
```bash
trl ama-specialists --config recipes/quickstart/ama/config_lora.yaml
```

# The same, as a script:
```bash
accelerate launch trl_ama/scripts/ama_specialists.py --config recipes/quickstart/ama/config_lora.yaml
```
"""

import argparse


def main(pipeline_args, training_args, model_args, task_args) -> None:
    """Train or pull the specialists."""
    from trl_ama.scripts.common import run_stages

    run_stages(("specialists",), pipeline_args, training_args, model_args, task_args)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """Return the parser of `trl ama-specialists`."""
    from trl_ama.scripts import common

    return common.make_parser("ama-specialists", subparsers, prog)


if __name__ == "__main__":
    from trl_ama.scripts.common import run_script

    run_script("ama-specialists", make_parser, main)
