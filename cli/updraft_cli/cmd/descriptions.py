"""A target's description as a table for a person."""

from rich.table import Table

from updraft_artifacts.rope import Rope
from updraft_artifacts.target_description import TargetDescription


def table(target: TargetDescription) -> Table:
    """Return two columns: what is described, and how it is."""
    rows = Table.grid(padding=(0, 2))
    for row in _rows(target):
        rows.add_row(*row)
    return rows


def _rows(target: TargetDescription) -> list[tuple[str, str]]:
    places, shape = target.places, target.draft_shape
    heads = f"{shape.num_heads} heads of {shape.head_dim}, {shape.num_kv_heads} key-value heads"
    return [
        ("family", target.model_type),
        ("engine", "torch or sglang" if target.engine == "torch" else "sglang"),
        ("hidden size", f"{target.hidden_size:,}"),
        ("layers", f"{target.num_layers}, a draft reads the inputs of {', '.join(map(str, target.aux_layers))}"),
        ("vocabulary", f"{target.vocab_size:,} tokens"),
        ("positions", f"{target.max_position:,}"),
        ("embedding", f"{places.embedding.name} in {places.embedding.file}"),
        ("head", _head(target)),
        ("final norm", f"{places.final_norm.name} in {places.final_norm.file}, {_norm(target)}"),
        ("rope of a draft", _rope(target.rope)),
        ("layer of a draft", f"{heads}, MLP of {shape.intermediate_size:,}"),
        ("vocabulary of a draft", f"{shape.vocab_size:,} tokens"),
    ]


def _head(target: TargetDescription) -> str:
    head = target.places.head
    text = "tied to the embedding" if head is None else f"{head.name} in {head.file}"
    scale = f", logits times {target.logit_scale:g}" if target.logit_scale != 1 else ""
    return text + scale + (f", soft cap {target.logit_cap:g}" if target.logit_cap else "")


def _norm(target: TargetDescription) -> str:
    kind = {"rms": "RMS norm", "layer": "layer norm"}[target.norm_kind]
    offset = ", 1 + stored weight" if target.norm_offset else ""
    return f"{kind}, epsilon {target.norm_eps:g}{offset}"


def _rope(rope: Rope) -> str:
    return f"base {rope.theta:,.0f}" + (
        f", scaled by {rope.kind}, factor {rope.factor:g}" if rope.kind != "default" else ""
    )
