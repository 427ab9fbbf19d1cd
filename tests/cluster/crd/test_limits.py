"""Each limit of the schema lets in what is at its edge and refuses what is beyond, naming the field."""

import re

import pytest
from tests.cluster.access import Api, ApiError
from tests.cluster.crd.limits import LIMITS, Limit
from tests.cluster.crd.resources import Json, at, create, over, resource

each_limit = pytest.mark.parametrize(
    "limit",
    [pytest.param(limit, id=f"{limit.kind} {limit.path} {limit.message} not {limit.bad!r:.20}") for limit in LIMITS],
)


@each_limit
def test_what_is_at_a_limit_is_let_in(limit: Limit, api: Api, namespace: str) -> None:
    for number, value in enumerate(limit.good):
        spec = _spec(limit, value)
        stored = create(api, namespace, limit.kind, resource(limit.kind, f"good-{number}", **spec))
        assert over(stored["spec"], spec) == stored["spec"]


@each_limit
def test_what_is_beyond_a_limit_is_refused_by_its_field(limit: Limit, api: Api, namespace: str) -> None:
    with pytest.raises(ApiError, match=re.escape(limit.message)) as refused:
        create(api, namespace, limit.kind, resource(limit.kind, "bad", **_spec(limit, limit.bad)))
    assert refused.value.code == 422
    assert f"spec.{limit.path}" in refused.value.message


def _spec(limit: Limit, value: object) -> Json:
    return over(limit.around, at(limit.path, value))
