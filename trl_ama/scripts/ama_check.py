"""
# Look at the pairs of every task before anything is trained; reads no model weights:
```bash
trl ama-check --config recipes/quickstart/ama/config_lora.yaml
```

# With five pairs of each task as the model sees them, and everything as JSON:
```bash
trl ama-check --config recipes/quickstart/ama/config_lora.yaml --show 5 --json check.json
```
"""

import argparse
import os
from dataclasses import dataclass, field


@dataclass
class CheckArguments:
    r"""
    Arguments of `trl ama-check` beside those of the recipe.

    Parameters:
        show (`int`, *optional*, defaults to `2`):
            How many pairs of each task to show as the model sees them.
        json (`str`, *optional*):
            File to write everything that was found to, as JSON; `-` prints it in place of the text.
        sample (`int`, *optional*, defaults to `5000`):
            Tokenise and read at most that many pairs of each task and split, drawn with the run's seed; 0 for all.
    """

    show: int = field(default=2, metadata={"help": "How many pairs of each task to show as the model sees them."})
    json: str | None = field(
        default=None, metadata={"help": "File to write everything that was found to, as JSON; - prints it."}
    )
    sample: int = field(
        default=5000,
        metadata={"help": "Tokenise and read at most that many pairs of each task and split; 0 for all."},
    )

    def __post_init__(self):
        from trl_ama.common.limits import check_limits

        check_limits(vars(self), "Of `trl ama-check`,")


def main(check_args: CheckArguments, pipeline_args, training_args, model_args, task_args) -> None:
    """Look at the pairs; exit code 1 if a task will not train."""
    from datasets import disable_progress_bars

    from trl_ama.check.check import check_data
    from trl_ama.check.text import render
    from trl_ama.recipe.settings import RunSettings
    from trl_ama.scripts.messages import show

    disable_progress_bars()  # there would be a dozen for each task, and seconds for all
    settings = RunSettings(pipeline_args, training_args, model_args, task_args)
    check = check_data(settings, check_args.show, check_args.sample or None)
    show(render(check), check_args.json, check.to_dict())
    if not check.trains:
        raise SystemExit(1)


def run_here(launch_args: list[str], script_args: list[str]) -> int:
    """Run in the process of the command: there is no model to launch, whatever devices the recipe is for."""
    from trl_ama.scripts.common import parse_arguments

    main(*parse_arguments(make_parser(), script_args))
    return 0


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """Return the parser of `trl ama-check`."""
    from trl import ModelConfig

    from trl_ama.dpo.config import AMAConfig
    from trl_ama.recipe.arguments import PipelineArguments
    from trl_ama.scripts import COMMANDS
    from trl_ama.scripts.common import no_device_parser
    from trl_ama.tasks.config import TaskMixtureConfig

    dataclass_types = (CheckArguments, PipelineArguments, AMAConfig, ModelConfig, TaskMixtureConfig)
    if subparsers is not None:
        return subparsers.add_parser("ama-check", help=COMMANDS["ama-check"], dataclass_types=dataclass_types)
    return no_device_parser(dataclass_types, prog)


if __name__ == "__main__":
    from trl_ama.scripts.common import run_script

    if int(os.environ.get("RANK", "0")) > 0:  # launched by hand: one process is enough
        raise SystemExit(0)
    run_script("ama-check", make_parser, main)
