"""Which status a trial gets whose workers died, by the errors that Ray raises."""

import pytest
import ray.exceptions
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo

from synq.sweeps.workers.deaths import death_status


def died(text: str, reason: int | None = None) -> ray.exceptions.ActorDiedError:
    info = None if reason is None else NodeDeathInfo(reason=reason, reason_message="left")  # type: ignore[arg-type]
    return ray.exceptions.ActorDiedError(
        ActorDiedErrorContext(error_message=text, actor_id=b"\0" * 16, node_death_info=info)
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (died("The actor is dead because its node has died. Node Id: 0a"), "pre-empted"),
        (died("The actor died.", NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED), "pre-empted"),
        (ray.exceptions.NodeDiedError("it is unreachable"), "pre-empted"),
        (died("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"), "lost"),
        (ray.exceptions.WorkerCrashedError(), "lost"),
        (ray.exceptions.OutOfMemoryError("the node runs out of memory; preempt nothing"), "failed"),
        (RuntimeError("of the trial"), "failed"),
        ("unknown", "failed"),
    ],
)
def test_the_status_of_a_death(error: object, status: str) -> None:
    assert death_status(error) == status
