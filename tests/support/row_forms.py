"""The same pair in each form that rows come in."""

import json


QUESTION = "\n\nHuman: What is 1+1?"
START = "\n\nHuman: Hi\n\nAssistant: Hello!" + QUESTION


def both(start: str, chosen: str = "2", rejected: str = "3") -> tuple[str, str]:
    return f"{start}\n\nAssistant: {chosen}", f"{start}\n\nAssistant: {rejected}"


def messages(role, text):
    return [{"role": role, "content": text}]


def plain(number, chosen="yes", rejected="no"):
    return {"prompt": f"question {number}", "chosen": chosen, "rejected": rejected}


def turns(number, chosen="yes", rejected="no"):
    row = plain(number, chosen, rejected)
    return {
        "prompt": messages("user", row["prompt"]),
        **{side: messages("assistant", row[side]) for side in ("chosen", "rejected")},
    }


def conversations(number, chosen="yes", rejected="no"):
    row = turns(number, chosen, rejected)
    return {side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")}


def as_json(number, chosen="yes", rejected="no"):
    return {name: json.dumps(side) for name, side in turns(number, chosen, rejected).items()}
