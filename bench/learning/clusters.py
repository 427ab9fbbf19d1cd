"""Does the trainer see that unnamed traffic has shifted? `python -m bench.learning.clusters`.

Four kinds of recorded requests come mixed, then a fifth. A shift is seen if most requests of the fifth are in one cluster that
is not the one of an older kind.
"""

import random
from collections import Counter
from itertools import count

from bench.learning.kinds import TUNED
from bench.learning.learning import SEED, open_recorder

from updraft_cli import output
from updraft_trainer.data.clusters import Clusters

NUM_REQUESTS = 160
"""Requests of each kind."""


def main() -> None:
    recorder = open_recorder()
    recorder.record(TUNED, NUM_REQUESTS, 0)
    texts = {kind: [one.ids.tolist() for one in recorder.samples(kind, NUM_REQUESTS, held_out=False)] for kind in TUNED}
    rows = output.table("new kind", ">clusters before", ">of an old kind together, least", ">of the new kind together")
    for new in TUNED:
        old = [(kind, ids) for kind in TUNED if kind != new for ids in texts[kind]]
        random.Random(SEED).shuffle(old)
        clusters, orders = Clusters(), count()
        assigned: dict[str, Counter[str]] = {kind: Counter() for kind in TUNED}
        for kind, ids in old:
            assigned[kind][clusters.assign("", ids, order=next(orders))] += 1
        num_clusters = len(clusters.by_content)
        largest = [assigned[kind].most_common(1)[0] for kind in TUNED if kind != new]
        assigned[new].update(clusters.assign("", ids, order=next(orders)) for ids in texts[new])
        own = max((n for name, n in assigned[new].items() if name not in dict(largest)), default=0)
        rows.add_row(new, str(num_clusters), str(min(n for _, n in largest)), str(own))
    output.console().print(rows)


if __name__ == "__main__":
    main()
