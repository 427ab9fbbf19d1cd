"""What the builders set is what the processes read: by name, and with values that they accept."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.manifests import CONFIG, built, container, one, pod_spec, speculator
from tests.support.observed import observed

from updraft_chassis.settings import Settings, load
from updraft_inference.launch import sglang_arguments
from updraft_inference.settings import InferenceSettings
from updraft_operator.api.speculator import AdaptiveSpeculator
from updraft_operator.manifests.manifest import OperatorConfig
from updraft_operator.manifests.servers import sglang
from updraft_operator.manifests.tls.terms import Tls, TlsMode
from updraft_operator.planning.plan import objects
from updraft_operator.settings import OperatorSettings
from updraft_registry.settings import RegistrySettings
from updraft_tap.settings import DoorSettings
from updraft_tap.settings import Settings as PluginSettings
from updraft_trainer.settings import TrainerSettings
from updraft_vllm.plugin import PREFIX

PARTS: dict[str, tuple[str, type[Settings]]] = {
    "serving": ("inference", InferenceSettings),
    "trainer": ("trainer", TrainerSettings),
    "registry": ("registry", RegistrySettings),
}


def environment(owner: AdaptiveSpeculator, part: str, config: OperatorConfig = CONFIG) -> dict[str, str]:
    """What the process of a part finds, Secrets and fields of the pod filled in."""
    name, _ = PARTS[part]
    made = container(pod_spec(owner, part, config), name)
    (source,) = (each["configMapRef"]["name"] for each in made["envFrom"] if "configMapRef" in each)
    values = dict(one(built(owner, config), "ConfigMap", source)["data"])
    for each in made["env"]:
        values[each["name"]] = each["value"] if "value" in each else _filled(each["valueFrom"])
    return values


def _filled(source: dict[str, Any]) -> str:
    if "secretKeyRef" in source:
        return "redis://:password@redis:6379/0"
    return {"metadata.name": "qwen-serving-6d4b75cb6d-hwtxs"}[source["fieldRef"]["fieldPath"]]


specs = st.fixed_dictionaries(
    {},
    optional={
        "engine": st.fixed_dictionaries({"type": st.sampled_from(["Torch", "SGLang", "VLLM"])}),
        "draft": st.fixed_dictionaries(
            {"lookahead": st.integers(1, 16), "speculation": st.sampled_from(["Enabled", "Disabled"])},
            optional={
                "numAttentionHeads": st.integers(1, 1024),
                "numKeyValueHeads": st.integers(1, 1024),
                "intermediateSize": st.integers(1, 2**24),
                "vocabSize": st.integers(16, 2**24),
            },
        ),
        "suspend": st.booleans(),
        "serving": st.fixed_dictionaries(
            {},
            optional={
                "maxRunningRequests": st.integers(1, 1_000_000),
                "maxContextTokens": st.integers(1, 1_000_000),
                "apiKeysSecretRef": st.just({"name": "clients"}),
                "terminationGracePeriodSeconds": st.integers(10, 86_400),
                "resources": st.just({"limits": {"nvidia.com/gpu": 1}}),
            },
        ),
        "traces": st.fixed_dictionaries(
            {},
            optional={
                "payloadPercent": st.integers(0, 100),
                "evaluationPercent": st.integers(0, 100),
                "shards": st.integers(1, 64),
                "maxSize": st.sampled_from(["1", "1k", "256Mi", "1.5Gi", "2G", "9E"]),
            },
        ),
        "registry": st.fixed_dictionaries({"bucket": st.just({"url": "s3://bucket/prefix"})}),
    },
)
uris = st.sampled_from(["/models/tiny", "hf://org/qwen", "pvc://models/qwen", "oci://registry.example/qwen:1"])
names = st.from_regex(r"\A[a-z]([-a-z0-9]{0,38}[a-z0-9])?\Z")
namespaces = st.from_regex(r"\A[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")


@pytest.mark.parametrize("part", PARTS)
@settings(deadline=None, max_examples=60)
@given(spec=specs, uri=uris)
def test_every_setting_exists_and_is_accepted(part: str, spec: dict[str, Any], uri: str) -> None:
    load(PARTS[part][1], environment(speculator(spec, uri=uri), part))


@pytest.mark.parametrize("part", PARTS)
@settings(deadline=None, max_examples=30)
@given(name=names, namespace=namespaces)
def test_every_name_that_kubernetes_takes_is_taken_by_the_processes(part: str, name: str, namespace: str) -> None:
    owner = speculator(name=name, namespace=namespace)
    data = {each["metadata"]["name"]: each["data"] for each in built(owner) if each["kind"] == "ConfigMap"}
    values = {**environment(speculator(), part), **data[f"{name}-{part}"]}
    load(PARTS[part][1], values)


def test_the_processes_agree_on_whose_they_are_and_where_the_traces_are() -> None:
    owner = speculator({"traces": {"shards": 3}}, name="mine", namespace="team-a")
    data = {each["metadata"]["name"]: each["data"] for each in built(owner) if each["kind"] == "ConfigMap"}
    inference = load(InferenceSettings, {**environment(speculator(), "serving"), **data["mine-serving"]})
    trainer = load(TrainerSettings, {**environment(speculator(), "trainer"), **data["mine-trainer"]})
    assert inference.stream_keys == trainer.stream_keys
    assert len(trainer.stream_keys) == 3
    assert inference.speculator == trainer.speculator == "mine"
    assert inference.registry_address == trainer.registry_address == "mine-registry.team-a.svc:50051"


def test_the_parts_listen_where_services_and_probes_look() -> None:
    inference = load(InferenceSettings, environment(speculator(), "serving"))
    trainer = load(TrainerSettings, environment(speculator(), "trainer"))
    registry = load(RegistrySettings, environment(speculator(), "registry"))
    ports = {
        part: {port["name"]: port["containerPort"] for port in container(pod_spec(speculator(), part), name)["ports"]}
        for part, (name, _) in PARTS.items()
    }
    assert ports == {
        "serving": {"http": inference.port},
        "trainer": {"metrics": trainer.metrics_port},
        "registry": {"grpc": registry.port, "metrics": registry.metrics_port},
    }
    assert (inference.host, trainer.metrics_host, registry.host) == ("0.0.0.0",) * 3  # noqa: S104 - of pods


@pytest.mark.parametrize("mode", TlsMode)
def test_every_file_that_is_named_is_mounted(mode: TlsMode) -> None:
    config = replace(CONFIG, tls=Tls(mode=mode))
    for part, (name, kind) in PARTS.items():
        load(kind, environment(speculator(), part, config))
        mounts = [each["mountPath"] for each in container(pod_spec(speculator(), part, config), name)["volumeMounts"]]
        for variable, value in environment(speculator(), part, config).items():
            if variable.endswith(("_FILE", "_DIR")):
                assert any(value == path or value.startswith(f"{path}/") for path in mounts), variable


SERVERS = ("SGLang", "VLLM")
each_server = pytest.mark.parametrize("engine", SERVERS)


def test_the_agent_of_a_server_listens_where_its_probe_and_the_monitor_look() -> None:
    for engine in SERVERS:
        owner = speculator({"engine": {"type": engine}})
        (port,) = container(pod_spec(owner, "serving"), "inference")["ports"]
        settings = load(InferenceSettings, environment(owner, "serving"))
        assert (port["name"], port["containerPort"], settings.host) == ("metrics", settings.metrics_port, "0.0.0.0")  # noqa: S104


@each_server
def test_the_agent_of_a_server_takes_its_arguments(engine: str) -> None:
    arguments = container(pod_spec(speculator({"engine": {"type": engine}}), "serving", CONFIG), "inference")["args"]
    fields = {f"--{field.replace('_', '-')}" for field in InferenceSettings.model_fields}
    assert {each for each in arguments if each.startswith("--")} <= fields
    values = dict(zip(arguments[::2], arguments[1::2], strict=True))
    variables = {f"UPDRAFT_INFERENCE_{name.strip('-').upper()}": value for name, value in values.items()}
    load(InferenceSettings, environment(speculator({"engine": {"type": engine}}), "serving") | variables)


@given(num_steps=st.integers(1, 16))
def test_the_operator_starts_sglang_with_what_the_agent_asks_of_it(num_steps: int) -> None:
    assert sglang.speculation("/seed", num_steps) == sglang_arguments.speculation(Path("/seed"), num_steps)


@each_server
def test_a_server_and_its_agent_meet_in_one_folder_that_is_prepared_before_either_starts(engine: str) -> None:
    pod = pod_spec(speculator({"engine": {"type": engine}}), "serving")
    engine_, (prepare, agent) = container(pod, "engine"), pod["initContainers"]
    ours = environment(speculator({"engine": {"type": engine}}), "serving")
    settings = load(InferenceSettings, ours)
    variables = {each["name"]: each.get("value") for each in engine_["env"]}

    assert variables[f"UPDRAFT_{engine.upper()}_SOCKET"] == ours[f"UPDRAFT_INFERENCE_{engine.upper()}_SOCKET"]
    assert prepare["args"][:5] == [
        *(f"prepare-{engine.lower()}", "--plugin-dir", variables["PYTHONPATH"], "--seed", str(settings.initial_draft)),
    ]
    assert any(str(settings.initial_draft) in argument for argument in engine_["args"])
    assert str(variables["PYTHONPATH"]).startswith(f"{settings.data_dir}/")
    assert _mounted(prepare, "data") == _mounted(engine_, "data") == _mounted(agent, "data") == str(settings.data_dir)


def test_sglang_and_its_agent_share_an_admin_key_that_is_prepared() -> None:
    owner = speculator({"engine": {"type": "SGLang"}})
    engine, (prepare, _) = container(pod_spec(owner, "serving"), "engine"), pod_spec(owner, "serving")["initContainers"]
    file = str(load(InferenceSettings, environment(owner, "serving")).sglang_admin_key_file)
    assert _after(engine["args"], "--config") == _after(prepare["args"], "--admin-key-file") == file


def test_the_variables_of_plugins_are_those_that_they_read() -> None:
    limits = {"apiKeysSecretRef": {"name": "clients"}, "maxRequestsPerKey": 3, "tenantHeader": "X-Team"}
    made = container(pod_spec(speculator({"engine": {"type": "VLLM"}, "serving": limits}), "serving"), "engine")
    variables = {each["name"]: str(each.get("value")) for each in made["env"]}
    doors = DoorSettings.from_environment(variables, PREFIX)
    assert PluginSettings.from_environment(variables, PREFIX) is not None
    assert (str(doors.api_keys_file), doors.max_requests_per_key) == ("/etc/updraft/api-keys/keys", 3)
    assert doors.tenant_header == "X-Team"
    assert any(str(doors.api_keys_file).startswith(f"{mount['mountPath']}/") for mount in made["volumeMounts"])


@each_server
def test_with_a_server_the_trainers_drafts_have_the_sizes_of_the_first(engine: str) -> None:
    sizes = {"numAttentionHeads": 16, "numKeyValueHeads": 4, "intermediateSize": 4096, "vocabSize": 65536}
    owner = speculator({"engine": {"type": engine}, "draft": sizes})
    trainer = load(TrainerSettings, environment(owner, "trainer"))
    prepare = container(pod_spec(owner, "serving"), "prepare")
    inference = load(
        InferenceSettings,
        environment(owner, "serving") | {each["name"]: each["value"] for each in prepare["env"]},
    )
    assert trainer.shape == inference.shape
    assert tuple(asdict(trainer.shape).values()) == tuple(sizes.values())


def test_a_config_of_the_users_own_is_the_servers_only_one() -> None:
    owner = speculator({"engine": {"type": "SGLang", "args": ["--config", "/etc/mine.yaml"]}})

    assert container(pod_spec(owner, "serving"), "engine")["args"].count("--config") == 1
    assert load(InferenceSettings, environment(owner, "serving")).sglang_admin_key_file is None


def _after(arguments: list[str], name: str) -> str:
    return str(arguments[arguments.index(name) + 1])


def _mounted(container: dict[str, Any], volume: str) -> str:
    return next(str(mount["mountPath"]) for mount in container["volumeMounts"] if mount["name"] == volume)


@pytest.mark.parametrize("url", ["redis://:secret@[h:6379", "redis://:secret@h:port/0"])
def test_an_address_of_redis_that_nobody_can_read_ends_the_operator_without_its_password(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPDRAFT_OPERATOR_REDIS_URL", url)
    with pytest.raises(SystemExit):
        load(OperatorSettings)
    shown = capsys.readouterr().err
    assert "UPDRAFT_OPERATOR_REDIS_URL" in shown
    assert "secret@" not in shown


def test_the_name_of_a_runtime_follows_every_setting_that_pods_depend_on_and_no_other() -> None:
    own: dict[str, Any] = {"namespace": "updraft-system"}
    runtime = OperatorSettings(**own).config.runtime
    pods: list[dict[str, Any]] = [{"trainer_image": "x:1"}, {"fixed_user": False}, {"tls_mode": "SelfSigned"}]
    assert len({runtime, *(OperatorSettings(**own, **more).config.runtime for more in pods)}) == 1 + len(pods)
    others: list[dict[str, Any]] = [
        {"upgrades_max_concurrent": 3, "upgrades_deadline_seconds": 60.0},
        {"metrics_from": "[{}]"},
        {"tls_ca_seconds": 4000, "tls_certificate_seconds": 1000},
        {"tls_issuer_name": "another", "tls_issuer_kind": "Issuer", "tls_issuer_group": "example.com"},
    ]
    assert {OperatorSettings(**own, **more).config.runtime for more in others} == {runtime}


@pytest.mark.parametrize("mode", [TlsMode.CERT_MANAGER, TlsMode.SELF_SIGNED])
def test_a_setting_that_the_name_of_a_runtime_leaves_out_is_in_no_template(mode: TlsMode) -> None:
    own: dict[str, Any] = {"namespace": "updraft-system", "redis_url": "redis://h:6379", "tls_mode": mode}
    own |= {"tls_issuer_name": "ca", "tls_metrics": True}
    more = {
        "tls_ca_seconds": 4000,
        "tls_certificate_seconds": 1000,
        "tls_issuer_name": "another",
        "metrics_from": "[{}]",
    }
    former, now = (_templates(OperatorSettings(**each).config) for each in (own, {**own, **more}))
    assert len(former) == 3
    assert now == former


def _templates(config: OperatorConfig) -> list[dict[str, Any]]:
    made = objects(observed(config=config))
    return [content["spec"]["template"] for content in made if "template" in content.get("spec", {})]
