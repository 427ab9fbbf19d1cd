"""A leader that is killed again and again, each time just after it was given something to do.

`make bench-faults` does it 20 times, the tests less often.
"""

from tests.cluster.operator.replicas import Replicas
from tests.cluster.operator.subject import Subject
from tests.support.wait import wait_until

from updraft_operator.api import names


def kill_leaders(running: Replicas, subject: Subject, kills: int) -> None:
    """Kill whoever leads, so often; return once the last change is done, by whoever leads then."""
    subject.create()
    for number in range(kills):
        leader = running.leader()
        subject.change(engine={"image": f"image:{number}"}, serving={"replicas": number})
        leader.process.kill()
        if number % 2:
            running.leader()  # the other one; else the same one may be back before the Lease has run out
        leader.process.start()
    wait_until(lambda: image(subject) == f"image:{kills - 1}", what="the last change")


def image(subject: Subject) -> str:
    """Of its serving pods; empty while there is no Deployment."""
    found = subject.find("Deployment", f"{subject.name}-{names.SERVING}")
    return str(found["spec"]["template"]["spec"]["containers"][0]["image"]) if found else ""
