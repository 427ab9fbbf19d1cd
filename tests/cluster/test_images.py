"""Our four images as they are, without a node: what they say, what runs in them, and what is not in them."""

import json
from collections.abc import Iterator

import pytest
from tests.cluster import cluster, debian, updraft_images
from tests.cluster.dockerfiles import Builder
from tests.cluster.programs import CHECKOUT
from tests.cluster.updraft_images import EXTRAS, Container, Images

from updraft_artifacts.digests import file_digest

pytestmark = [pytest.mark.timeout(1200), pytest.mark.lasts(120)]

_COMPILERS = ("gcc", "cc", "g++", "c++", "clang", "ld", "as", "make", "cargo", "go")
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"

# Beside what the chroot of the tests shows of this machine.
_WRITABLE = {"/tmp", "/var/tmp", "/run/lock"}
_SHOWN = ("/proc", "/sys", "/dev", "/run/secrets")


@pytest.fixture(scope="module")
def images() -> Images:
    if why := cluster.obstacle():
        pytest.skip(why)
    return updraft_images.built()


@pytest.fixture(scope="module", params=EXTRAS)
def extra(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def container(images: Images, extra: str) -> Iterator[Container]:
    with images.container(extra) as made:
        yield made


@pytest.mark.attack(
    boundary="images",
    attack="a program in an image that is taken over",
    outcome="it runs as a user without rights",
)
def test_an_image_runs_its_program_as_a_user_without_rights(images: Images, extra: str) -> None:
    config = images.inspect(extra)["config"]
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == [f"updraft-{extra}"]
    assert "Cmd" not in config
    assert "Healthcheck" not in config


def test_an_image_says_what_it_is(images: Images, extra: str) -> None:
    labels = images.inspect(extra)["config"]["Labels"]
    said = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert said["title"] == f"updraft-{extra}"
    assert (said["version"], said["revision"]) == (updraft_images.VERSION, updraft_images.REVISION)
    assert said["licenses"] == "Apache-2.0"


def test_a_program_tells_what_is_wrong_with_its_settings_and_ends_with_2(container: Container, extra: str) -> None:
    code, output = container.run(f"updraft-{extra}", variables=[f"UPDRAFT_{extra.upper()}_NO_SUCH_THING=1"])
    assert code == 2, output
    assert f"UPDRAFT_{extra.upper()}_NO_SUCH_THING: no such setting; the closest is " in output
    assert "Traceback" not in output


@pytest.mark.attack(
    boundary="images",
    attack="OpenShift's arbitrary user: a number without a name, of group 0",
    outcome="programs start, and can write to folders for scratch only",
)
def test_a_user_without_a_name_runs_the_program_and_writes_nowhere_else(container: Container, extra: str) -> None:
    nameless = "1000680000:0"
    variables = [f"UPDRAFT_{extra.upper()}_NO_SUCH_THING=1"]
    code, output = container.run(f"updraft-{extra}", variables=variables, user=nameless)
    assert (code, "Traceback" in output) == (2, False), output
    script = "import getpass, pathlib, tempfile; print(getpass.getuser(), pathlib.Path.home(), tempfile.gettempdir())"
    assert container.run("python", "-c", script, user=nameless) == (0, "updraft /tmp /tmp")
    hidden = [word for path in _SHOWN for word in ("-path", path, "-prune", "-o")]
    _, found = container.run("find", "/", *hidden, "-not", "-type", "l", "-writable", "-print", user=nameless)
    assert {path for path in found.splitlines() if not path.startswith("find: ")} <= _WRITABLE


def test_the_user_can_write_to_folders_for_scratch_only(container: Container) -> None:
    code, output = container.run("id", "-u")
    assert (code, output) == (0, "65532")
    hidden = [word for path in _SHOWN for word in ("-path", path, "-prune", "-o")]
    _, found = container.run("find", "/", *hidden, "-not", "-type", "l", "-writable", "-print")
    assert {path for path in found.splitlines() if not path.startswith("find: ")} <= _WRITABLE


def test_no_image_has_a_compiler_or_a_second_pip(container: Container) -> None:
    _, found = container.run("which", *_COMPILERS)
    assert found == ""
    assert container.run("python", "-c", "import pip")[0] == 1


def test_our_code_comes_with_its_bytecode(container: Container) -> None:
    script = (
        "import importlib.util as u, pathlib, sysconfig;"
        "found = [p for p in pathlib.Path(sysconfig.get_path('purelib')).rglob('updraft*/**/*.py')];"
        "print(len(found) > 50, [p for p in found if not pathlib.Path(u.cache_from_source(str(p))).exists()])"
    )
    assert container.run("python", "-c", script) == (0, "True []")


def test_nothing_of_the_machine_that_built_it_is_in_an_image(images: Images, container: Container, extra: str) -> None:
    told = str(images.inspect(extra))
    assert str(CHECKOUT) not in told
    assert container.run("grep", "-rIlF", str(CHECKOUT), "/opt/venv", "/etc", user="0") == (1, "")
    assert container.run("test", "-s", "/etc/pip.conf")[0] == 1  # buildah leaves an empty file where it was shown
    assert container.run("sha256sum", _CERTIFICATES)[1] == _certificates_of_base(images.builder)


def test_only_what_the_dockerfile_copies_comes_into_an_image(container: Container) -> None:
    assert container.run("find", "/source", "/wheels", "/build", user="0")[0] == 1
    packages = [
        *(CHECKOUT / "libs").iterdir(),
        *(CHECKOUT / "services").iterdir(),
        CHECKOUT / "operator",
        CHECKOUT / "cli",
    ]
    ours = {path.name for folder in packages for path in folder.glob("updraft_*")}
    _, found = container.run("find", "/opt/venv/lib", "-maxdepth", "3", "-name", "updraft*", "-printf", "%f\n")
    assert set(found.split()) == {*ours, "updraft", f"updraft-{updraft_images.VERSION}.dist-info"}
    _, locks = container.run("ls", "/opt/venv/requirements")
    assert {name.removesuffix(".lock") for name in locks.split()} - {"torch"} <= set(EXTRAS)


def test_trainer_and_inference_share_all_layers_up_to_torch(images: Images) -> None:
    layers = {extra: images.inspect(extra)["rootfs"]["diff_ids"] for extra in ("trainer", "inference")}
    shared = [one for one, other in zip(layers["trainer"], layers["inference"], strict=True) if one == other]
    made = [step["created_by"] for step in images.inspect("trainer")["history"] if not step.get("empty_layer")]
    (torch,) = [number for number, step in enumerate(made) if "torch.lock" in step and "pip" in step]
    assert layers["trainer"][: torch + 1] == shared[: torch + 1]


def test_what_a_node_loads_has_all_images_and_each_layer_once(images: Images) -> None:
    blobs = images.layout() / "blobs" / "sha256"
    index = json.loads((images.layout() / "index.json").read_text())
    used = {entry["digest"] for entry in index["manifests"]}
    for entry in index["manifests"]:
        manifest = json.loads((blobs / entry["digest"].removeprefix("sha256:")).read_text())
        for part in (manifest["config"], *manifest["layers"]):
            assert (blobs / part["digest"].removeprefix("sha256:")).stat().st_size == part["size"] > 0
            used.add(part["digest"])
    names = {entry["annotations"]["org.opencontainers.image.ref.name"] for entry in index["manifests"]}
    assert names == {updraft_images.reference(extra) for extra in EXTRAS}
    assert {f"sha256:{path.name}" for path in blobs.iterdir()} == used
    small = [path for path in blobs.iterdir() if path.stat().st_size < 200_000_000]
    assert all(file_digest(path) == f"sha256:{path.name}" for path in small)


@pytest.mark.parametrize(
    ("extra_", "modules", "absent"),
    [
        pytest.param(
            "operator", "updraft_operator, updraft_cli, kopf, huggingface_hub, obstore", "torch", id="operator"
        ),
        pytest.param("registry", "updraft_registry.process, obstore", "torch", id="registry"),
        pytest.param("trainer", "updraft_trainer.process, torch", "starlette", id="trainer"),
        pytest.param("inference", "updraft_inference.process, torch", "kopf", id="inference"),
    ],
)
def test_an_image_has_what_its_program_needs_and_not_what_others_need(
    images: Images, extra_: str, modules: str, absent: str
) -> None:
    with images.container(extra_) as container:
        assert container.run("python", "-c", f"import {modules}") == (0, "")
        assert container.run("python", "-c", f"import {absent}")[0] == 1


def test_the_inference_image_has_the_kernels_of_all_cpus(images: Images) -> None:
    script = (
        "import torch; from updraft_kernels.loader import *;"
        "print(*sorted(path.stem.partition('-')[0] for path in FOLDER.glob('*.so')));"
        "print([load_variant(variant).variant for variant in supported_variants()] == supported_variants())"
    )
    with images.container("inference") as container:
        assert container.run("python", "-c", script) == (0, "amx avx2 avx512 vnni\nTrue")


def test_the_operator_image_downloads_models_and_imports_drafts(images: Images) -> None:
    with images.container("operator") as container:
        assert container.run("updraft", "--version") == (0, f"updraft {updraft_images.VERSION}")
        code, output = container.run("updraft", "model", "pull", "pvc://claim/model", "/tmp/model")
        assert code == 1
        assert output.startswith("Error: pvc://claim/model is a mounted volume or a local path")
        assert container.run("updraft", "draft", "import", "--help")[0] == 0


def _certificates_of_base(builder: Builder) -> str:
    name = builder.buildah("from", "--pull=never", debian.PYTHON).strip()
    try:
        return Container(builder, name).run("sha256sum", _CERTIFICATES)[1]
    finally:
        builder.buildah("rm", name)
