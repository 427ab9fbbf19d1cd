"""The Job that downloads a user's draft and publishes it to the registry."""

from updraft_operator.api import names
from updraft_operator.api.draft_import import DraftImport
from updraft_operator.api.speculator import AdaptiveSpeculator, Workload
from updraft_operator.manifests import pod
from updraft_operator.manifests.manifest import Manifest, OperatorConfig, manifest, owner_reference
from updraft_operator.manifests.model import ModelMount, model
from updraft_operator.manifests.tls import objects as tls

_MOUNT = "/drafts"
_HOUR_S = 3600


def job(
    owner: AdaptiveSpeculator, draft_import: DraftImport, name: str, config: OperatorConfig, *, is_first: bool
) -> Manifest:
    """Runs `updraft draft import`, whose termination message contains the version's number and digest.

    It is checked against the engine, because a draft that no pod can load is no start, and against the target itself, which
    drafts of other trainers need. A target in the image of the inference pods is not in this one's, so a later version is then
    compared with the earlier ones; `is_first`: there are none.
    """
    uri = draft_import.spec.uri
    volumes = [pod.token_volume(owner, "publish"), *tls.client_volumes(owner, config)]
    mounts = [pod.TOKEN_MOUNT, *tls.client_mounts(config)]
    if uri.startswith("pvc://"):
        claim, _, folder = uri.removeprefix("pvc://").partition("/")
        volumes.append({"name": "draft", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
        mounts.append({"name": "draft", "mountPath": _MOUNT, "readOnly": True})
        uri = f"{_MOUNT}/{folder}".rstrip("/")
    secret, target = draft_import.spec.secret_ref, ModelMount(path="")
    if is_first or "://" in owner.spec.target_model.uri:
        target = model(owner.spec.target_model, owner.spec.serving.model_cache, config.images, is_head_only=True)
    container = pod.container(
        "import",
        config.images.operator,
        config.images,
        Workload(),
        command=["updraft", "draft", "import", uri, "--output", "json", "--result", "/dev/termination-log"],
        args=[
            *("--registry", tls.registry_address(owner), *tls.client_arguments(config)),
            *("--speculator", owner.metadata.name, "--token-file", f"{pod.ACCESS}/publish"),
            *("--engine", owner.spec.engine.type.word),
            *(("--digest", draft_import.spec.digest) if draft_import.spec.digest else ()),
            *(("--target", target.path) if target.path else ()),
        ],
        env=[{"name": "HF_HOME", "value": "/tmp/hf"}, {"name": "HOME", "value": "/tmp"}],  # noqa: S108 - of the container
        volumeMounts=[*mounts, *target.mounts],
        **({"envFrom": [{"secretRef": {"name": secret.name}}]} if secret else {}),
    )
    parts = pod.PodParts(
        containers=[container],
        init_containers=target.init_containers,
        volumes=[*volumes, *target.volumes],
        more={"restartPolicy": "Never"},
    )
    template = pod.template(owner, names.IMPORT, parts, Workload(), config.images)
    spec = {"backoffLimit": 3, "ttlSecondsAfterFinished": 24 * _HOUR_S, "template": template}
    built = manifest(owner, "batch/v1", "Job", name, names.IMPORT, spec=spec)
    built["metadata"]["ownerReferences"] = [owner_reference("DraftImport", draft_import.metadata)]
    return built
