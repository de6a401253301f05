"""What every stage of the pipeline shares: the parsed arguments, the data and the places of files."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from peft import PeftConfig
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import SaveStrategy
from trl import ModelConfig, get_peft_config, get_quantization_config

from .ama_config import AMAConfig
from .columns import numpy_column
from .errors import AMAError, nearest, sentence
from .hub import is_commit, is_hub_id
from .limits import LimitError, check_limits
from .model_identity import model_identity, tokenizer_identity
from .others_errors import told
from .pair_forms import EXTRA_COLUMNS, PAIR_COLUMNS
from .pair_images import has_images
from .pipeline_arguments import PipelineArguments
from .processors import load_processor
from .row_account import RowAccount
from .run_places import RunPlaces
from .secrets import public_name
from .task_config import TaskConfig, TaskMixtureConfig
from .task_loading import LoadedTasks, fits_into, read_tasks
from .tasks import PAIR_ID_COLUMN, TASK_COLUMN
from .template_date import fix_date, restore_template
from .value_types import check_value


if TYPE_CHECKING:
    from .loss_sharing import ReferenceLosses


@dataclass
class RunSettings(RunPlaces):
    """The parsed arguments of a run, and what follows from them.

    Raises:
        AMAError: From any property, if the arguments or the data do not fit together.
    """

    pipeline_args: PipelineArguments
    training_args: AMAConfig
    model_args: ModelConfig
    task_args: TaskMixtureConfig

    def __post_init__(self):
        if not self.model_args.model_name_or_path:
            raise AMAError(
                "There is no base model. Set `model_name_or_path` in the recipe, or pass --model_name_or_path."
            )
        check_limits(vars(self.model_args), "Of the model's arguments,")
        training = self.given_args = self.training_args
        self.losses_read: dict[
            str, tuple[list, Any]
        ] = {}  # of `reference_losses_of`: task → files, and what they hold
        if not self.task_args.tasks and self.pipeline_args.reference_losses:
            self.task_args = dataclasses.replace(
                self.task_args, tasks=[TaskConfig(task) for task in self.shared_losses.tasks]
            )
        # As in `trl dpo`: the model's arguments, and what the recipe sets explicitly on top
        self.training_args = self.with_arguments(
            model_init_kwargs={
                "revision": self.model_args.model_revision,
                "trust_remote_code": training.trust_remote_code,
                "attn_implementation": self.model_args.attn_implementation,
                "dtype": self.model_args.dtype or "float32",
                **(training.model_init_kwargs or {}),
            },
            specialists=None,  # the pipeline joins their log-probs instead
        )
        self.external_specialists: dict[str, str] = {
            **(training.specialists or {}),
            **{task.task: task.specialist for task in self.task_args.tasks if task.specialist},
        }
        for task, source in self.external_specialists.items():
            if not isinstance(source, str):
                raise AMAError(f"The specialist of task '{task}' must be a folder or a Hub id, got {source!r:.80}.")
        names = [task.task for task in self.task_args.tasks]
        unknown = [task for task in self.external_specialists if task not in names]
        if unknown:
            raise AMAError(
                f"There is a specialist for '{unknown[0]}', but the recipe's tasks are {names}.{nearest(unknown[0], names)}"
            )
        unknown = [task for task in self.pipeline_args.only_tasks if task not in names]
        if unknown:
            raise AMAError(
                f"only_tasks names '{unknown[0]}', but the recipe's tasks are {names}.{nearest(str(unknown[0]), names)}"
            )

    # ---- Arguments ----

    def with_arguments(self, **changes: Any) -> AMAConfig:
        """The training arguments with some changed, checked and converted as when they are parsed.

        Raises:
            AMAError: If a name is not a training argument (the nearest is suggested), or values contradict each other.
        """
        known = [field.name for field in dataclasses.fields(AMAConfig) if field.init]
        for name in changes:
            if name not in known:
                raise AMAError(f"Unknown training argument '{name}' in specialist_args.{nearest(name, known)}")
        try:
            return dataclasses.replace(self.training_args, **changes)
        except AMAError:
            raise
        except Exception as error:  # others' checks, which raise what they like
            raise AMAError(f"These training arguments do not go together: {' '.join(str(error).split())}") from error

    def specialist_arguments(self, task: TaskConfig) -> AMAConfig:
        """Training arguments of one task's specialist: the recipe's without evaluation during training, then its own."""
        args = self.training_args
        own = {**self.pipeline_args.specialist_args, **task.specialist_args}
        if "output_dir" in own:
            raise AMAError(
                f"specialist_args of task '{task.task}' sets output_dir, but specialists go to "
                f"'{self.specialist_dir(task.task)}'. Leave it out."
            )
        for name, value in own.items():
            if not isinstance(name, str):
                raise AMAError(
                    f"Unknown training argument {name!r} in specialist_args of task '{task.task}'. Leave it out."
                )
            check_value(AMAConfig, name, value, f"Of the specialist_args of task '{task.task}',", parses_text=False)
        changes = {
            "output_dir": str(self.specialist_dir(task.task)),
            "push_to_hub": False,
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "metric_for_best_model": None,
            "save_strategy": "no" if args.save_strategy == SaveStrategy.BEST else args.save_strategy,
            **own,
        }
        try:
            return self.with_arguments(**changes)
        except LimitError as error:  # also of the recipe's value of a key, under what is set here
            of = "Of" if error.key in own else "With"
            raise error.told_of(f"{of} the specialist_args of task '{task.task}',") from None

    def scoring_arguments(self) -> AMAConfig:
        """Arguments of a trainer that only scores pairs: nothing is trained, saved, evaluated, logged or pushed."""
        return self.with_arguments(
            push_to_hub=False,
            report_to="none",
            save_strategy="no",
            eval_strategy="no",
            load_best_model_at_end=False,
            metric_for_best_model=None,
            # Which keeps DPOTrainer from loading a second model, where it can be kept from it
            precompute_ref_log_probs=not any(map(has_images, self.data.values())),
            sync_ref_model=False,
        )

    @property
    def strategies(self) -> list[str]:
        """The generalists to train: the recipe's `mixing` first, then those it is compared with."""
        return list(dict.fromkeys([self.training_args.mixing, *self.pipeline_args.compare]))

    def peft_config(self) -> PeftConfig | None:
        """A fresh PEFT configuration, which notes the base model's commit; `None` for full fine-tuning."""
        with told("The adapter cannot be made", "the lora_* keys"):
            config = get_peft_config(self.model_args)
        commit = self.base_identity.partition("@")[2]
        if config is not None and is_commit(commit):
            config.revision = commit
        return config

    def quantization_config(self) -> BitsAndBytesConfig | None:
        """The quantisation of the base model, if any.

        Raises:
            AMAError: If its settings contradict each other.
        """
        try:
            return get_quantization_config(self.model_args)
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            raise AMAError(
                f"These settings of the quantisation do not go together: {sentence(error)} (dtype is '{self.model_args.dtype}'). "
                "With load_in_4bit, set dtype to bfloat16, float16 or float32."
            ) from error

    @property
    def model_name(self) -> str:
        """The base model as the user names it."""
        return self.model_args.model_name_or_path

    # ---- Ready reference losses ----

    @cached_property
    def shared_losses(self) -> "ReferenceLosses | None":
        """The recipe's `reference_losses`: of its tasks, or of all that they have if it lists none.

        Raises:
            AMAError: If they cannot be loaded, or hold none of the recipe's tasks.
        """
        from .loss_loading import load_some_of

        source = self.pipeline_args.reference_losses
        if source is None:
            return None
        losses = load_some_of(
            source, self.pipeline_args.losses_config, self.task_names or None, token=self.training_args.hub_token
        )
        if self.task_names and not losses.tasks:
            raise AMAError(
                f"The reference losses '{source}' hold none of the recipe's tasks {self.task_names}. Name the tasks as they do, "
                "or leave `reference_losses` out."
            )
        return losses

    @property
    def shared_tasks(self) -> list[str]:
        """The tasks whose reference losses are ready, and which therefore need no specialist."""
        return [] if self.shared_losses is None else self.shared_losses.tasks

    def ready_pairs(self) -> dict[str, dict[str, Dataset]]:
        """The pairs of tasks that have no `path`, out of the ready reference losses."""
        ready = {}
        for task in self.task_args.tasks:
            if task.path is not None or self.task_args.tasks_dir is not None or task.task not in self.shared_tasks:
                continue
            part = self.shared_losses.parts[task.task]
            if not part.has_text:
                raise AMAError(
                    f"The reference losses of task '{task.task}' in '{self.pipeline_args.reference_losses}' hold ids and numbers, "
                    "but no texts. Name your own copy of the pairs with `path` in the task."
                )
            ready[task.task] = {
                split: rows.select_columns(
                    [name for name in (*PAIR_COLUMNS, *EXTRA_COLUMNS, PAIR_ID_COLUMN) if name in rows.column_names]
                )
                for split, rows in part.splits.items()
            }
        return ready

    # ---- What they stand for ----

    @cached_property
    def base_identity(self) -> str:
        """The base model's weights by name and hash or commit."""
        return model_identity(self.model_name, self.model_args.model_revision)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer: `processor`, or what that has."""
        return getattr(self.processor, "tokenizer", self.processor)

    @cached_property
    def processor(self) -> PreTrainedTokenizerBase | ProcessorMixin:
        """What prepares the pairs, as DPOTrainer loads and completes it, with the recipe's `template_date`: the base model's
        tokenizer, or the processor of a model that takes images, too.
        """
        processor = load_processor(
            self.model_name, self.model_args.model_revision, self.training_args.trust_remote_code
        )
        self._template = processor.chat_template
        if self.pipeline_args.template_date is not None:
            fix_date(processor, self.pipeline_args.template_date)
        return processor

    @property
    def takes_images(self) -> bool:
        """Whether the base model is a vision-language model."""
        return isinstance(self.processor, ProcessorMixin)

    @cached_property
    def tokenizer_identity(self) -> str:
        """Hash of what makes tokens of the pairs; of pairs with images also of what makes pixels of these."""
        return tokenizer_identity(self.processor if any(map(has_images, self.data.values())) else self.tokenizer)

    @property
    def processing_class(self) -> PreTrainedTokenizerBase | ProcessorMixin | None:
        """For trainers: the processor whose template was changed; `None` if it was not, and they load their own."""
        return self.processor if self.processor.chat_template != self._template else None

    def restore_template(self, folder: Path) -> None:
        """Undo `template_date` in a saved model; on the main process."""
        if self.processing_class is not None and PartialState().is_main_process:
            restore_template(folder, self._template)

    @cached_property
    def _loaded(self) -> LoadedTasks:
        args = self.training_args
        drop = self.task_args.drop_truncated and args.max_length is not None
        fits = fits_into(self.processor, args.max_length) if drop else None
        return read_tasks(self.task_args, args.seed, fits, self.ready_pairs())

    @property
    def data(self) -> DatasetDict:
        """Train and held-out pairs of all tasks; see [`load_tasks`]."""
        return self._loaded.pairs

    @property
    def row_accounts(self) -> dict[str, dict[str, RowAccount]]:
        """Task → split → which rows were read, and what became of them."""
        return self._loaded.accounts

    @property
    def dropped_truncated(self) -> dict[str, dict[str, int]]:
        """Task → split → pairs that `drop_truncated` dropped; only where there were any."""
        return self._loaded.truncated

    def data_source(self, task: str) -> str:
        """Where a task's pairs come from: `org/name@commit`, or the names of local files, without the paths to them."""
        config = next(entry for entry in self.task_args.tasks if entry.task == task)
        if self.task_args.tasks_dir is not None:
            return "local files"
        if config.path is None:
            return self.shared_losses.fingerprints[task].get("data") or self.shared_losses.public_source
        if "/" in config.path and is_hub_id(config.path):
            commit = self._loaded.commits.get(task) or config.revision
            return f"{config.path}@{commit}" if commit else config.path
        files = config.data_files if config.data_files is not None else config.path
        paths = files.values() if isinstance(files, dict) else files if isinstance(files, list) else [files]
        return "local files: " + ", ".join(map(public_name, paths))

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in the recipe's order."""
        return [task.task for task in self.task_args.tasks]

    @property
    def chosen_tasks(self) -> list[str]:
        """The tasks whose specialists and reference losses this run makes: all, or the recipe's `only_tasks`."""
        chosen = self.pipeline_args.only_tasks
        return [task for task in self.task_names if not chosen or task in chosen]

    def pairs_of(self, task: str, split: str) -> Dataset | None:
        """One task's pairs of a split; `None` if it has none."""
        if split not in self.data:
            return None
        rows = np.flatnonzero(numpy_column(self.data[split], TASK_COLUMN) == self.task_names.index(task))
        return self.data[split].select(rows) if len(rows) else None
