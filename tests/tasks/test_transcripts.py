"""`format: hh_rlhf`: transcripts are read right, or left out and counted by what is wrong with them."""

import json

import pytest
from row_forms import QUESTION, START, both

from trl_ama import AMAError, TaskMixtureConfig
from trl_ama.tasks.loading import read_tasks
from trl_ama.tasks.transcripts import (
    DIFFER,
    EMPTY_ANSWER,
    INNER_TURNS,
    NO_ANSWER,
    NO_QUESTION,
    NO_TURNS,
    read_transcripts,
)


PROMPT = [("user", "Hi"), ("assistant", "Hello!"), ("user", "What is 1+1?")]


@pytest.mark.parametrize(
    ("transcripts", "prompt", "answers"),
    [
        (both(START), PROMPT, ("2", "3")),
        (both(QUESTION), PROMPT[2:], ("2", "3")),
        (both(START.strip()), PROMPT, ("2", "3")),
        (both("  \n" + QUESTION.strip()), PROMPT[2:], ("2", "3")),
        (both(START.replace("\n", "\r\n"), "2\r\n\r\nyes"), PROMPT, ("2\n\nyes", "3")),
        (both("System: Be brief." + START), [("system", "Be brief."), *PROMPT], ("2", "3")),
        (both("Be brief.\n\nAlways." + START), [("system", "Be brief.\n\nAlways."), *PROMPT], ("2", "3")),
        (both("\n\nHuman:\n\nAssistant: What?" + QUESTION), [("user", ""), ("assistant", "What?"), PROMPT[2]], ("2", "3")),
        (both(START.replace("\n\n", "\n \t\n")), PROMPT, ("2", "3")),
        (both("\n\nAssistant: Hello!" + QUESTION), PROMPT[1:], ("2", "3")),
        # What a person might say is no turn
        (both(START, "A Human: is", "Human: and\nAssistant: in a line"), PROMPT, ("A Human: is", "Human: and\nAssistant: in a line")),
    ],
)  # fmt: skip
def test_what_is_read(transcripts, prompt, answers):
    chosen, rejected = transcripts
    found = read_transcripts({"chosen": chosen, "rejected": rejected})
    assert found.problem is None and found.note is None
    assert [(turn["role"], turn["content"]) for turn in found.pair["prompt"]] == prompt
    assert [found.pair[side] for side in ("chosen", "rejected")] == [
        [{"role": "assistant", "content": answer}] for answer in answers
    ]


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
@pytest.mark.parametrize("first", ["2", "3"])
def test_turns_within_one_answer_are_its_text(longer, first):
    """As TRL's own conversion of the dataset has it: the prompt ends where the answers begin to differ."""
    other = "rejected" if longer == "chosen" else "chosen"
    inner = f"{first}\n\nHuman: Why?\n\nAssistant: Because."
    row = {longer: f"{START}\n\nAssistant: {inner}", other: f"{START}\n\nAssistant: 2"}
    found = read_transcripts(row)
    assert found.note == INNER_TURNS
    assert found.pair[longer] == [{"role": "assistant", "content": inner}]
    assert found.pair[other] == [{"role": "assistant", "content": "2"}]
    assert [(turn["role"], turn["content"]) for turn in found.pair["prompt"]] == PROMPT


@pytest.mark.parametrize(
    ("transcripts", "problem"),
    [
        (("2", "3"), NO_TURNS),
        (("Person: Hi\n\nBot: 2", "Person: Hi\n\nBot: 3"), NO_TURNS),
        (both("", "2", "3"), NO_QUESTION),
        ((START, START), NO_ANSWER),
        ((both(START)[0], START + "\n\nAssistant: "), EMPTY_ANSWER),
        ((both(START)[0], both(START.replace("1+1", "1+2"))[1]), DIFFER),
        ((both(START)[0], both(START.replace("Hello!", "Good day."))[1]), DIFFER),
        ((both("System: a" + START)[0], both("System: b" + START)[1]), DIFFER),
        ((both(START)[0], both(QUESTION)[1]), DIFFER),
    ],
)
def test_what_is_no_pair(transcripts, problem):
    chosen, rejected = transcripts
    for row in ({"chosen": chosen, "rejected": rejected}, {"chosen": rejected, "rejected": chosen}):
        found = read_transcripts(row)
        assert (found.pair, found.problem) == (None, problem)


def test_a_prompt_in_a_column_of_its_own():
    row = {"prompt": START + "\n\nAssistant:", "chosen": " 2", "rejected": " 3"}
    assert (
        read_transcripts(row).pair
        == read_transcripts(dict(zip(("chosen", "rejected"), both(START), strict=True))).pair
    )
    # Turns within an answer are no reason to take it for a whole transcript
    inner = read_transcripts({**row, "chosen": " 2\n\nHuman: And?\n\nAssistant: No."})
    assert (inner.note, inner.pair["chosen"][0]["content"]) == (INNER_TURNS, "2\n\nHuman: And?\n\nAssistant: No.")
    # Beside whole transcripts it says nothing new
    whole = dict(zip(("chosen", "rejected"), both(START), strict=True))
    for prompt in ("What is 1+1?", START, START.strip() + "\n\nAssistant:", None):
        assert read_transcripts({"prompt": prompt, **whole}) == read_transcripts(whole)


def load(folder, rows, **changes):
    path = folder / "hh.jsonl"
    path.write_text("".join(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n" for chosen, rejected in rows))
    return read_tasks(
        TaskMixtureConfig(
            tasks=[{"task": "hh", "path": "json", "data_files": str(path), "format": "hh_rlhf", **changes}]
        )
    )


def test_what_is_left_out_is_counted_by_reason(tmp_path):
    differ = (both(START)[0], both(START.replace("Hello!", "Good day."))[1])
    inner = (both(START, "2\n\nHuman: And?\n\nAssistant: No.")[0], both(START)[1])
    loaded = load(tmp_path, [both(START)] * 4 + [differ] * 3 + [("2", "3")] * 2 + [inner])
    account = loaded.accounts["hh"]["train"]
    assert (account.read, account.kept) == (10, 5) == (10, len(loaded.pairs["train"]))
    assert account.dropped == {DIFFER: 3, NO_TURNS: 2}
    assert account.noted == {INNER_TURNS: 1}


def test_a_file_without_a_single_pair_says_why(tmp_path):
    with pytest.raises(
        AMAError, match="none of the 3 train rows .* 'hh_rlhf' .*: 2 without turns .*, 1 that differ before"
    ):
        load(tmp_path, [("2", "3")] * 2 + [(both(START)[0], both(QUESTION)[1])])
