from dataclasses import dataclass, field
from typing import Any

from .errors import AMAError
from .mixing import check_strategy_name


@dataclass
class PipelineArguments:
    r"""
    Arguments of `trl ama` beside those of the trainer, the model and the tasks.

    Parameters:
        compare (`list[str]`, *optional*):
            Other mixing strategies to train for the result table, from the same reference losses, e.g.
            `[proportional, uniform]`.
        specialist_args (`dict`, *optional*):
            Training arguments of the specialists where they differ from the generalist's, e.g. `{max_steps: 100}`. A
            task's own `specialist_args` come on top.
        include_text (`bool`, *optional*, defaults to `True`):
            Whether the reference-loss dataset holds the pairs' texts, or only their ids and numbers.
    """

    compare: list[str] = field(
        default_factory=list,
        metadata={"help": "Other mixing strategies to train for the result table."},
    )
    specialist_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Training arguments of the specialists where they differ from the generalist's."},
    )
    include_text: bool = field(
        default=True,
        metadata={"help": "Whether the reference-loss dataset holds the pairs' texts, or only ids and numbers."},
    )

    def __post_init__(self):
        if isinstance(self.specialist_args, str):
            import yaml

            self.specialist_args = yaml.safe_load(self.specialist_args)
        self.specialist_args = self.specialist_args or {}
        if not isinstance(self.specialist_args, dict):
            raise AMAError(f"specialist_args must be a mapping of training arguments, got {self.specialist_args!r}.")
        if isinstance(self.compare, str):
            self.compare = [self.compare]
        for name in self.compare:
            check_strategy_name(name)
