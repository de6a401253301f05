"""
# The reference losses of specialists that `trl ama-specialists` has left in the output directory:
```bash
trl ama-losses --config recipes/quickstart/ama/config_lora.yaml
```

# The same, as a script:
```bash
accelerate launch trl_ama/scripts/ama_losses.py --config recipes/quickstart/ama/config_lora.yaml
```
"""

import argparse


def main(pipeline_args, training_args, model_args, task_args) -> None:
    """Compute the reference losses."""
    from trl_ama.scripts.common import run_stages

    run_stages(("losses",), pipeline_args, training_args, model_args, task_args)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """Return the parser of `trl ama-losses`."""
    from trl_ama.scripts import common

    return common.make_parser("ama-losses", subparsers, prog)


if __name__ == "__main__":
    from trl_ama.scripts.common import run_script

    run_script("ama-losses", make_parser, main)
