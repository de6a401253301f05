"""Where everything of a run is: every name of a file or folder in its output folder stands here, and nowhere else."""

from pathlib import Path


# In a trained model's folder, and in its checkpoints
STAGE_FILE = "stage.json"  # what made the model, and its result
STATE_FILE = "trainer_state.json"  # transformers' own: the log, and the mixture's state
# In a folder of one task's reference losses
FINGERPRINT_FILE = "fingerprint.json"  # what made them
SHARDS_FILE = "run.json"  # what makes those that are not finished
# In a run's folder
RESULTS_FILE = "results.json"
NOTE_FILE = "report/run.json"  # what the page says that the rest of the folder does not know
MARGINS_FILE = "held_out_margins.parquet"
LOCKS = ".locks"
RUN_LOCK = "run"  # what a whole run holds; a job of some tasks holds theirs
PLOT = "mixture.png"  # in `plots`, and beside a card that shows it
_SHARDS = ".shards"


def rows_file(split: str) -> str:
    """The rows of a split in a task's reference losses."""
    return f"{split}.parquet"


def task_lock(task: str) -> str:
    """What a job of some tasks holds of each."""
    return f"task-{task}"


class RunFolder:
    """The files and folders of a run.

    Args:
        path (`str` or `Path`): The output folder. It need not be there.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def specialists(self) -> Path:
        """A folder per task with its specialist."""
        return self.path / "specialists"

    def specialist(self, task: str) -> Path:
        """A trained specialist."""
        return self.specialists / task

    @property
    def losses(self) -> Path:
        """The reference-loss dataset: a folder per task."""
        return self.path / "reference_losses"

    def losses_of(self, task: str) -> Path:
        """A task's reference losses."""
        return self.losses / task

    def shards(self, task: str) -> Path:
        """What is scored already of a task that is not finished; hidden, so that nothing takes it for a task."""
        return self.losses / f".{task}{_SHARDS}"

    def tasks_with_shards(self) -> list[str]:
        """The tasks of which some pairs are scored."""
        return [path.name[1:].removesuffix(_SHARDS) for path in self.losses.glob(f".*{_SHARDS}")]

    @property
    def generalists(self) -> Path:
        """A folder per mixing strategy with its generalist."""
        return self.path / "generalists"

    def generalist(self, strategy: str) -> Path:
        """A trained generalist."""
        return self.generalists / strategy

    @property
    def results(self) -> Path:
        """Held-out figures of everybody, and what made them."""
        return self.path / RESULTS_FILE

    @property
    def result_table(self) -> Path:
        """The same for people."""
        return self.path / "results.md"

    @property
    def margins(self) -> Path:
        """The reward margin of every held-out pair under every policy."""
        return self.path / MARGINS_FILE

    @property
    def plot(self) -> Path:
        """The mixture over the steps of each generalist."""
        return self.path / "plots" / PLOT

    @property
    def page(self) -> Path:
        """The run's page."""
        return self.path / "report" / "index.html"

    @property
    def note(self) -> Path:
        """What the page says that the rest of the folder does not know."""
        return self.path / NOTE_FILE

    @property
    def locks(self) -> Path:
        """Who runs here."""
        return self.path / LOCKS

    def lock(self, name: str) -> Path:
        """One lock: `RUN_LOCK`, or a task's."""
        return self.locks / f"{name}.lock"

    def task_locks(self) -> list[Path]:
        """The locks of tasks that are there."""
        return sorted(self.locks.glob(self.lock(task_lock("*")).name))

    def lock_note(self, name: str) -> Path:
        """Who holds a lock."""
        return self.locks / f"{name}.json"
