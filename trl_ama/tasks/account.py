"""An account of rows: of those that were read, which became pairs, and why the others did not."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..common.errors import AMAError


# Reasons that more than one module speaks of; a sentence goes on with them: "3 without an answer (drop_empty)"
EMPTY = "without an answer (drop_empty)"
TRUNCATED = "longer than max_length (drop_truncated)"
HELD_OUT = "held out (test_split_size)"
LIMITS = {"train": "left out by max_train_pairs", "test": "left out by max_eval_pairs"}
_SPLITS = {"train": "training", "test": "held-out"}  # in messages


@dataclass
class RowAccount:
    """What became of the rows of one task and split. Whoever leaves rows out says so here, and [`RowAccount.close`] adds up.

    Parameters:
        task, split (`str`):
            Whose rows they are; `split` is `"train"` or `"test"`.
        read (`int`):
            Rows that were read; of pairs that `test_split_size` holds out, those that were set aside.
        dropped (`dict[str, int]`):
            Reason → rows that are not among the pairs.
        noted (`dict[str, int]`):
            What is worth knowing of rows that are kept → rows.
        kept (`int`, *optional*):
            The pairs, once the account is closed.
    """

    task: str
    split: str
    read: int
    dropped: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    kept: int | None = None

    def drop(self, reason: str, count: int) -> None:
        """Note that so many rows were left out."""
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def note(self, what: str, count: int) -> None:
        """Note something of rows that are kept."""
        if count:
            self.noted[what] = self.noted.get(what, 0) + count

    def close(self, kept: int) -> None:
        """Hold the account against the pairs that are there in the end.

        Raises:
            AMAError: If rows are missing that no reason accounts for, or there are more than were read.
        """
        expected = self.read - sum(self.dropped.values())
        if min(self.dropped.values(), default=0) < 0 or expected != kept:
            raise AMAError(
                f"Task '{self.task}': of {self.read} rows read, {_sum(self.dropped) or 'none dropped'}, {expected} {_SPLITS[self.split]} "
                f"pairs should be left, and there are {kept}. This is a fault of trl-ama: please report it with these figures; nothing "
                "was trained."
            )
        self.kept = kept

    def __str__(self) -> str:
        """The account in a line: `16 rows = 4 pairs + 12 without an answer (drop_empty)`."""
        line = f"{self.read:,} rows = {self.kept:,} pairs"
        if self.dropped:
            line += f" + {_sum(self.dropped)}"
        return line + "".join(f"; {count:,} {what}" for what, count in self.noted.items())

    def to_dict(self) -> dict[str, Any]:
        """The figures, as JSON types."""
        return {"read": self.read, "kept": self.kept, "dropped": dict(self.dropped), "noted": dict(self.noted)}


def _sum(dropped: dict[str, int]) -> str:
    return " + ".join(f"{count:,} {reason}" for reason, count in dropped.items())


def account_lines(accounts: dict[str, dict[str, RowAccount]]) -> Iterator[tuple[str, str]]:
    """The accounts of several tasks for people, as task and text: those with something to say, and the sum of the others.

    Args:
        accounts (`dict`): Task → split → account, closed.
    """
    quiet = []
    for task, splits in accounts.items():
        for split, account in splits.items():
            if account.dropped or account.noted:
                yield task, f"{_SPLITS[split]}: {account}"
            else:
                quiet.append(account)
    if quiet:
        others = "all others" if len(quiet) < sum(map(len, accounts.values())) else "all"
        rows = sum(account.read for account in quiet)
        yield others, f"{rows:,} rows = {sum(account.kept for account in quiet):,} pairs"
