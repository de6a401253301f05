"""What a run reads before it makes anything, each loaded when it is first asked for."""

from functools import cached_property
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import get_peft_config

from ..common.arrays import numpy_column
from ..common.errors import AMAError
from ..common.hub import is_commit, is_hub_id
from ..common.others_errors import told
from ..common.secrets import public_name
from ..policies.identity import model_identity, tokenizer_identity
from ..policies.processors import load_processor
from ..reference_losses.dataset import ReferenceLosses
from ..reference_losses.files import TaskLosses
from ..reference_losses.loading import load_some_of
from ..tasks.account import RowAccount
from ..tasks.forms import EXTRA_COLUMNS, PAIR_COLUMNS
from ..tasks.images import has_images
from ..tasks.loading import LoadedTasks, fits_into, read_tasks
from ..tasks.pairs import PAIR_ID_COLUMN, TASK_COLUMN
from ..tasks.template_date import fix_date, restore_template
from .recipe import Recipe


class RunInputs:
    """The base model's tokenizer and identity, the pairs and the ready reference losses that a recipe names.

    Args:
        recipe ([`Recipe`]): What names them.

    Raises:
        AMAError: From any property, if they cannot be loaded or do not fit together.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        # Reference losses that were made here, each with the state of its files, so that no stage reads them anew
        self.losses_read: dict[str, tuple[list, TaskLosses]] = {}
        self._pairs_of: dict[tuple[str, str], Dataset | None] = {}  # task and split, which every stage asks for again

    # ---- The base model ----

    @cached_property
    def base_identity(self) -> str:
        """The base model's weights by name and hash or commit."""
        return model_identity(self.recipe.model_name, self.recipe.model_args.model_revision)

    def peft_config(self) -> PeftConfig | None:
        """A fresh PEFT configuration, which notes the base model's commit; `None` for full fine-tuning."""
        with told("The adapter cannot be made", "the lora_* keys"):
            config = get_peft_config(self.recipe.model_args)
        commit = self.base_identity.partition("@")[2]
        if config is not None and is_commit(commit):
            config.revision = commit
        return config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer: `processor`, or what that has."""
        return getattr(self.processor, "tokenizer", self.processor)

    @cached_property
    def processor(self) -> PreTrainedTokenizerBase | ProcessorMixin:
        """What prepares the pairs, as DPOTrainer loads and completes it, with the recipe's `template_date`: the base model's
        tokenizer, or the processor of a model that takes images, too.
        """
        recipe = self.recipe
        processor = load_processor(
            recipe.model_name, recipe.model_args.model_revision, recipe.training_args.trust_remote_code
        )
        self._template = processor.chat_template
        if recipe.pipeline_args.template_date is not None:
            fix_date(processor, recipe.pipeline_args.template_date)
        return processor

    @property
    def takes_images(self) -> bool:
        """Whether the base model is a vision-language model."""
        return isinstance(self.processor, ProcessorMixin)

    @cached_property
    def tokenizer_identity(self) -> str:
        """Hash of what makes tokens of the pairs; of pairs with images also of what makes pixels of these."""
        return tokenizer_identity(self.processor if self.has_images else self.tokenizer)

    @property
    def processing_class(self) -> PreTrainedTokenizerBase | ProcessorMixin | None:
        """For trainers: the processor whose template was changed; `None` if it was not, and they load their own."""
        return self.processor if self.processor.chat_template != self._template else None

    def restore_template(self, folder: Path) -> None:
        """Undo `template_date` in a saved model; on the main process."""
        if self.processing_class is not None and PartialState().is_main_process:
            restore_template(folder, self._template)

    # ---- Ready reference losses ----

    @cached_property
    def shared_losses(self) -> ReferenceLosses | None:
        """The recipe's `reference_losses`: of its tasks, or of all that they have if it lists none.

        Raises:
            AMAError: If they cannot be loaded, or hold none of the recipe's tasks.
        """
        args, names = self.recipe.pipeline_args, self.recipe.task_names
        source = args.reference_losses
        if source is None:
            return None
        losses = load_some_of(source, args.losses_config, names or None, token=self.recipe.training_args.hub_token)
        if names and not losses.tasks:
            raise AMAError(
                f"The reference losses '{source}' hold none of the recipe's tasks {names}. Name the tasks as they do, "
                "or leave `reference_losses` out."
            )
        return losses

    @property
    def shared_tasks(self) -> list[str]:
        """The tasks whose reference losses are ready, and which therefore need no specialist."""
        return [] if self.shared_losses is None else self.shared_losses.tasks

    def needs_specialist(self, task: str) -> bool:
        """Whether a task's specialist is trained here: the recipe names none, and its reference losses are not ready."""
        return task not in self.recipe.external_specialists and task not in self.shared_tasks

    def ready_pairs(self) -> dict[str, dict[str, Dataset]]:
        """The pairs of tasks that have no `path`, out of the ready reference losses."""
        task_args, ready = self.recipe.task_args, {}
        for task in task_args.tasks:
            if task.path is not None or task_args.tasks_dir is not None or task.task not in self.shared_tasks:
                continue
            part = self.shared_losses.parts[task.task]
            if not part.has_text:
                raise AMAError(
                    f"The reference losses of task '{task.task}' in '{self.recipe.pipeline_args.reference_losses}' hold ids and "
                    "numbers, but no texts. Name your own copy of the pairs with `path` in the task."
                )
            ready[task.task] = {
                split: rows.select_columns(
                    [name for name in (*PAIR_COLUMNS, *EXTRA_COLUMNS, PAIR_ID_COLUMN) if name in rows.column_names]
                )
                for split, rows in part.splits.items()
            }
        return ready

    # ---- The pairs ----

    @cached_property
    def _tasks(self) -> LoadedTasks:
        args, task_args = self.recipe.training_args, self.recipe.task_args
        drop = task_args.drop_truncated and args.max_length is not None
        fits = fits_into(self.processor, args.max_length) if drop else None
        return read_tasks(task_args, args.seed, fits, self.ready_pairs())

    @property
    def data(self) -> DatasetDict:
        """Train and held-out pairs of all tasks; see [`load_tasks`]."""
        return self._tasks.pairs

    @property
    def has_images(self) -> bool:
        """Whether pairs of any task have images."""
        return any(map(has_images, self.data.values()))

    @property
    def row_accounts(self) -> dict[str, dict[str, RowAccount]]:
        """Task → split → which rows were read, and what became of them."""
        return self._tasks.accounts

    @property
    def dropped_truncated(self) -> dict[str, dict[str, int]]:
        """Task → split → pairs that `drop_truncated` dropped; only where there were any."""
        return self._tasks.truncated

    def pairs_of(self, task: str, split: str) -> Dataset | None:
        """One task's pairs of a split; `None` if it has none."""
        if split not in self.data:
            return None
        key = (task, split)
        if key not in self._pairs_of:
            rows = np.flatnonzero(numpy_column(self.data[split], TASK_COLUMN) == self.recipe.task_names.index(task))
            self._pairs_of[key] = self.data[split].select(rows) if len(rows) else None
        return self._pairs_of[key]

    def data_source(self, task: str) -> str:
        """Where a task's pairs come from: `org/name@commit`, or the names of local files, without the paths to them."""
        config = self.recipe.task(task)
        if self.recipe.task_args.tasks_dir is not None:
            return "local files"
        if config.path is None:
            return self.shared_losses.fingerprints[task].get("data") or self.shared_losses.public_source
        if "/" in config.path and is_hub_id(config.path):
            commit = self._tasks.commits.get(task) or config.revision
            return f"{config.path}@{commit}" if commit else config.path
        files = config.data_files if config.data_files is not None else config.path
        paths = files.values() if isinstance(files, dict) else files if isinstance(files, list) else [files]
        return "local files: " + ", ".join(map(public_name, paths))
