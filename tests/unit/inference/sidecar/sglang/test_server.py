"""Whether the agent believes a certificate depends on who started the server, not only on its address."""

from pathlib import Path

import pytest
from tests.support.certificates import Authority
from tests.support.sglang_server import FakeSglang, running

from updraft_inference.settings import InferenceSettings
from updraft_inference.sidecar import composition
from updraft_inference.sidecar.assembly import Assembler
from updraft_inference.sidecar.attached import Known
from updraft_inference.sidecar.link import Link
from updraft_inference.sidecar.sglang.attached import AttachedSglang
from updraft_inference.tap.server_kind import SGLANG


@pytest.mark.parametrize(
    ("host", "python", "is_reached"),
    [
        pytest.param("127.0.0.2", Path("python"), True, id="that Updraft started"),
        pytest.param("127.0.0.2", None, False, id="of somebody else"),
        pytest.param("127.0.0.1", None, True, id="in the agent's own pod"),
    ],
)
async def test_a_certificate_of_an_unknown_authority_is_accepted_from_a_server(
    models: Path, short_tmp_path: Path, host: str, python: Path | None, *, is_reached: bool
) -> None:
    fake = FakeSglang(target=models / "target", seed=models / "seed")
    async with running(fake, host=host, tls=Authority(short_tmp_path).server()):
        settings = InferenceSettings(
            model=models / "target", engine="sglang", data_dir=short_tmp_path, attach=fake.url, sglang_python=python
        )
        link = Link(short_tmp_path / "s", SGLANG, Assembler(max_bytes=1), lambda _: None)
        known = Known(fingerprints=("sha256:t", "sha256:k"))
        attached = composition._attached(settings, link, known, lambda: None)
        assert isinstance(attached, AttachedSglang)
        async with attached.running():
            assert await attached._server.is_up(30) == is_reached
