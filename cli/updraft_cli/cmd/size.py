"""`updraft size`."""

from dataclasses import dataclass, fields
from typing import Any, Literal

import click
from rich.table import Table

from updraft_artifacts.draft_shape import MIN_VOCAB, ShapeChoice
from updraft_artifacts.sizing import CapturedTraffic, DraftSizes, Size, Sizing, quantity, readable, sizing
from updraft_cli import output
from updraft_cli.cmd.model import described

_DEFAULT = CapturedTraffic()
_COUNT = click.IntRange(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedModel:
    """The sizes of a model, and what they are for."""

    model: str
    traffic: CapturedTraffic
    draft: DraftSizes
    sizes: Sizing


@click.command("size")
@click.argument("model", metavar="MODEL")
@click.option(
    "--revision", metavar="REVISION", default="", help="Branch, tag or commit of an hf:// URI.  [default: main]"
)
@click.option("--draft-num-attention-heads", type=_COUNT, help="Attention heads of the draft.  [default: the target's]")
@click.option("--draft-num-key-value-heads", type=_COUNT, help="Key-value heads of the draft.  [default: the target's]")
@click.option("--draft-intermediate-size", type=_COUNT, help="Width of the draft's MLP.  [default: the target's]")
@click.option(
    "--draft-vocab-size",
    type=click.IntRange(MIN_VOCAB),
    help="Tokens that the draft can propose.  [default: 8,192 to 32,000, by the target]",
)
@click.option(
    "--engine",
    type=click.Choice(["torch", "sglang", "vllm"]),
    help="Engine that serves the target.  [default: torch if it runs the target, else sglang]",
)
@click.option(
    "--encoding",
    type=click.Choice(["fp8", "bf16"]),
    default=_DEFAULT.encoding,
    show_default=True,
    help="Encoding of hidden states in traces.",
)
@click.option(
    "--tokens-per-second",
    type=_COUNT,
    default=_DEFAULT.tokens_per_second,
    show_default=True,
    help="Captured tokens per second, of all pods together.",
)
@click.option(
    "--answer-tokens",
    type=_COUNT,
    default=_DEFAULT.answer_tokens,
    show_default=True,
    help="Mean length of answers.",
)
@click.option(
    "--prompt-rows",
    type=click.IntRange(0),
    default=_DEFAULT.prompt_rows,
    show_default=True,
    help="Maximum captured tokens of a prompt.",
)
@click.option(
    "--minutes",
    type=_COUNT,
    default=_DEFAULT.minutes,
    show_default=True,
    help="How long Redis holds traffic while the trainer is away.",
)
@click.option(
    "-o", "--output", "form", type=click.Choice(["table", "json", "yaml"]), default="table", show_default=True
)
def size(
    model: str,
    revision: str,
    engine: Literal["torch", "sglang", "vllm"] | None,
    form: Literal["table", "json", "yaml"],
    **options: Any,
) -> None:
    """Show how large volumes, memory and network must be to learn for a target, and why.

    MODEL is a folder, or a URI as for `updraft model pull`, of which only some ranges are read. Without options, the sizes are
    the defaults of the processes for this target. The operator's default volumes are those of an 8B target.
    """
    target = described(model, revision)
    choice = ShapeChoice(**{field.name: options.pop(field.name) for field in fields(ShapeChoice)})
    draft, traffic = DraftSizes.of(target, choice), CapturedTraffic(engine=engine or target.engine, **options)
    found = SizedModel(model=model, traffic=traffic, draft=draft, sizes=sizing(target, draft, traffic))
    output.show(found, form, names=(), rendered=lambda *, is_wide: table(found.sizes))


def table(sizes: Sizing) -> Table:
    """Return a row per size: its name, how much, the reason, and where it is set."""
    rows = output.table("size", ">amount", "reason", "setting")
    for name, one in sizes:
        rows.add_row(name.replace("_", " "), _amount(name, one), one.reason, ", ".join(one.settings) or "-")
    return rows


def _amount(name: str, one: Size) -> str:
    if name.endswith("volume"):
        return f"{readable(one.amount)} ({quantity(one.amount)})"
    return readable(one.amount) + ("/s" if one.unit == "B/s" else "")
