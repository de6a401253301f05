"""
# All stages, with LoRA:
```bash
trl ama --config recipes/quickstart/ama/config_lora.yaml
```

# The same, as a script, with a flag that overrides the file:
```bash
accelerate launch trl_ama/scripts/ama.py \
    --config recipes/quickstart/ama/config_lora.yaml \
    --learning_rate 5.0e-6
```
"""

import argparse


def main(pipeline_args, training_args, model_args, task_args) -> None:
    """Run all stages."""
    from trl_ama.scripts.common import run_stages

    run_stages(("specialists", "losses", "train", "eval"), pipeline_args, training_args, model_args, task_args)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """Return the parser of `trl ama`."""
    from trl_ama.scripts import common

    return common.make_parser("ama", subparsers, prog)


if __name__ == "__main__":
    from trl_ama.scripts.common import run_script

    run_script("ama", make_parser, main)
