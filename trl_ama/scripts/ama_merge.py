"""
# The generalist of a run, as a full checkpoint:
```bash
trl ama-merge --config recipes/quickstart/ama/config_lora.yaml --output merged
```

# Any adapter, on the base that it names:
```bash
trl ama-merge --adapter outputs/mine/specialists/code --output merged
```
"""

import argparse
import os
from dataclasses import dataclass, field


@dataclass
class MergeArguments:
    r"""
    Arguments of `trl ama-merge` beside those of the recipe, or of the model.

    Parameters:
        output (`str`):
            Folder to write the checkpoint to.
        adapter (`str`, *optional*):
            Adapter folder, Hub id with an optional `@revision`, or the mixing strategy of one of the run's generalists. Defaults to the
            recipe's generalist.
        into (`str`, *optional*):
            `"base"`: the base as it is saved. `"dequantized"`: the weights of the quantised base that the adapter was trained
            on; the default for such an adapter.
        save_dtype (`str`, *optional*, defaults to `"auto"`):
            `"bfloat16"`, `"float16"`, `"float32"`, or `"auto"` for the base checkpoint's, unless that rounds much of the adapter
            away.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace what an earlier merge wrote to `output`.
    """

    output: str = field(default="", metadata={"help": "Folder to write the checkpoint to."})
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Adapter folder, Hub id with an optional @revision, or the mixing strategy of one of the run's generalists. "
            "Defaults to the recipe's generalist."
        },
    )
    into: str | None = field(
        default=None,
        metadata={
            "help": "base: the base as it is saved. dequantized: the weights of the quantised base that the adapter was trained "
            "on; the default for such an adapter."
        },
    )
    save_dtype: str = field(
        default="auto", metadata={"help": "bfloat16, float16, float32, or auto for the base checkpoint's."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Whether to replace what an earlier merge wrote to the folder."}
    )

    def __post_init__(self):
        from trl_ama.common.errors import AMAError

        if not self.output:
            raise AMAError("--output is missing: the folder to write the checkpoint to.")


def main(merge_args: MergeArguments, pipeline_args, training_args, model_args, task_args) -> None:
    """Merge, and say what was done."""
    from trl_ama.common.errors import AMAError
    from trl_ama.merge.card import difference, explanation, rounding
    from trl_ama.merge.merge import merge_adapter, training_from
    from trl_ama.mixing import STRATEGIES

    adapter = merge_args.adapter
    if adapter is None and model_args.model_name_or_path is None:
        raise AMAError("There is nothing to merge. Name a recipe with --config, or an adapter with --adapter.")
    strategy = adapter in STRATEGIES and model_args.model_name_or_path is not None and not os.path.exists(adapter)
    if adapter is None or strategy:
        adapter = _generalist(adapter, pipeline_args, training_args, model_args, task_args)
    note = merge_adapter(
        adapter,
        merge_args.output,
        base_model=model_args.model_name_or_path,
        base_revision=model_args.model_revision if model_args.model_name_or_path else None,
        training=training_from(vars(model_args)),
        into=merge_args.into,
        save_dtype=merge_args.save_dtype,
        overwrite=merge_args.overwrite,
        trust_remote_code=training_args.trust_remote_code,
    )
    where = "the dequantised base" if note["into"] == "dequantized" else "the base as it is saved"
    print(f"Merged:     {adapter} (trained on a base: {note['trained_on']})")
    print(f"Into:       {where}, {note['base_model']}")
    print(f"Difference: {difference(note)}, from the adapter on the same weights")
    print(rounding(note))
    print(explanation(note))
    print(f"Checkpoint: {merge_args.output} ({note['parameters']:,} parameters in {note['dtype']})", flush=True)


def _generalist(strategy: str | None, pipeline_args, training_args, model_args, task_args) -> str:
    """The folder of the run's generalist."""
    from trl_ama.common.errors import AMAError
    from trl_ama.common.run_folder import STAGE_FILE
    from trl_ama.recipe.settings import RunSettings

    strategy = strategy or training_args.mixing
    folder = RunSettings(pipeline_args, training_args, model_args, task_args).folder.generalist(strategy)
    if not (folder / STAGE_FILE).is_file():
        found = sorted(path.parent.name for path in folder.parent.glob(f"*/{STAGE_FILE}"))
        raise AMAError(
            f"There is no generalist '{strategy}' in '{folder.parent}'; found {found}. Run `trl ama --config …` first, with it in "
            "`mixing` or `compare`, or name an adapter with --adapter."
        )
    if not model_args.use_peft:
        raise AMAError(
            f"The recipe trains the model itself (use_peft is not set), so '{folder}' is a full checkpoint already."
        )
    return str(folder)


def run_here(launch_args: list[str], script_args: list[str]) -> int:
    """Run in the process of the command: one process merges, mostly on its CPU."""
    from trl_ama.scripts.common import parse_arguments

    main(*parse_arguments(make_parser(), script_args))
    return 0


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """Return the parser of `trl ama-merge`."""
    from trl import ModelConfig, TrlParser

    from trl_ama.dpo.config import AMAConfig
    from trl_ama.recipe.arguments import PipelineArguments
    from trl_ama.scripts import COMMANDS
    from trl_ama.tasks.config import TaskMixtureConfig

    class Parser(TrlParser):
        """Reads recipes for a GPU on a machine that has none, where their precision would be refused."""

        def parse_args_and_config(self, args=None, **kwargs):
            import sys

            from torch import cuda

            args = list(sys.argv[1:] if args is None else args)
            given = any(arg.partition("=")[0] == "--use_cpu" for arg in args)
            return super().parse_args_and_config(
                args if given or cuda.is_available() else [*args, "--use_cpu"], **kwargs
            )

    dataclass_types = (MergeArguments, PipelineArguments, AMAConfig, ModelConfig, TaskMixtureConfig)
    if subparsers is not None:
        return subparsers.add_parser("ama-merge", help=COMMANDS["ama-merge"], dataclass_types=dataclass_types)
    return Parser(dataclass_types, prog=prog)


if __name__ == "__main__":
    from trl_ama.scripts.common import run_script

    if int(os.environ.get("RANK", "0")) > 0:  # launched by hand: one process is enough
        raise SystemExit(0)
    run_script("ama-merge", make_parser, main)
