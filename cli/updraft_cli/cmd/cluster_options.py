"""How `kubectl updraft` reaches a cluster: as kubectl does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from updraft_cli.backends.cluster import ClusterBackend
from updraft_cli.backends.cluster_client import KubeContext, contexts
from updraft_cli.cmd.program import BackendOptions


def connect(given: Mapping[str, Any], speculator: str | None, **_: bool) -> ClusterBackend:
    context = KubeContext(
        kubeconfig=given.get("kubeconfig"),
        context=given.get("context"),
        namespace=given.get("namespace"),
        is_everywhere=given.get("all_namespaces", False),
    )
    return ClusterBackend(
        context=context,
        speculator=speculator or given.get("speculator") or "",
        is_dry_run=given.get("dry_run") == "server",
    )


def _complete_context(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    known = contexts(ctx.params.get("kubeconfig"))
    return [CompletionItem(name) for name in known if name.startswith(incomplete)]


_DRY_RUN = click.Option(
    ["--dry-run"],
    type=click.Choice(["none", "server"]),
    default="none",
    show_default=True,
    help="server: the API server checks the change and does not keep it.",
)

CLUSTER = BackendOptions(
    title="Cluster",
    connect=connect,
    left_out=frozenset(
        {  # the CRD has no such fields
            "analysis_confidence",
            *("offline_gate_min_samples", "offline_gate_min_gain_percent", "offline_gate_confidence"),
        }
    ),
    by_need={
        "connection": (
            click.Option(
                ["--speculator"],
                metavar="NAME",
                help="The AdaptiveSpeculator, where NAME is not given.  [default: the only one of the namespace]",
            ),
            click.Option(
                ["-n", "--namespace"],
                metavar="NAME",
                help="The namespace.  [default: that of the kubeconfig's context]",
            ),
            click.Option(
                ["--context"],
                metavar="NAME",
                shell_complete=_complete_context,
                help="The context in the kubeconfig.  [default: the current one]",
            ),
            click.Option(
                ["--kubeconfig"],
                type=click.Path(path_type=Path, dir_okay=False),
                metavar="FILE",
                help="The kubeconfig.  [default: as kubectl finds it]",
            ),
        ),
        "decision": (_DRY_RUN,),
        "change": (_DRY_RUN,),
        "listing": (click.Option(["-A", "--all-namespaces"], is_flag=True, help="In all namespaces."),),
    },
)
