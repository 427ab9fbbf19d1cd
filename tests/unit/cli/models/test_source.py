"""What can be downloaded, and which files of it."""

import pytest

from updraft_chassis.errors import InvalidInput, NotFound
from updraft_cli.models.source import File, address, taken


def test_a_repository_may_name_its_revision_in_either_way() -> None:
    said = address("hf://org/name@v2")
    assert (said.uri, said.place, said.revision) == ("hf://org/name", "org/name", "v2")
    assert address("hf://org/name", "v2") == said


@pytest.mark.parametrize("uri", ["s3://bucket/models/one", "gs://bucket/one", "az://container/one"])
def test_a_bucket_is_named_by_its_whole_address(uri: str) -> None:
    assert address(uri).uri == uri


@pytest.mark.parametrize(
    ("uri", "revision", "sentence"),
    [
        pytest.param("pvc://claim/folder", "", "a mounted volume or a local path", id="volume"),
        pytest.param("/models/one", "", "a mounted volume or a local path", id="path"),
        pytest.param("oci://registry/image:1", "", "a mounted volume or a local path", id="image"),
        pytest.param("https://somewhere/model", "", "cannot be downloaded: expected hf://ORG/NAME", id="web"),
        pytest.param("hf://name", "", "names no repository", id="no organisation"),
        pytest.param("hf://org/name/folder", "", "names no repository", id="folder of a repository"),
        pytest.param("hf://org/name@a", "b", "names the revision a, but b was requested", id="two revisions"),
        pytest.param("s3://", "", "names no bucket", id="no bucket"),
        pytest.param("s3://bucket/x", "main", "cannot have the revision main", id="revision of a bucket"),
    ],
)
def test_what_cannot_be_downloaded_is_refused_with_what_can(uri: str, revision: str, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        address(uri, revision)


@pytest.mark.attack(
    boundary="models",
    attack="a repository with Python code or files in folders",
    outcome="neither is downloaded",
)
def test_taken_is_what_serving_reads_and_no_second_copy_of_the_weights() -> None:
    names = [
        *(
            "config.json",
            "generation_config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ),
        *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"),
    ]
    others = [
        *("README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "modeling.py"),
        *("onnx/model.onnx", "original/config.json", "model-q4.gguf", ".gitattributes"),
    ]
    found = taken("hf://org/name", [File(name=name, size_bytes=1, tag="") for name in [*names, *others]])
    assert sorted(file.name for file in found) == sorted(names)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        pytest.param([], r"it has no \*.safetensors at its top level; it holds no file", id="empty"),
        pytest.param(
            ["config.json", "model.bin"], r"no \*.safetensors .* it holds config.json, model.bin", id="pickle"
        ),
        pytest.param(["model.safetensors"], "no config.json", id="no sizes"),
    ],
)
def test_what_is_no_model_is_refused_with_what_is_there(names: list[str], sentence: str) -> None:
    with pytest.raises(NotFound, match=sentence):
        taken("hf://org/name", [File(name=name, size_bytes=1, tag="") for name in names])


@pytest.mark.attack(
    boundary="models",
    attack="a repository or bucket with file names that lead out of the folder",
    outcome="not downloaded",
)
def test_names_that_lead_out_of_the_folder_are_not_taken() -> None:
    hostile = ["../config.json", "/etc/cron.d/model.safetensors", "a/../../tokenizer.json", "..", "../.bashrc"]
    found = taken("hf://org/name", files("config.json", "model.safetensors", *hostile))
    assert [file.name for file in found] == ["config.json", "model.safetensors"]


def files(*names: str) -> list[File]:
    return [File(name=name, size_bytes=1, tag="t") for name in names]


def test_a_drafts_pickle_is_taken_if_there_is_nothing_else() -> None:
    both = files("config.json", "model.safetensors", "pytorch_model.bin")
    assert [file.name for file in taken("hf://a/b", both, is_draft=True)] == ["config.json", "model.safetensors"]
    only = files("config.json", "pytorch_model.bin", "train.py")
    assert [file.name for file in taken("hf://a/b", only, is_draft=True)] == ["config.json", "pytorch_model.bin"]


@pytest.mark.attack(boundary="models", attack="a target that comes as a pickle", outcome="not downloaded")
def test_a_targets_pickle_is_not_taken() -> None:
    with pytest.raises(NotFound, match=r"it has no \*\.safetensors"):
        taken("hf://a/b", files("config.json", "pytorch_model.bin"))
