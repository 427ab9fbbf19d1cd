"""`kubectl updraft attach`: prints how to attach an AdaptiveSpeculator to a workload, and changes nothing."""

import textwrap
from typing import Any

import click
import yaml

from updraft_chassis.errors import InvalidInput
from updraft_cli.attach import workload as attaching
from updraft_cli.backends.cluster import ClusterBackend
from updraft_cli.cmd.program import Command

_OF_WORKLOADS = ("patch", "kustomize")
_FORMS = (*_OF_WORKLOADS, "llmisvcconfig", "policy")


@click.command(cls=Command, needs=("connection",))
@click.argument("name")
@click.argument("workload", required=False, metavar="[TYPE/NAME]")
@click.option(
    *("-o", "--output", "form"),
    type=click.Choice(_FORMS),
    default="patch",
    show_default=True,
    help="patch: for `kubectl patch`; kustomize: a component; llmisvcconfig: for the baseRefs of a KServe service;"
    " policy: a MutatingAdmissionPolicy for pods with a label.",
)
def attach(backend: ClusterBackend, name: str, workload: str | None, form: str) -> None:
    """Print how to attach an AdaptiveSpeculator of mode Attached to your workload. Nothing is changed.

    \b
    kubectl updraft attach chat deployment/vllm > patch.yaml
    kubectl patch deployment vllm --patch-file patch.yaml
    kubectl updraft attach chat deployment/vllm -o kustomize > updraft/kustomization.yaml
    kubectl updraft attach chat -o llmisvcconfig | kubectl apply -f -
    kubectl updraft attach chat -o policy | kubectl apply -f -

    The workload is read from the cluster, because its own arguments and PYTHONPATH stay in force. Types: deployment,
    statefulset, and leaderworkerset (with `kubectl patch --type merge`).
    """
    from updraft_cli.attach import admission, cluster  # noqa: PLC0415 - only this command needs them
    from updraft_cli.backends.cluster_client import connected  # noqa: PLC0415 - as above

    _check(name, workload, form)
    with connected(backend.context) as client:
        addition, namespace = cluster.addition(client, name), client.namespace
        theirs = cluster.workload(client, workload) if workload is not None else {}
    made: list[Any]
    if form == "patch":
        made = [attaching.patch(addition, theirs)]
        for line in textwrap.wrap(attaching.warning(addition, theirs), 120):
            click.echo(f"# {line}")
    elif form == "kustomize":
        made = [attaching.kustomization(addition, theirs)]
    elif form == "policy":
        made = admission.policy(addition, name, namespace)
    else:
        made = [attaching.inference_service_config(addition, name)]
    click.echo(yaml.dump_all(made, Dumper=_Dumper, sort_keys=False, width=128), nl=False)


def _check(name: str, workload: str | None, form: str) -> None:
    """Raise InvalidInput unless a workload is named exactly where one is needed."""
    if form not in _OF_WORKLOADS and workload is not None:
        raise InvalidInput(f"-o {form} is for all workloads that ask for it: leave TYPE/NAME out")
    if form in _OF_WORKLOADS and workload is None:
        example = f"kubectl updraft attach {name} deployment/vllm"
        raise InvalidInput(f"name the workload to attach to, for example: {example}")


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines as such."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
