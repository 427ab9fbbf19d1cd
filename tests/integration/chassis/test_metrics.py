import http.client
import socket
import ssl
import struct
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter
from tests.support.certificates import Authority
from tests.support.wait import LONG_S

from updraft_chassis import metrics
from updraft_chassis.errors import Conflict


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LONG_S)
    connection.request("GET", path)
    response = connection.getresponse()
    answer = response.status, response.read().decode()
    connection.close()
    return answer


def test_a_scrape_shows_the_registrys_metrics_and_only_those() -> None:
    registry = CollectorRegistry()
    Counter("updraft_test_drops_total", "Dropped entries.", registry=registry).inc(3)
    with metrics.serve(registry, host="127.0.0.1", port=0, ready=lambda: True, setting="X") as port:
        status, text = get(port, "/metrics")
    assert status == 200
    assert "updraft_test_drops_total 3.0" in text
    assert "python_info" not in text


def test_health_is_independent_of_readiness() -> None:
    is_ready = False
    with metrics.serve(CollectorRegistry(), host="127.0.0.1", port=0, ready=lambda: is_ready, setting="X") as port:
        assert get(port, "/healthz") == (200, "ok\n")
        assert get(port, "/readyz") == (503, "not ready\n")
        is_ready = True
        assert get(port, "/readyz") == (200, "ready\n")


@pytest.mark.attack(
    boundary="ports",
    attack="plaintext, or a handshake that never comes, to a metrics port with TLS",
    outcome="nothing is answered to the former; others are answered",
)
def test_with_tls_others_are_answered_while_a_client_is_silent(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    tls, trusted = authority.server().context(), ssl.create_default_context(cafile=authority.file)
    with (
        metrics.serve(CollectorRegistry(), host="127.0.0.1", port=0, ready=lambda: True, setting="X", tls=tls) as port,
        socket.create_connection(("127.0.0.1", port)),
    ):
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=LONG_S, context=trusted)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        connection.close()
        with pytest.raises((http.client.HTTPException, OSError)):
            get(port, "/healthz")


@pytest.mark.attack(
    boundary="tenants",
    attack="reading the names of other namespaces from the operator's metrics, where a token is set",
    outcome="401 without the token, or with another; probes are answered",
)
def test_with_a_token_only_those_who_have_it_read_the_metrics() -> None:
    registry, token = CollectorRegistry(), "a-token-of-prometheus"
    Counter("updraft_test_secrets_total", "Secrets.", registry=registry).inc()

    def scraped(port: int, given: str | None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LONG_S)
        connection.request("GET", "/metrics", headers={} if given is None else {"Authorization": given})
        answer = connection.getresponse()
        found = answer.status, answer.read().decode()
        connection.close()
        return found

    with metrics.serve(
        registry, host="127.0.0.1", port=0, ready=lambda: True, setting="X", token=lambda: token
    ) as port:
        for given in (None, "", "Bearer ", "Bearer another", token, f"Basic {token}", "Bearer \xff"):
            status, text = scraped(port, given)
            assert (status, "updraft" in text) == (401, False), given
        assert scraped(port, f"Bearer {token}")[0] == 200
        assert get(port, "/healthz")[0] == 200


def test_a_renewed_certificate_is_shown_at_the_next_scrape(tmp_path: Path) -> None:
    served = Authority(tmp_path / "first").server()
    tls = served.context()
    with metrics.serve(CollectorRegistry(), host="127.0.0.1", port=0, ready=lambda: True, setting="X", tls=tls) as port:
        another = Authority(tmp_path / "second")
        made = another.server()
        served.key_file.write_bytes(made.key_file.read_bytes())
        served.cert_file.write_bytes(made.cert_file.read_bytes())
        trusted = ssl.create_default_context(cafile=another.file)
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=LONG_S, context=trusted)
        connection.request("GET", "/readyz")
        assert connection.getresponse().status == 200
        connection.close()


@pytest.mark.attack(boundary="ports", attack="any other path on a metrics port", outcome="404")
def test_another_path_says_what_there_is() -> None:
    with metrics.serve(CollectorRegistry(), host="127.0.0.1", port=0, ready=lambda: True, setting="X") as port:
        assert get(port, "/")[0] == 404
        assert "/metrics" in get(port, "/")[1]


@pytest.mark.attack(boundary="ports", attack="a silent connection to a metrics port", outcome="others are answered")
def test_a_client_that_says_nothing_hinders_neither_others_nor_the_end() -> None:
    with (
        metrics.serve(CollectorRegistry(), host="127.0.0.1", port=0, ready=lambda: True, setting="X") as port,
        socket.create_connection(("127.0.0.1", port)),
    ):
        assert get(port, "/healthz")[0] == 200


@pytest.mark.attack(
    boundary="ports",
    attack="hundreds of connections to a metrics port that send nothing, or one byte at a time",
    outcome="the oldest are closed, threads are bounded, and probes and scrapes are answered",
)
@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nX: "], ids=["nothing", "half a head"])
def test_silent_connections_are_pushed_out_by_newer_ones(sent: bytes) -> None:
    num_threads = threading.active_count()
    with (
        metrics.serve(CollectorRegistry(), host="127.0.0.1", port=0, ready=lambda: True, setting="X") as port,
        ExitStack() as held,
    ):
        silent = [held.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(200)]
        for connection in silent:
            with suppress(OSError):  # pushed out already
                connection.sendall(sent)
        for _ in range(3):
            assert get(port, "/healthz") == (200, "ok\n")
            assert get(port, "/metrics")[0] == 200
        assert threading.active_count() - num_threads <= metrics.MAX_CONNECTIONS + 3
        silent[0].settimeout(LONG_S)
        with suppress(ConnectionResetError):
            assert silent[0].recv(1) == b""


@pytest.mark.attack(
    boundary="ports",
    attack="a client that breaks its connection in the middle of a request",
    outcome="nothing is printed, so it cannot fill a log",
)
def test_a_client_that_breaks_off_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with metrics.serve(CollectorRegistry(), host="127.0.0.1", port=0, ready=lambda: True, setting="X") as port:
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(b"GET /met")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        assert get(port, "/healthz")[0] == 200
    assert capfd.readouterr().err == ""


def test_the_port_is_free_again_at_the_end() -> None:
    with metrics.serve(CollectorRegistry(), host="127.0.0.1", port=0, ready=lambda: True, setting="X") as port:
        pass
    with metrics.serve(CollectorRegistry(), host="127.0.0.1", port=port, ready=lambda: True, setting="X"):
        assert get(port, "/healthz")[0] == 200


def test_a_taken_port_is_told_in_one_sentence() -> None:
    serve = metrics.serve
    with serve(CollectorRegistry(), host="127.0.0.1", port=0, ready=lambda: True, setting="X") as port:
        second = serve(CollectorRegistry(), host="127.0.0.1", port=port, ready=lambda: True, setting="UPDRAFT_X_PORT")
        with pytest.raises(Conflict, match=f"cannot listen on 127.0.0.1:{port}.*set UPDRAFT_X_PORT"), second:
            pass
