import datetime
from dataclasses import dataclass, field
from typing import Any

from ..common.errors import AMAError, short
from ..common.yaml_files import load_yaml
from ..mixing import check_strategy_name
from ..tasks.config import check_config_name


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
            Whether the reference-loss dataset holds the pairs' texts and images, or only their ids and numbers.
        template_date (`str`, *optional*):
            The date, e.g. `2025-07-08`, that a chat template writes into prompts where it would write today's. Without it, the
            prompts of such a model are other tokens every day. Saved models ask for the day again.
        reference_losses (`str`, *optional*):
            Ready reference losses (Hub dataset with an optional `@revision`, or local folder). The tasks that they hold need
            no specialist and are not scored again; a task without a `path` takes its pairs from them, and without `tasks` the
            run has all of theirs.
        losses_config (`str`, *optional*):
            Config (run) within a dataset of reference losses, to pull from and to push to. Defaults to `"default"`, or the
            only one that there is to pull from.
        only_tasks (`list[str]`, *optional*):
            Tasks whose specialists and reference losses this command makes, leaving the others to other commands: for jobs
            side by side, which share an output folder. `trl ama` then ends after these reference losses; without it,
            it goes on when those of all tasks are there, and makes those that are missing.
        hub_specialist_id (`str`, *optional*):
            With `push_to_hub`: repositories of the specialists, with `{task}` for the task's name. Defaults to
            `<hub_model_id>-{task}`.
        hub_losses_id (`str`, *optional*):
            With `push_to_hub`: dataset repository of the reference losses. Defaults to `<hub_model_id>-reference-losses`.
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
        metadata={
            "help": "Whether the reference-loss dataset holds the pairs' texts and images, or only ids and numbers."
        },
    )
    template_date: str | None = field(
        default=None,
        metadata={"help": "Date (YYYY-MM-DD) that a chat template writes in place of today's."},
    )
    reference_losses: str | None = field(
        default=None,
        metadata={"help": "Ready reference losses: a Hub dataset (`org/losses@revision`) or a local folder."},
    )
    losses_config: str | None = field(
        default=None,
        metadata={"help": "Config (run) within a dataset of reference losses, to pull from and to push to."},
    )
    only_tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Tasks whose specialists and reference losses this command makes, leaving the others to other commands."
        },
    )
    hub_specialist_id: str | None = field(
        default=None,
        metadata={
            "help": "With push_to_hub: repositories of the specialists, e.g. `org/my-{task}`. Defaults to "
            "`<hub_model_id>-{task}`."
        },
    )
    hub_losses_id: str | None = field(
        default=None,
        metadata={
            "help": "With push_to_hub: dataset repository of the reference losses. Defaults to "
            "`<hub_model_id>-reference-losses`."
        },
    )

    def __post_init__(self):
        if isinstance(self.specialist_args, str):
            self.specialist_args = load_yaml(self.specialist_args, "specialist_args")
        self.specialist_args = self.specialist_args or {}
        if not isinstance(self.specialist_args, dict):
            raise AMAError(
                f"specialist_args must be a mapping of training arguments, got {short(self.specialist_args)}."
            )
        if isinstance(self.compare, str):
            self.compare = [self.compare]
        for name in self.compare:
            check_strategy_name(name)
        if isinstance(self.only_tasks, str):
            self.only_tasks = [self.only_tasks]
        if self.hub_specialist_id is not None and "{task}" not in self.hub_specialist_id:
            raise AMAError(
                f"hub_specialist_id is '{self.hub_specialist_id}', and every specialist would go to that one repository. Put "
                "{task} into it, e.g. '" + self.hub_specialist_id + "-{task}'."
            )
        if isinstance(self.template_date, datetime.date):  # as YAML reads it without quotes
            self.template_date = self.template_date.strftime("%Y-%m-%d")
        if self.template_date is not None:
            try:
                datetime.date.fromisoformat(self.template_date)
            except ValueError as error:
                raise AMAError(f"template_date must be a day like 2025-07-08, got {self.template_date!r}.") from error
        if self.losses_config is not None:
            check_config_name(self.losses_config)
