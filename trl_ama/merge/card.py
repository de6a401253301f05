"""The card of a merged checkpoint: what was merged into what, and how far the result is from the adapter on its base."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..common.hub import hub_link, is_hub_id
from ..common.secrets import public_name
from ..policies.files import PolicySource
from ..report.card_parts import load_snippet, template, versions_line
from ..report.markdown import code, escape


def write_merged_card(folder: Path, name: str, place: PolicySource, base: str, note: dict[str, Any]) -> None:
    """Write the card of a merged checkpoint into its folder.

    Args:
        folder (`Path`): The checkpoint's.
        name (`str`): What it is called.
        place ([`PolicySource`]): The adapter.
        base (`str`): Path or Hub id of the base model.
        note (`dict`): What [`merge_adapter`] returns.
    """
    title = " ".join(name.split())
    base_id = base if is_hub_id(base) and not os.path.isdir(base) else None
    quantized = note["trained_on"] != "not quantised"
    card_data = ModelCardData(
        base_model=base_id,
        base_model_relation="finetune" if base_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        model_name=title,
        tags=["ama", "merged", "trl"],
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(template("merged_card.md")),
        title=escape(title),
        trained=f"It was trained on the base quantised by bitsandbytes ({note['trained_on']})." if quantized else "",
        adapter=hub_link(place.name, "model", place.commit)
        if place.commit
        else code(public_name(place.name)) + " (local)",
        base_model=hub_link(base, "model", note["base_revision"]) if base_id else code(public_name(base)) + " (local)",
        into=_into(note),
        weights=f"{note['parameters']:,} parameters in {note['dtype']}",
        compared="the same weights",
        difference=difference(note),
        explanation=f"{explanation(note)}\n\n{rounding(note)}",
        use_python=load_snippet(None, uses_peft=False),
        versions=versions_line(),
    )
    card.save(folder / "README.md")


def _into(note: dict[str, Any]) -> str:
    return "the dequantised base" if note["into"] == "dequantized" else "the base as it is saved"


def difference(note: dict[str, Any]) -> str:
    """How far the checkpoint is from what it was merged from, in words, and next to what the adapter does."""
    share, effect = note["share_of_effect"], note["adapter_effect"]
    of_effect = "where the adapter changes nothing"
    if share is not None:
        of_effect = f"{share:.2%} of what the adapter changes ({effect:.2g})"
    return (
        f"{note['mean_difference']:.2g} nats a token in the mean, {of_effect}; {note['largest_difference']:.2g} at most "
        f"({note['compared_tokens']} tokens)"
    )


def rounding(note: dict[str, Any]) -> str:
    """What rounding the weights does, and 4 or 8 bits did, in words."""
    text = (
        f"Rounding the merged weights to {note['dtype']} alone moves log-probs by {note['rounding']:.2g} nats a token."
    )
    if "quantized_difference" in note:
        text += (
            f" From the quantised base with the adapter, in its own arithmetic, the checkpoint is {note['quantized_difference']:.2g} nats a "
            f"token away; without the adapter the two are {note['quantized_base_difference']:.2g} apart."
        )
    return text


def explanation(note: dict[str, Any]) -> str:
    """What the choice of weights means."""
    if note["into"] == "dequantized":
        return (
            "The weights that the quantised layers multiplied with in training were written out, and the adapter was added to them: "
            "this is the model that was trained and evaluated, up to rounding. Quantised again, it is not: the adapter is of the "
            "size of what 4 bits round away, so use the adapter on the quantised base where memory is short."
        )
    if note["trained_on"] != "not quantised":
        return (
            "The adapter was trained on the quantised base and is merged here into the base as it is saved: the weights differ by "
            "what quantisation had rounded away, so this is not exactly the model that was trained and evaluated."
        )
    return "The adapter was trained on the base as it is here, so the checkpoint is the trained model, up to rounding."
