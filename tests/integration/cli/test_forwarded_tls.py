"""The way to a registry that speaks TLS: the name in its certificate is that of its Service, and the address is 127.0.0.1."""

import os
from pathlib import Path

import pytest
import trustme
from tests.support.api_server import api_server
from tests.support.registry import RegistryProcess
from tests.support.wait import wait_until

from updraft_cli.backends.cluster_client import KubeContext
from updraft_cli.backends.forwarded.tunnels import tunnels


def test_a_registry_is_read_by_the_cas_of_its_config_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, folder = trustme.CA(), tmp_path / "bin"
    issued = authority.issue_cert("qwen-registry.team.svc")
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    files = {"tls_cert_file": tmp_path / "cert.pem", "tls_key_file": tmp_path / "key.pem"}
    (tmp_path / "registry").mkdir()
    with RegistryProcess(tmp_path / "registry", **files) as registry:
        port = registry.port
        folder.mkdir()
        (folder / "kubectl").write_text(
            f'#!/bin/sh\necho "Forwarding from 127.0.0.1:{port} -> 50051"\nexec sleep 600\n'
        )
        (folder / "kubectl").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        with api_server(tmp_path) as api, tunnels(KubeContext(kubeconfig=api.kubeconfig)) as opened:
            api.authorities["qwen-ca"] = authority.cert_pem.bytes().decode()
            tunnel = opened.to("team", "qwen")
            wait_until(lambda: tunnel.registry() is not None, what="the way to the registry")
            backend = tunnel.registry()
            assert backend is not None
            (one,) = next(backend.snapshots()).speculators
    assert one.name == "qwen"
