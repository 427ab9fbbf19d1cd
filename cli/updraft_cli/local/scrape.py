"""The metrics of a process at one time: sums over samples, by name and labels."""

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_TIMEOUT_S = 2.0


class Scrape:
    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples

    def has(self, prefix: str) -> bool:
        """Whether the process has metrics of that name: another program may listen on a default port."""
        return any(sample.name.startswith(prefix) for sample in self._samples)

    def total(self, name: str, **labels: str) -> float | None:
        """Sum the samples of `name` that have these labels; None when there are none."""
        found = [s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items()]
        return sum(found) if found else None

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Sum the samples of `name` by the values of one label."""
        totals: dict[str, float] = {}
        for sample in self._samples:
            if sample.name == name and label in sample.labels and labels.items() <= sample.labels.items():
                totals[sample.labels[label]] = totals.get(sample.labels[label], 0.0) + sample.value
        return totals


def scrape(url: str) -> Scrape | None:
    """Read the metrics at `url`; None when there is no answer, or another program's."""
    try:
        return parse(httpx.get(url, timeout=_TIMEOUT_S, trust_env=False).raise_for_status().text)
    except (httpx.HTTPError, ValueError):
        return None


def parse(text: str) -> Scrape:
    return Scrape([sample for family in text_string_to_metric_families(text) for sample in family.samples])
