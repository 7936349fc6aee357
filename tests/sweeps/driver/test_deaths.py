"""Which status a trial gets whose workers died, by the errors that Ray raises."""

from pathlib import Path

import pytest
import ray.exceptions
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.train._internal.storage import StorageContext
from ray.tune.experiment import Trial

from synq.sweeps.workers.deaths import death_status, last_error


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


def test_the_error_of_a_trial_is_known_before_ray_tune_has_copied_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = "ray.train._internal.storage._get_ray_train_session_dir"
    monkeypatch.setattr(folder, lambda: str(tmp_path / "session"))  # without a Ray
    storage = StorageContext(storage_path=str(tmp_path), experiment_dir_name="one", trial_dir_name="trial")
    trial = Trial("none", stub=True, storage=storage)
    assert last_error(trial) == "unknown"
    Path(str(trial.local_path)).mkdir(parents=True)
    trial.handle_error(ray.exceptions.RayActorError(error_msg="The actor is dead because its node has died."))
    assert trial.get_pickled_error() is None, "the finding: Ray has not copied it"
    assert death_status(last_error(trial)) == "pre-empted"
    Path(str(trial.pickled_error_file)).write_bytes(b"damaged")
    assert "its node has died" in str(last_error(trial))
