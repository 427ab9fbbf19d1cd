"""Two versions side by side on a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from updraft_cli import output
from updraft_cli.backends.differences import Difference, Field, TensorPair
from updraft_cli.backends.drafts import Tensor
from updraft_cli.cmd.draft.view import shape


def rendered(difference: Difference, *, is_wide: bool) -> RenderableType:
    """The differences; wide, with what is equal too, and whole digests."""
    fields = [field for field in difference.fields if is_wide or not field.is_equal]
    tensors = [pair for pair in difference.tensors if is_wide or not pair.is_equal]
    parts: list[RenderableType] = []
    if fields:
        parts.append(_fields(difference, fields, is_wide=is_wide))
    if difference.tensors:
        parts += [*([""] if fields else []), _weights(difference)]
    elif not fields:
        parts.append("No difference is known.")
    if tensors:
        parts += ["", _tensors(difference, tensors)]
    return Group(*parts)


def _fields(difference: Difference, fields: list[Field], *, is_wide: bool) -> Table:
    table = output.table("", "~", f"~version {difference.old}", f"version {difference.new}")
    last = ""
    for field in fields:
        part = field.part if field.part != last else ""
        last = field.part
        style = "dim" if field.is_equal else ""
        old, new = (_value(value, is_wide=is_wide) for value in (field.old, field.new))
        table.add_row(Text(part, "bold"), Text(field.name, "dim"), Text(old, style), Text(new, style))
    return table


def _value(value: str, *, is_wide: bool) -> str:
    if not value:
        return "-"
    return output.short(value) if value.startswith("sha256:") and not is_wide else value


def _weights(difference: Difference) -> str:
    num_all, num_equal = len(difference.tensors), sum(pair.is_equal for pair in difference.tensors)
    if num_equal == num_all:
        return f"All {num_all} tensors are equal: the same weights."
    equal = f"; {num_equal} are equal" if num_equal else ""
    return f"{num_all - num_equal} of {output.count(num_all, 'tensor')} differ{equal}."


def _tensors(difference: Difference, pairs: list[TensorPair]) -> Table:
    table = output.table("tensor", "type and shape", f"version {difference.old}", f"version {difference.new}")
    for pair in pairs:
        style = "dim" if pair.is_equal else ""
        old, new = (output.short(tensor.digest) if tensor else "-" for tensor in (pair.old, pair.new))
        table.add_row(Text(pair.name, style), Text(_layout(pair), style), Text(old, style), Text(new, style))
    return table


def _layout(pair: TensorPair) -> str:
    """Type and shape; of both, where they differ in that too."""
    both = dict.fromkeys(_described(tensor) for tensor in (pair.old, pair.new) if tensor)
    return " -> ".join(both)


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {shape(tensor)}"
