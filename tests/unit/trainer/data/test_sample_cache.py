from tests.support.traces import TraceMaker

from updraft_trainer.data.sample import Sample, read_sample
from updraft_trainer.data.sample_cache import SampleCache


def sample(traces: TraceMaker, seed: int) -> Sample:
    return read_sample(traces.data(seed), traces.expected)


def test_the_least_recently_used_goes_first(traces: TraceMaker) -> None:
    one, two, three = (sample(traces, seed) for seed in range(3))
    cache = SampleCache(2 * one.num_bytes)
    cache.put(one)
    cache.put(two)
    assert cache.get(one.trace_id) is one
    cache.put(three)
    assert cache.get(two.trace_id) is None
    assert cache.get(one.trace_id) is one
    assert cache.num_bytes == 2 * one.num_bytes


def test_a_sample_larger_than_the_cache_is_not_kept(traces: TraceMaker) -> None:
    one = sample(traces, 0)
    cache = SampleCache(one.num_bytes - 1)
    cache.put(one)
    assert cache.get(one.trace_id) is None
    assert cache.num_bytes == 0


def test_putting_a_sample_twice_counts_it_once(traces: TraceMaker) -> None:
    one = sample(traces, 0)
    cache = SampleCache(10 * one.num_bytes)
    cache.put(one)
    cache.put(one)
    assert cache.num_bytes == one.num_bytes
    cache.discard(one.trace_id)
    assert cache.num_bytes == 0
