"""Every constant of registry.proto has its term."""

import pytest
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from updraft.registry.v1 import registry_pb2 as pb
from updraft_rollouts.terms import Comparison, OnInconclusive, Phase, Source, Strategy, Term

UNSPECIFIED = 0


@pytest.mark.parametrize(
    ("kind", "constants"),
    [
        (Phase, pb.Phase),
        (Source, pb.Source),
        (Strategy, pb.Strategy),
        (Comparison, pb.Comparison),
        (OnInconclusive, pb.OnInconclusive),
    ],
)
def test_every_constant_has_one_term_and_back(kind: type[Term], constants: EnumTypeWrapper) -> None:
    numbers = {term.to_proto() for term in kind}
    assert len(numbers) == len(kind)
    assert numbers | {UNSPECIFIED} == set(constants.values())
    assert [kind.from_proto(term.to_proto()) for term in kind] == list(kind)


def test_an_unknown_number_has_no_term() -> None:
    assert Phase.from_proto(99) is None
    assert Phase.from_proto(UNSPECIFIED) is None


def test_an_unspecified_comparison_is_the_registrys_choice() -> None:
    assert Comparison.from_proto(UNSPECIFIED) is Comparison.AUTO
