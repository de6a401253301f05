"""
# What a run will need, before a GPU is rented; reads the model's configuration and tokenizer, no weights:
```bash
trl ama-plan --config recipes/quickstart/ama/config_lora.yaml
```

# For another device and several processes, and everything as JSON:
```bash
trl ama-plan --config recipes/quickstart/ama/config_lora.yaml --device cuda --num_processes 4 --json plan.json
```
"""

import argparse
import os
from dataclasses import dataclass, field


@dataclass
class PlanArguments:
    r"""
    Arguments of `trl ama-plan` beside those of the recipe.

    Parameters:
        json (`str`, *optional*):
            File to write the plan to, as JSON; memory in bytes. `-` prints it in place of the text.
        device (`str`, *optional*):
            `"cuda"` or `"cpu"`: where the run is going to be. Defaults to the CPU if the recipe says `use_cpu`, else to a
            GPU, whether this machine has one or not.
    """

    json: str | None = field(
        default=None, metadata={"help": "File to write the plan to, as JSON; - prints it. Memory in bytes."}
    )
    device: str | None = field(
        default=None,
        metadata={
            "help": "Where the run is going to be: cuda or cpu. Defaults to cpu if the recipe says `use_cpu`, else to cuda."
        },
    )

    def __post_init__(self):
        from trl_ama.common.errors import AMAError

        if self.device not in (None, "cuda", "cpu"):
            raise AMAError(f"device must be 'cuda' or 'cpu', got '{self.device}'.")


def main(plan_args: PlanArguments, pipeline_args, training_args, model_args, task_args, launch_args=()) -> None:
    """Plan the run and print it."""
    from datasets import disable_progress_bars

    from trl_ama.plan.plan import make_plan
    from trl_ama.plan.text import render
    from trl_ama.recipe.settings import RunSettings
    from trl_ama.scripts.messages import show

    disable_progress_bars()
    processes, sharding = _launched(launch_args)
    settings = RunSettings(pipeline_args, training_args, model_args, task_args)
    device = plan_args.device or ("cpu" if training_args.use_cpu else "cuda")
    plan = make_plan(settings, device, processes, sharding)
    show(render(plan), plan_args.json, plan.to_dict())


def _launched(launch_args) -> tuple[int, str | None]:
    """How many processes `accelerate launch` would start, and what would spread the model over their devices, if anything."""
    import yaml
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_args([*launch_args, "script"])
    settings = {}
    if args.config_file:
        try:
            with open(args.config_file, encoding="utf-8") as file:
                settings = yaml.safe_load(file) or {}
        except (OSError, yaml.YAMLError):
            settings = {}
    processes = args.num_processes or settings.get("num_processes") or int(os.environ.get("WORLD_SIZE", "1"))
    kind = "DeepSpeed" if args.use_deepspeed else "FSDP" if args.use_fsdp else settings.get("distributed_type", "NO")
    return processes, str(kind) if str(kind).upper() in ("DEEPSPEED", "FSDP") else None


def run_here(launch_args: list[str], script_args: list[str]) -> int:
    """Run in the process of the command: a plan needs no `accelerate launch`, which wants the devices that are planned for."""
    from trl_ama.scripts.common import parse_arguments

    main(*parse_arguments(make_parser(), script_args), launch_args=launch_args)
    return 0


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """Return the parser of `trl ama-plan`."""
    from trl import ModelConfig

    from trl_ama.dpo.config import AMAConfig
    from trl_ama.recipe.arguments import PipelineArguments
    from trl_ama.scripts import COMMANDS
    from trl_ama.scripts.common import no_device_parser
    from trl_ama.tasks.config import TaskMixtureConfig

    dataclass_types = (PlanArguments, PipelineArguments, AMAConfig, ModelConfig, TaskMixtureConfig)
    if subparsers is not None:
        return subparsers.add_parser("ama-plan", help=COMMANDS["ama-plan"], dataclass_types=dataclass_types)
    return no_device_parser(dataclass_types, prog, forced=_planned_for_a_gpu)


def _planned_for_a_gpu(parsed) -> None:
    """The recipe did not ask for the CPU: only this machine did."""
    plan_args = next(part for part in parsed if isinstance(part, PlanArguments))
    plan_args.device = plan_args.device or "cuda"


if __name__ == "__main__":
    from trl_ama.scripts.common import run_script

    if int(os.environ.get("RANK", "0")) > 0:  # launched by hand: one process is enough
        raise SystemExit(0)
    run_script("ama-plan", make_parser, main)
