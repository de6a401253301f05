"""What a run says of `max_length` before it trains."""

import pytest
from checked_pairs import CLEAN, pair, recipe_fixture, with_list  # noqa: F401 - fixtures
from tiny_pairs import WORDS
from trl import DPOTrainer

from trl_ama import AMAError
from trl_ama.pipeline.length_note import length_lines
from trl_ama.recipe.settings import RunSettings


def lines_of(settings: RunSettings) -> list[str]:
    return length_lines(settings.recipe, settings.inputs)


def numbered(count: int, words: int, answer: int) -> list[dict]:
    """Pairs with prompts and longer answers of that many words."""
    return [pair(" ".join(["apple"] * words), "bread " * answer, f"bread {number}") for number in range(count)]


ROWS = [*numbered(20, 2, 2), *numbered(7, 2, 40), *numbered(5, 40, 2)]


def test_what_is_cut_and_what_the_trainer_drops_is_counted(recipe, model_dir, quick_args):
    settings = recipe(with_list(ROWS), max_length=30)
    (line,) = lines_of(settings)
    assert line.split() == (
        "over max_length list 7 of 32 cut; 5 of 32 dropped, as their prompts fill it (max_length is 30)".split()
    )
    pairs = settings.inputs.pairs_of("list", "train").remove_columns("task")
    trainer = DPOTrainer(model_dir, args=quick_args(max_length=30), train_dataset=pairs)
    assert len(trainer.train_dataset) == 32 - 5
    # Cut from the beginning, no prompt fills it
    (line,) = lines_of(recipe(with_list(ROWS), max_length=30, truncation_mode="keep_end"))
    assert "12 of 32 cut (" in line


def test_what_drop_truncated_dropped_is_counted_by_split(recipe):
    tasks = with_list(ROWS, numbered(4, 2, 40) + numbered(6, 2, 2))
    settings = recipe(tasks, task_changes={"drop_truncated": True}, max_length=30)
    (line,) = lines_of(settings)
    assert "12 of train and 4 of test dropped (" in line


def test_nothing_is_said_when_all_fit_or_nothing_is_cut(recipe):
    assert lines_of(recipe(CLEAN)) == []
    assert lines_of(recipe(with_list(ROWS), max_length=None)) == []


@pytest.mark.parametrize("limit", [None, 30])
def test_pairs_without_a_gradient_are_counted(recipe, limit):
    """Those that are the same text, and those that are so up to the cut; not those that are dropped before."""
    same = [pair(f"list {word}", "apple", "apple ") for word in WORDS[:3]]
    cut = [pair(f"list {word}", "apple " * 40 + "bread", "apple " * 40 + "cloud") for word in WORDS[:4]]
    rows = [*ROWS, *same, *cut]
    lines = [line.split() for line in lines_of(recipe(with_list(rows), max_length=limit)) if "no gradient" in line]
    count = 3 if limit is None else 7
    assert lines == [
        f"no gradient list {count} of 39 pairs: both answers are the same to the model (see trl ama-check)".split()
    ]


def test_a_large_task_is_estimated_from_its_first_pairs(recipe, monkeypatch):
    monkeypatch.setattr("trl_ama.pipeline.length_note._SAMPLE", 20)
    settings = recipe(with_list(ROWS[18:]), max_length=30)  # 14 pairs, ten of which are looked at
    (line,) = lines_of(settings)
    assert "about 10 of 14 cut; about 1 of 14 dropped" in line


def test_a_pair_that_cannot_be_tokenised_is_named_with_its_task(recipe):
    settings = recipe()
    settings.inputs.tokenizer.chat_template = "{{ raise_exception('no such turn') }}"
    with pytest.raises(AMAError, match="Task 'list', training pairs: Row 0 cannot be tokenised .*no such turn"):
        lines_of(settings)
