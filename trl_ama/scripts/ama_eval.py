"""
# Loss, reward accuracy, margin and excess per task:
```bash
trl ama-eval --config recipes/quickstart/ama/config_lora.yaml
```

# The same, as a script:
```bash
accelerate launch trl_ama/scripts/ama_eval.py --config recipes/quickstart/ama/config_lora.yaml
```
"""

import argparse


def main(pipeline_args, training_args, model_args, task_args) -> None:
    """Evaluate the model of the output directory."""
    from trl_ama.scripts.common import run_stages

    run_stages(("eval",), pipeline_args, training_args, model_args, task_args)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """Return the parser of `trl ama-eval`."""
    from trl_ama.scripts import common

    return common.make_parser("ama-eval", subparsers, prog)


if __name__ == "__main__":
    from trl_ama.scripts.common import run_script

    run_script("ama-eval", make_parser, main)
