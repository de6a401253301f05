"""Forms that preference rows come in: a table that tests draw from. A new report is one line in it.

`TEXTS` and `MESSAGES` go through everything; their tokens are those of `DPOTrainer` on the same rows. `REFUSED` are rows
that nothing can be made of, with a part of what is said.
"""

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Rows:
    """One form of rows.

    Args:
        rows (`list[dict]`): As a JSON Lines file holds them.
        instead (`list[dict]`, *optional*): Rows of the same meaning, where `DPOTrainer` does not take these.
        says (`str`): A part of the message, where they are refused.
    """

    rows: list[dict[str, Any]]
    instead: list[dict[str, Any]] | None = field(default=None, kw_only=True)
    says: str = field(default="", kw_only=True)


def user(content, **keys):
    return {"role": "user", "content": content, **keys}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def call(name, arguments, **keys):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **keys}


def tool(name, **parameters):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def pair(prompt, chosen, rejected, **columns):
    """A row of messages, each side given as one message, a list of them, or a text."""
    sides = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for name, side in sides.items():
        side = (user if name == "prompt" else assistant)(side) if isinstance(side, str) else side
        sides[name] = side if isinstance(side, list) else [side]
    return {**sides, **columns}


def implicit(row):
    """The same row with its prompt in the answers."""
    kept = {name: value for name, value in row.items() if name not in ("prompt", "chosen", "rejected")}
    return {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"], **kept}


WEATHER = tool("weather", city={"type": "string"})
CLOCK = tool("clock", zone={"type": "integer", "enum": [1, 2]})
PLAIN = [pair("when?", "in the year 5", "no idea"), pair("where?", "over there", "no idea")]
ASKED = [
    user("weather in Oslo?"),
    assistant(None, tool_calls=[call("weather", {"city": "Oslo"}, id="c1")]),
    {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "4 degrees"},
]
CALLS = [pair("Oslo?", assistant(None, tool_calls=[call("weather", {"city": "Oslo"})]), "I cannot.")]

TEXTS = {
    "texts": Rows([{"prompt": "list: a b", "chosen": " a b", "rejected": " a"}]),
    "texts without prompt": Rows([{"chosen": "list: a b", "rejected": "list: c"}, {"chosen": "x ", "rejected": "x y"}]),
    "texts that part after a space": Rows([{"chosen": "say it: now", "rejected": "say it: then"}]),
    "texts that part at once": Rows([{"chosen": "now", "rejected": "then"}]),
    "texts with the end token": Rows([{"prompt": "q", "chosen": "a</s>", "rejected": "b"}]),
    "texts without a word of prompt": Rows([{"prompt": "", "chosen": "a", "rejected": "b"}]),
    "texts with tools": Rows([{"prompt": "q", "chosen": "a", "rejected": "b", "tools": json.dumps([WEATHER])}]),
}  # fmt: skip

MESSAGES = {
    "messages": Rows(PLAIN),
    "messages without prompt": Rows([implicit(row) for row in PLAIN]),
    "content before role": Rows([pair({"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}, "b")]),
    "system and several turns": Rows([pair([{"role": "system", "content": "be brief"}, user("q"), assistant("a"), user("r")], "s", "t")]),
    "answers of several messages": Rows([pair("q", [*ASKED[1:], assistant("4")], "cold")]),
    "a call as answer": Rows(CALLS),  # axolotl#3824, ms-swift#7184
    "a call as answer, no content at all": Rows([pair("q", {"role": "assistant", "tool_calls": [call("weather", "{}")]}, "no")]),
    "the same text, another call": Rows([pair("q", assistant("Wait.", tool_calls=[call("a", {"x": 1})]), assistant("Wait.", tool_calls=[call("b", {"x": 1})]))]),
    "calls with arguments as text": Rows([pair("q", assistant("", tool_calls=[call("weather", '{"city": "Rome"}')]), "no")]),
    "calls of other arguments": Rows([*CALLS, pair("time?", assistant(None, tool_calls=[call("clock", {"zone": 3})]), "I cannot.")]),
    "an argument of two types": Rows([pair("q", assistant(None, tool_calls=[call("f", {"x": x})]), "no") for x in (1, "one", [1])]),
    "numbers with places": Rows([pair("q", assistant(None, tool_calls=[call("f", {"x": [0.3, 1.7, 48.85661400000001, 1e-7, 1.0]})]), "no")]),  # ms-swift#10216
    "an argument that is null": Rows([pair("q", assistant(None, tool_calls=[call("f", {"x": x, "y": 1})]), "no") for x in (1, None)]),
    "calls and results in the prompt": Rows([pair(ASKED, "4 degrees", "no idea"), PLAIN[0]]),
    "calls, no prompt": Rows([implicit(pair(ASKED, "4 degrees", "no idea"))]),
    "calls in chosen alone, no prompt": Rows([implicit(CALLS[0])], instead=[{**CALLS[0], "prompt": [user("Oslo?", tool_calls=None)]}]),
    "reasoning": Rows([pair("q", assistant("a", reasoning_content="as I know"), assistant("b", reasoning_content="a guess"))]),
    "reasoning in some rows": Rows([pair("q", assistant("a", reasoning_content="as I know"), "b"), PLAIN[0]]),
    "keys that no template knows": Rows([pair(user("q", id=3), assistant("a", id=4, weight=0.1), assistant("b", id=5, weight=None))]),
    "names": Rows([pair([user("q", name="Ann"), assistant("a"), user("r", name="Bo")], "s", "t")]),
    "parts": Rows([pair(user(parts("q", "r")), assistant(parts("a")), assistant(parts("b")))]),
    "parts without prompt": Rows([implicit(pair(user(parts("q")), assistant(parts("a")), assistant(parts("b"))))]),
    "parts in some rows": Rows([pair(user(parts("q")), assistant(parts("a")), assistant(parts("b"))), PLAIN[0]]),
    "parts in the prompt": Rows([pair(user(parts("q")), "a", "b")]),
    "tools": Rows([{**row, "tools": [WEATHER]} for row in PLAIN]),  # datasets#7869
    "tools as text": Rows([{**row, "tools": json.dumps([WEATHER])} for row in PLAIN]),
    "other tools": Rows([{**row, "tools": [CLOCK]} for row in PLAIN]),
    "tools in some rows": Rows([{**PLAIN[0], "tools": [WEATHER]}, {**PLAIN[1], "tools": None}]),  # ms-swift#1193
    "tools and calls, no prompt": Rows([{**implicit(pair(ASKED, "4 degrees", "no idea")), "tools": [WEATHER, CLOCK]}]),
    "no tools": Rows([{**row, "tools": []} for row in PLAIN]),
    "template arguments": Rows([{**row, "chat_template_kwargs": {"style": "short"}} for row in PLAIN]),
    "template arguments in some rows": Rows(
        [{**PLAIN[0], "chat_template_kwargs": {"style": "short"}}, {**PLAIN[1], "chat_template_kwargs": None}],
        instead=[{**PLAIN[0], "chat_template_kwargs": {"style": "short"}}, {**PLAIN[1], "chat_template_kwargs": {"style": ""}}],
    ),
}  # fmt: skip

REFUSED = {
    "no prompt, nothing shared": Rows([{"chosen": [assistant("a")], "rejected": [assistant("b")]}], says="share no first message"),
    "a prompt of no messages": Rows([PLAIN[0], {**PLAIN[1], "prompt": []}], says="row 1 of the train pairs has a prompt without messages"),
    "texts that part at once, and a space": Rows([{"chosen": "now ", "rejected": "then"}], says="differ from the first character on"),  # trl#6079
    "tools that are no JSON": Rows([{**PLAIN[0], "tools": "weather"}], says="tools is 'weather', which is no JSON"),
    "tools that are no list": Rows([{**PLAIN[0], "tools": json.dumps(WEATHER)}], says="of type dict. Give a list of tools"),
    "tools as texts each": Rows([{**PLAIN[0], "tools": [json.dumps(WEATHER)]}], says="a list that holds .*, of type str"),
    "a prompt beside whole conversations": Rows([{**implicit(PLAIN[0]), "prompt": "when?"}], says="leave it out .`columns: .chosen, rejected"),
    "numbers as contents": Rows([pair(user(5), "a", "b")], says="the content 5, of type int"),
    "parts without text": Rows([pair("q", assistant(parts("")), "b")], says="no pair with two answers"),
    "an empty list of calls": Rows([pair("q", assistant(None, tool_calls=[]), "b")], says="no pair with two answers"),
}  # fmt: skip
