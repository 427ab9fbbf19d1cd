"""What the operator's program does besides running: plan, check, release; and --dry-run, which is a plan for everything.

0  done; a plan: nothing would change      1  it could not be done
3  a plan: something would change          2  wrong usage
"""

import argparse
import asyncio
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import yaml

from updraft_chassis import settings
from updraft_chassis.errors import InvalidInput, NotFound, Unavailable, UpdraftError
from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests.manifest import Manifest
from updraft_operator.planning.objects import Key
from updraft_operator.planning.observed import Observed
from updraft_operator.planning.plan import Plan, plan
from updraft_operator.settings import OperatorSettings
from updraft_operator.watching.cluster import CHILDREN, KINDS
from updraft_operator.watching.kubernetes_cluster import KubernetesCluster, connected
from updraft_operator.watching.secrets import Secrets, fresh_tokens
from updraft_operator.watching.store import Store, key_of

_UNCHANGED, _FAILED, _CHANGED = 0, 1, 3
_STOP_S, _POLL_S = 90.0, 1.0
_HIDDEN = "<hidden>"


def main(arguments: list[str]) -> None:
    """Run the operator, or one command; exits the process."""
    said = _parser().parse_args(arguments)
    if said.command is None:
        config = settings.load(OperatorSettings)
        if not said.dry_run:
            from updraft_operator import process  # noqa: PLC0415 - kopf takes a second

            process.run(config)
            return
        raise SystemExit(_run(_plan_all(config, said)))
    if said.command == "check":
        raise SystemExit(_run(_check(said.url)))
    config = settings.load(OperatorSettings)
    raise SystemExit(_run(_release(config, said.deployment) if said.command == "release" else _plan_file(config, said)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="updraft-operator",
        description="Looks after AdaptiveSpeculators; settings are UPDRAFT_OPERATOR_* variables.",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done now, do nothing, and exit")
    parser.add_argument("--output", choices=("text", "yaml", "json"), default="text", help="of --dry-run")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    one = commands.add_parser("plan", help="what one AdaptiveSpeculator would become, or what would change")
    one.add_argument("-f", "--file", required=True, help="the resource in YAML or JSON; - reads it from the input")
    one.add_argument("--output", choices=("text", "yaml", "json"), default="text")
    one.add_argument("--offline", action="store_true", help="ask no cluster: everything is created")
    check = commands.add_parser("check", help="whether both kinds are served and an operator is ready")
    check.add_argument("--url", default="", help="of the operator's /readyz")
    release = commands.add_parser("release", help="take our finalizer off all resources, before an uninstall")
    release.add_argument("--deployment", default="", help="the operator's own, stopped first: it would put them back")
    return parser


def _run(work: Any) -> int:
    try:
        return int(asyncio.run(work))
    except UpdraftError as error:
        print(f"updraft-operator: {error}", file=sys.stderr)
        return _FAILED


async def _plan_file(config: OperatorSettings, said: argparse.Namespace) -> int:
    owner = _read(said.file)
    if said.offline:
        return _show([(owner, _planned(config, owner, Store()))], said.output)
    async with connected(_no_writes) as cluster:
        owner = await _served(cluster, owner)
        store = await _listed(cluster, owner.metadata.namespace, Key(owner.metadata.namespace, owner.metadata.name))
        return _show([(owner, await _planned_with(cluster, config, owner, store))], said.output)


async def _plan_all(config: OperatorSettings, said: argparse.Namespace) -> int:
    planned: list[tuple[AdaptiveSpeculator, Plan]] = []
    async with connected(_no_writes) as cluster:
        for namespace in config.namespaces or ("",):
            store = await _listed(cluster, namespace, None)
            for key in sorted(store.speculators()):
                owner = store.known(key).speculator
                if owner is not None:
                    planned.append((owner, await _planned_with(cluster, config, owner, store)))
    return _show(planned, said.output)


def _no_writes() -> None:
    raise Unavailable("this is a dry run: nothing is written")


def _read(file: str) -> AdaptiveSpeculator:
    try:
        text = sys.stdin.read() if file == "-" else open(file, encoding="utf-8").read()  # noqa: PTH123, SIM115
        documents = [each for each in yaml.safe_load_all(text) if each]
    except OSError as error:
        raise InvalidInput(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    found = [each for each in documents if isinstance(each, dict) and each.get("kind") == "AdaptiveSpeculator"]
    if len(found) != 1:
        raise InvalidInput(f"{file} holds {len(found)} AdaptiveSpeculators; expected one")
    body = {**found[0], "metadata": {"namespace": "default", "uid": "", **found[0].get("metadata", {})}}
    try:
        return AdaptiveSpeculator.model_validate(body)
    except ValueError as error:
        problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]  # type: ignore[attr-defined]
        raise InvalidInput(f"{file}: {'; '.join(problems)}") from error


async def _served(cluster: KubernetesCluster, owner: AdaptiveSpeculator) -> AdaptiveSpeculator:
    """With the identity of the one that is there, if one is."""
    try:
        live = await cluster.get("AdaptiveSpeculator", owner.metadata.namespace, owner.metadata.name)
    except NotFound:
        return owner
    found = AdaptiveSpeculator.model_validate(live)
    return owner.model_copy(update={"metadata": found.metadata, "status": found.status})


async def _listed(cluster: KubernetesCluster, namespace: str, only: Key | None) -> Store:
    store = Store()
    for kind in ("AdaptiveSpeculator", "DraftVersion", *CHILDREN, "Pod"):
        for each in await cluster.metadata(kind, namespace):
            key = key_of(kind, each) if kind != "DraftVersion" else None
            if only is None or kind == "DraftVersion" or key == only:
                metadata = each["metadata"]
                store.put(kind, await cluster.get(kind, metadata["namespace"], metadata["name"]))
    return store


async def _planned_with(
    cluster: KubernetesCluster, config: OperatorSettings, owner: AdaptiveSpeculator, store: Store
) -> Plan:
    from updraft_chassis.clock import SystemClock  # noqa: PLC0415

    found = await Secrets(cluster, SystemClock()).look(Key(owner.metadata.namespace, owner.metadata.name), owner)
    return _planned(config, owner, store, access=found.access, missing_secrets=found.missing)


def _planned(config: OperatorSettings, owner: AdaptiveSpeculator, store: Store, **more: Any) -> Plan:
    known = store.known(Key(owner.metadata.namespace, owner.metadata.name))
    seen = Observed(
        speculator=owner,
        around=config.surroundings,
        children=known.children,
        pods=known.pods,
        drafts=known.drafts,
        redis_url=config.redis_url.get_secret_value(),
        fresh_tokens=fresh_tokens(),
        **more,
    )
    return plan(seen, now_unix_s=time.time(), now_s=time.monotonic())


def _show(planned: list[tuple[AdaptiveSpeculator, Plan]], form: str) -> int:
    changes = [change for owner, made in planned for change in _changes(owner, made)]
    if form == "json":
        print(json.dumps([content for _, _, content in changes], indent=2))
    elif form == "yaml":
        print(yaml.safe_dump_all([content for _, _, content in changes], sort_keys=False), end="")
    else:
        for verb, name, content in changes:
            print(f"{verb:<7} {content['kind']}/{content['metadata']['name']}  of {name}")
        print(f"{len(changes)} objects would be applied or deleted." if changes else "Nothing would change.")
    return _CHANGED if changes else _UNCHANGED


def _changes(owner: AdaptiveSpeculator, made: Plan) -> Iterator[tuple[str, str, Manifest]]:
    name = f"{owner.metadata.namespace}/{owner.metadata.name}"
    for content in made.apply:
        yield "apply", name, _without_secrets(content)
    for each in made.delete:
        content = {"apiVersion": KINDS[each.kind].prefix, "kind": each.kind, "metadata": {"name": each.name}}
        yield "delete", name, content


def _without_secrets(content: Manifest) -> Manifest:
    if content["kind"] != "Secret":
        return content
    return {**content, "stringData": dict.fromkeys(content.get("stringData", {}), _HIDDEN)}


async def _check(url: str) -> int:
    """For `helm test`."""
    async with connected(_no_writes) as cluster:
        missing = {"AdaptiveSpeculator", "DraftVersion"} - await cluster.served(KINDS["DraftVersion"].prefix)
        if missing:
            raise NotFound(f"the API server does not serve {', '.join(sorted(missing))}: install the CRDs")
    if url:
        await asyncio.to_thread(_ask, url)
    print("Both kinds are served" + (" and the operator is ready." if url else "."))
    return 0


def _ask(url: str) -> None:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - given by the chart
            answer.read()
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise Unavailable(f"the operator is not ready at {url}: {error}") from error


async def _stop(cluster: KubernetesCluster, namespace: str, name: str) -> None:
    """End the operator's pods; one that is not there has ended. Unavailable if they stay."""
    try:
        await cluster.scale("Deployment", namespace, name, 0)
        async with asyncio.timeout(_STOP_S):
            while (await cluster.get("Deployment", namespace, name)).get("status", {}).get("replicas"):  # noqa: ASYNC110 - of a cluster
                await asyncio.sleep(_POLL_S)
    except NotFound:
        return
    except TimeoutError as error:
        raise Unavailable(f"the operator's pods did not end within {_STOP_S:.0f} s") from error


async def _release(config: OperatorSettings, deployment: str) -> int:
    """Nobody would do it once the operator is gone, and the resources could not be deleted."""
    count = 0
    async with connected() as cluster:
        if deployment:
            await _stop(cluster, config.namespace, deployment)
        for namespace in config.namespaces or ("",):
            for each in await cluster.metadata("AdaptiveSpeculator", namespace):
                metadata = each["metadata"]
                left = [name for name in metadata.get("finalizers", []) if name != names.FINALIZER]
                if left != metadata.get("finalizers", []):
                    patch = {"metadata": {"finalizers": left}}
                    await cluster.merge("AdaptiveSpeculator", metadata["namespace"], metadata["name"], patch)
                    count += 1
    print(f"The finalizer {names.FINALIZER} was taken off {count} resources.")
    return 0
