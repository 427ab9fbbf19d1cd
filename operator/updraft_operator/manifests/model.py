"""How a pod gets its target model: from the image, from a mounted volume, or by a download before it starts."""

from dataclasses import dataclass
from typing import Any

from updraft_operator.api.speculator import ModelCache, TargetModel
from updraft_operator.manifests.manifest import Images
from updraft_operator.manifests.pod import RESTRICTED

FOLDER = "/models"
_VOLUME = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMount:
    """The model's path in the pod, and the volumes and init containers that provide it."""

    path: str
    volumes: tuple[dict[str, Any], ...] = ()
    mounts: tuple[dict[str, Any], ...] = ()
    init_containers: tuple[dict[str, Any], ...] = ()


def model(target: TargetModel, cache: ModelCache | None, images: Images, *, is_head_only: bool = False) -> ModelMount:
    """`is_head_only` for a pod that does not run the model: of a download, it gets embedding, head and final norm only."""
    scheme, _, rest = target.uri.rpartition("://")
    if not scheme:
        return ModelMount(path=target.uri)
    if scheme == "pvc":
        claim, _, folder = rest.partition("/")
        return _mounted(folder, {"persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
    if scheme == "oci":
        return _mounted("", {"image": {"reference": rest, "pullPolicy": images.pull_policy}})
    return _downloaded(target, cache, images, is_head_only=is_head_only)


def served_name(target: TargetModel) -> str:
    """The model name in the API that clients use."""
    last = target.uri.rpartition("://")[2].rstrip("/").rsplit("/", maxsplit=1)[-1]
    return target.served_name or last.partition("@")[0] or "model"


def _mounted(folder: str, source: dict[str, Any]) -> ModelMount:
    mount = {"name": _VOLUME, "mountPath": FOLDER, "readOnly": True}
    path = f"{FOLDER}/{folder}".rstrip("/")
    return ModelMount(path=path, volumes=({"name": _VOLUME, **source},), mounts=(mount,))


def _downloaded(target: TargetModel, cache: ModelCache | None, images: Images, *, is_head_only: bool) -> ModelMount:
    """Downloaded by an init container, which leaves a complete folder unchanged."""
    folder = f"{FOLDER}/{_folder(target)}" + ("--head" if is_head_only else "")
    options = [
        *(("--revision", target.revision) if target.revision else ()),
        *(("--head-only",) if is_head_only else ()),
    ]
    download: dict[str, Any] = {
        "name": "model",
        "image": images.operator,
        "imagePullPolicy": images.pull_policy,
        "command": ["updraft", "model", "pull", target.uri, folder, *options],
        "securityContext": RESTRICTED,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "env": [{"name": "HF_HOME", "value": "/tmp/hf"}],  # noqa: S108 - of the container
        "volumeMounts": [{"name": _VOLUME, "mountPath": FOLDER}, {"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108
    }
    if target.secret_ref is not None:
        download["envFrom"] = [{"secretRef": {"name": target.secret_ref.name}}]
    return ModelMount(
        path=folder,
        volumes=({"name": _VOLUME, **_cache_volume(cache)},),
        mounts=({"name": _VOLUME, "mountPath": FOLDER, "readOnly": True},),
        init_containers=(download,),
    )


def _folder(target: TargetModel) -> str:
    """A separate folder per address and revision, so that several models can share a cache."""
    text = target.uri.replace("://", "/") + (f"@{target.revision}" if target.revision else "")
    return "".join(c if c.isalnum() or c in "-._" else "--" for c in text)


def _cache_volume(cache: ModelCache | None) -> dict[str, Any]:
    if cache is not None and cache.pvc is not None:
        return {"persistentVolumeClaim": {"claimName": cache.pvc.claim_name}}
    if cache is not None and cache.host_path is not None:
        return {"hostPath": {"path": cache.host_path.path, "type": "Directory"}}
    return {"emptyDir": {}}
