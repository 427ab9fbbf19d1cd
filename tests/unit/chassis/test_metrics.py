from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from updraft_chassis.metrics import MetricFactory

BOUNDS = (0.1, 1.0, 10.0)


@given(st.lists(st.sampled_from([0.05, 0.1, 0.5, 5.0, 50.0])))
def test_many_observations_at_once_are_the_same_as_one_by_one(values: list[float]) -> None:
    registry = CollectorRegistry()
    new = MetricFactory(registry, "x")
    alone, together = new.histogram("alone", "One by one.", BOUNDS), new.bulk_histogram("together", "At once.", BOUNDS)
    for value in values:
        alone.observe(value)
    places = [sum(value > bound for bound in BOUNDS) for value in values]
    together.observe_many([places.count(place) for place in range(len(BOUNDS) + 1)], sum(values))

    def samples(name: str) -> list[float]:
        (metric,) = (metric for metric in registry.collect() if metric.name == name)
        return [sample.value for sample in metric.samples if not sample.name.endswith("_created")]

    assert samples("x_alone") == samples("x_together")
