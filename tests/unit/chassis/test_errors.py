import grpc
import pytest

from updraft_chassis import errors


def subclasses() -> list[type[errors.UpdraftError]]:
    return [errors.UpdraftError, *errors.UpdraftError.__subclasses__()]


@pytest.mark.parametrize("kind", subclasses())
def test_every_error_names_a_grpc_status(kind: type[errors.UpdraftError]) -> None:
    assert grpc.StatusCode[kind.status].name == kind.status


def test_every_error_has_a_status_of_its_own() -> None:
    statuses = [kind.status for kind in subclasses()]
    assert len(set(statuses)) == len(statuses)


def test_an_error_reads_as_its_sentence() -> None:
    assert str(errors.NotFound("speculator chat has no version 7")) == "speculator chat has no version 7"


def test_unavailable_carries_the_peers_wish() -> None:
    assert errors.Unavailable("busy", retry_after_s=2.5).retry_after_s == 2.5
    assert errors.Unavailable("away").retry_after_s is None
