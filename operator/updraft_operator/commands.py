"""Commands of the operator's program: plan, check, release; and --dry-run, which plans every resource.

0  success; plan: nothing would change      1  failure
3  plan: something would change            2  wrong usage
"""

import argparse
import asyncio
import json
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from updraft_chassis.clock import SystemClock
from updraft_chassis.errors import Forbidden, InvalidInput, NotFound, Unavailable, UpdraftError
from updraft_chassis.settings import load
from updraft_operator.api import names
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests.dedicated import redis as dedicated
from updraft_operator.manifests.manifest import Manifest, OperatorConfig
from updraft_operator.manifests.tls import objects as tls
from updraft_operator.manifests.tls.terms import TlsMode
from updraft_operator.planning.objects import Key, Ref
from updraft_operator.planning.observed import Observed
from updraft_operator.planning.plan import Plan, make_plan, problems
from updraft_operator.planning.pods import Selection
from updraft_operator.planning.traces.places import servers_of
from updraft_operator.settings import OperatorSettings
from updraft_operator.watching.attached_pods import AttachedPods
from updraft_operator.watching.certificates import Certificates
from updraft_operator.watching.cluster import KINDS, LEADER_WORKER_SET, OURS
from updraft_operator.watching.kubernetes_cluster import KubernetesCluster, connected
from updraft_operator.watching.secrets import NO_SECRETS, Secrets, fresh_passwords
from updraft_operator.watching.store import Store, key_of

_UNCHANGED, _FAILED, _CHANGED = 0, 1, 3
_STOP_S, _POLL_S = 90.0, 1.0
_HIDDEN = "<hidden>"


def main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    if arguments.command == "check":
        raise SystemExit(_run(_check(arguments.url)))
    settings = load(OperatorSettings)
    if arguments.command == "release":
        raise SystemExit(_run(_release(settings, arguments.deployment)))
    if arguments.command == "plan":
        raise SystemExit(_run(_plan_files(settings, arguments)))
    if arguments.dry_run:
        raise SystemExit(_run(_plan_all(settings, arguments)))
    from updraft_operator import process  # noqa: PLC0415 - kopf takes a second

    process.run(settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="updraft-operator",
        description="Reconcile AdaptiveSpeculators. Settings are UPDRAFT_OPERATOR_* environment variables.",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what the operator would do now, then exit")
    parser.add_argument("--output", choices=("text", "yaml", "json"), default="text", help="output format of --dry-run")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    plan = commands.add_parser("plan", help="show the objects that AdaptiveSpeculators would create or change")
    text = "YAML or JSON with AdaptiveSpeculators; - reads standard input; repeatable"
    plan.add_argument("-f", "--file", action="append", required=True, help=text)
    plan.add_argument("--output", choices=("text", "yaml", "json"), default="text")
    plan.add_argument("--offline", action="store_true", help="do not contact a cluster; show everything as new")
    check = commands.add_parser("check", help="check that all kinds are served and that an operator is ready")
    check.add_argument("--url", default="", help="URL of the operator's /readyz")
    text = "remove the operator's finalizer from all resources, before an uninstall"
    release = commands.add_parser("release", help=text)
    text = "the operator's Deployment, scaled to 0 first so that it does not restore the finalizers"
    release.add_argument("--deployment", default="", help=text)
    return parser


def _run(work: Any) -> int:
    try:
        return int(asyncio.run(work))
    except UpdraftError as error:
        print(f"updraft-operator: {error}", file=sys.stderr)
        return _FAILED


async def _plan_files(settings: OperatorSettings, arguments: argparse.Namespace) -> int:
    owners = [owner for file in arguments.file for owner in _read(file)]
    if arguments.offline:
        return _show([(owner, await _planned(None, settings, owner, Store())) for owner in owners], arguments.output)
    planned = []
    async with connected(_no_writes) as cluster:
        for owner in [await _served(cluster, owner) for owner in owners]:
            key = Key(owner.metadata.namespace, owner.metadata.name)
            store = await _listed(cluster, key.namespace, key, has_certificates=_has_certificates(settings))
            planned.append((owner, await _planned(cluster, settings, owner, store)))
    return _show(planned, arguments.output)


async def _plan_all(settings: OperatorSettings, arguments: argparse.Namespace) -> int:
    planned: list[tuple[AdaptiveSpeculator, Plan]] = []
    async with connected(_no_writes) as cluster:
        for namespace in settings.namespaces or ("",):
            store = await _listed(cluster, namespace, None, has_certificates=_has_certificates(settings))
            for key in sorted(store.speculators()):
                owner = store.cached(key).speculator
                if owner is not None:
                    planned.append((owner, await _planned(cluster, settings, owner, store)))
    return _show(planned, arguments.output)


def _no_writes() -> None:
    raise Unavailable("nothing is written in a dry run")


def _read(file: str) -> list[AdaptiveSpeculator]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        documents = [document for document in yaml.safe_load_all(text) if document]
    except OSError as error:
        raise InvalidInput(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    bodies = [body for body in documents if isinstance(body, dict) and body.get("kind") == "AdaptiveSpeculator"]
    if not bodies:
        raise InvalidInput(f"{file} contains no AdaptiveSpeculator")
    for body in bodies:
        metadata = body.get("metadata") or {}
        if not isinstance(metadata, dict):
            raise InvalidInput(f"{file}: metadata is not an object")
        body["metadata"] = {"namespace": "default", "uid": "", **metadata}
    try:
        return [AdaptiveSpeculator.model_validate(body) for body in bodies]
    except ValueError as error:
        problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]  # type: ignore[attr-defined]
        raise InvalidInput(f"{file}: {'; '.join(problems)}") from error


async def _served(cluster: KubernetesCluster, owner: AdaptiveSpeculator) -> AdaptiveSpeculator:
    """The resource with the metadata and status of the live one, if it exists."""
    try:
        live = await cluster.get("AdaptiveSpeculator", owner.metadata.namespace, owner.metadata.name)
    except NotFound:
        return owner
    served = AdaptiveSpeculator.model_validate(live)
    return owner.model_copy(update={"metadata": served.metadata, "status": served.status})


async def _listed(cluster: KubernetesCluster, namespace: str, only: Key | None, *, has_certificates: bool) -> Store:
    store = Store()
    for kind in await cluster.kinds(has_certificates=has_certificates):
        for listed in await cluster.metadata(kind, namespace):
            if only is None or key_of(kind, listed) in (None, only):  # None: the spec says it, which is not listed
                metadata = listed["metadata"]
                store.put(kind, await cluster.get(kind, metadata["namespace"], metadata["name"]))
    return store


async def _planned(
    cluster: KubernetesCluster | None, settings: OperatorSettings, owner: AdaptiveSpeculator, store: Store
) -> Plan:
    key, clock = Key(owner.metadata.namespace, owner.metadata.name), SystemClock()
    cached, config, secrets = store.cached(key), settings.config, NO_SECRETS
    attached = Selection()
    if cluster is not None:
        parts = servers_of(owner, config.tls, cached.children, has_dedicated=config.has_dedicated_redis)
        secrets = await Secrets(cluster, clock).read(key, owner, parts=parts)
        attached = await AttachedPods(cluster, clock).read(key, owner)
        has_sets = LEADER_WORKER_SET in await cluster.kinds()
        config = replace(config, has_leader_worker_sets=has_sets, issuer=await cluster.issuer())
        config = replace(config, installation=await _installation(cluster, config))
        last = cached.children.get(Ref("ConfigMap", tls.ca_name(key.name)))
        config = (await _certificates(cluster, settings)).trusted(config, secrets.certificates, last)
    observed = Observed(
        speculator=owner,
        config=config,
        children=cached.children,
        pods=(*cached.pods, *attached.states),
        attached=attached,
        drafts=cached.drafts,
        imports=cached.imports,
        redis_url=settings.redis_url.get_secret_value(),
        redis_urls=secrets.redis_urls,
        certificates=secrets.certificates,
        dedicated_url=dedicated.url(b"", settings.redis_address, *key, has_tls=config.tls.is_on)
        if config.has_dedicated_redis
        else "",
        dedicated_urls=secrets.dedicated_urls,
        rotations=secrets.rotations,
        is_preview=True,
        fresh_passwords=fresh_passwords(),
        missing_secrets=secrets.missing,
    )
    return make_plan(observed, now_unix_s=clock.now(), now_s=clock.monotonic())


def _has_certificates(settings: OperatorSettings) -> bool:
    return settings.tls_mode is TlsMode.CERT_MANAGER


async def _certificates(cluster: KubernetesCluster, settings: OperatorSettings) -> Certificates:
    """With the CA of the running operator, if this user may read it."""
    own, clock = settings.own_secrets, SystemClock()
    known = Certificates(cluster, settings.config, own, clock, may_write=lambda: False, on_change=lambda: None)
    try:
        await known.read()
    except Forbidden as error:
        print(f"updraft-operator: certificates are not shown: {error}", file=sys.stderr)
    return known


async def _installation(cluster: KubernetesCluster, config: OperatorConfig) -> str:
    try:
        return await cluster.uid(config.namespace)
    except (NotFound, Forbidden) as error:
        problem = f"stream keys are shown without the UID of the operator's namespace: {error}"
        print(f"updraft-operator: {problem}", file=sys.stderr)
        return config.installation


def _show(planned: list[tuple[AdaptiveSpeculator, Plan]], form: str) -> int:
    changes = [change for owner, plan in planned for change in _changes(owner, plan)]
    updates = [update for owner, plan in planned for update in _updates(owner, plan)]
    for owner, _ in planned:
        for problem in problems(owner.spec).values():
            print(f"updraft-operator: {owner.metadata.namespace}/{owner.metadata.name}: {problem}", file=sys.stderr)
    if form == "json":
        print(json.dumps([content for _, _, content in changes], indent=2))
    elif form == "yaml":
        print(yaml.safe_dump_all([content for _, _, content in changes], sort_keys=False), end="")
    else:
        for verb, name, content in changes:
            print(f"{verb:<7} {content['kind']}/{content['metadata']['name']}  for {name}")
        for update in updates:
            print(update)
        print(f"{len(changes)} objects would be applied or deleted." if changes or updates else "Nothing would change.")
    return _CHANGED if changes or updates else _UNCHANGED


def _changes(owner: AdaptiveSpeculator, plan: Plan) -> Iterator[tuple[str, str, Manifest]]:
    name = f"{owner.metadata.namespace}/{owner.metadata.name}"
    for order in plan.certificates:
        yield "apply", name, _without_secrets(tls.secret(owner, order, dict.fromkeys((tls.CA, tls.CERT, tls.KEY), "")))
    for content in plan.apply:
        yield "apply", name, _without_secrets(content)
    for ref in plan.delete:
        content = {"apiVersion": KINDS[ref.kind].prefix, "kind": ref.kind, "metadata": {"name": ref.name}}
        yield "delete", name, content


def _updates(owner: AdaptiveSpeculator, plan: Plan) -> Iterator[str]:
    """Restarts that wait for their turn, and when that is."""
    if plan.upgrade is not None and plan.upgrade.held:
        yield f"update  {owner.metadata.namespace}/{owner.metadata.name}: {plan.upgrade.says.message}"


def _without_secrets(content: Manifest) -> Manifest:
    if content["kind"] != "Secret":
        return content
    return {**content, "stringData": dict.fromkeys(content.get("stringData", {}), _HIDDEN)}


async def _check(url: str) -> int:
    """For `helm test`."""
    async with connected(_no_writes) as cluster:
        missing = set(OURS) - await cluster.served(KINDS["DraftVersion"].prefix)
        if missing:
            raise NotFound(f"the API server does not serve {', '.join(sorted(missing))}; install the CRDs")
    if url:
        await asyncio.to_thread(_ask, url)
    print("All kinds are served" + (" and the operator is ready." if url else "."))
    return 0


def _ask(url: str) -> None:
    try:
        context = ssl._create_unverified_context()  # noqa: S323, SLF001 - the operator's own certificate is of no CA
        with urllib.request.urlopen(url, timeout=10, context=context) as answer:  # noqa: S310 - given by the chart
            answer.read()
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise Unavailable(f"the operator is not ready at {url}: {error}") from error


async def _stop(cluster: KubernetesCluster, namespace: str, name: str) -> None:
    """Scale the operator to 0 and wait. Unavailable if its pods do not stop."""
    try:
        await cluster.scale("Deployment", namespace, name, 0)
        async with asyncio.timeout(_STOP_S):
            while (await cluster.get("Deployment", namespace, name)).get("status", {}).get("replicas"):  # noqa: ASYNC110 - of a cluster
                await asyncio.sleep(_POLL_S)
    except NotFound:
        return
    except TimeoutError as error:
        raise Unavailable(f"the operator's pods did not stop within {_STOP_S:.0f} s") from error


async def _release(settings: OperatorSettings, deployment: str) -> int:
    """Remove the finalizer from every resource: without an operator, they could not be deleted."""
    count = 0
    async with connected() as cluster:
        if deployment:
            await _stop(cluster, settings.namespace, deployment)
        for namespace in settings.namespaces or ("",):
            for listed in await cluster.metadata("AdaptiveSpeculator", namespace):
                metadata = listed["metadata"]
                left = [name for name in metadata.get("finalizers", []) if name != names.FINALIZER]
                if left != metadata.get("finalizers", []):
                    patch = {"metadata": {"finalizers": left}}
                    await cluster.merge("AdaptiveSpeculator", metadata["namespace"], metadata["name"], patch)
                    count += 1
    print(f"Removed the finalizer {names.FINALIZER} from {count} resources.")
    return 0
