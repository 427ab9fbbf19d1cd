"""The Job that downloads a user's draft and publishes it to the registry."""

from updraft_operator.api import names
from updraft_operator.api.draft_version import DraftVersion
from updraft_operator.api.speculator import AdaptiveSpeculator, Workload
from updraft_operator.manifests import network, pod
from updraft_operator.manifests.manifest import Manifest, OperatorConfig, manifest
from updraft_operator.manifests.model import model

_MOUNT = "/drafts"
_HOUR_S = 3600


def job(
    owner: AdaptiveSpeculator, draft: DraftVersion, name: str, config: OperatorConfig, *, is_first: bool
) -> Manifest:
    """Runs `updraft draft import`, whose termination message contains the version's number.

    The first version is checked against the target itself, because there is no earlier version to compare with.
    """
    uri = draft.spec.uri or ""
    volumes, mounts = [pod.token_volume(owner, "operate")], [pod.TOKEN_MOUNT]
    if uri.startswith("pvc://"):
        claim, _, folder = uri.removeprefix("pvc://").partition("/")
        volumes.append({"name": "draft", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
        mounts.append({"name": "draft", "mountPath": _MOUNT, "readOnly": True})
        uri = f"{_MOUNT}/{folder}".rstrip("/")
    secret = draft.spec.secret_ref
    target = (
        model(owner.spec.target_model, owner.spec.serving.model_cache, config.images, pod.RESTRICTED)
        if is_first
        else None
    )
    if target is not None:
        volumes += target.volumes
        mounts += target.mounts
    container = pod.container(
        "import",
        config.images.operator,
        config.images,
        Workload(),
        command=["updraft", "draft", "import", uri, "--output", "json", "--result", "/dev/termination-log"],
        args=[
            *("--registry", f"{names.child(owner.metadata.name, names.REGISTRY)}:{network.GRPC_PORT}"),
            *("--speculator", owner.metadata.name, "--token-file", f"{pod.ACCESS}/operate"),
            *(("--digest", draft.spec.digest) if draft.spec.digest else ()),
            *(("--target", target.path) if target is not None else ()),
        ],
        env=[{"name": "HF_HOME", "value": "/tmp/hf"}, {"name": "HOME", "value": "/tmp"}],  # noqa: S108 - of the container
        volumeMounts=mounts,
        **({"envFrom": [{"secretRef": {"name": secret.name}}]} if secret else {}),
    )
    parts = pod.PodParts(
        containers=[container],
        init_containers=target.init_containers if target is not None else (),
        volumes=volumes,
        more={"restartPolicy": "Never"},
    )
    template = pod.template(owner, names.IMPORT, parts, Workload(), config.images)
    built = manifest(
        owner,
        "batch/v1",
        "Job",
        name,
        names.IMPORT,
        spec={"backoffLimit": 3, "ttlSecondsAfterFinished": 24 * _HOUR_S, "template": template},
    )
    built["metadata"]["ownerReferences"] = [
        {
            "apiVersion": names.API_VERSION,
            "kind": "DraftVersion",
            "name": draft.metadata.name,
            "uid": draft.metadata.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]
    return built
