"""Places for trials: machines, their devices and a device's memory, without a Ray."""

from pathlib import Path
from typing import Any

import pytest

from support.sweep_tools import tiny
from synq.sweeps.driver.cluster import cluster


def test_a_cluster_reached_through_a_client_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "ray://somewhere:10001")
    with pytest.raises(ValueError, match="`ray job submit"), cluster(tiny(tmp_path).search):
        pass


def test_unused_gpus_are_remarked_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}}])
    with cluster(tiny(tmp_path).search) as found:
        assert "--gpus-per-worker 1" in found.note and found.summary == "1 node, 2 CPUs, 1 GPU"
    with cluster(tiny(tmp_path, gpus_per_worker=0.5).search) as found:
        assert found.note == "" and found.trials == 2


def test_a_part_of_a_gpu_is_a_part_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import synq.sweeps.workers.trial as trial

    shares: list[float] = []
    monkeypatch.setattr(trial.torch.cuda, "is_available", lambda: True)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(trial.torch.cuda, name, lambda: None)
    monkeypatch.setattr(trial.torch.cuda, "set_per_process_memory_fraction", shares.append)
    for gpus in (0.0, 0.25, 1.0):
        trial._fresh_process(gpus)
    assert shares == [0.25]


def test_machines_are_filled_by_whole_workers(tmp_path: Path) -> None:
    from synq.sweeps.driver.cluster import capacity

    def trials(*nodes: tuple[float, float], **keys: Any) -> int:
        return capacity(tiny(tmp_path, **keys).search, [{"CPU": cpus, "GPU": gpus} for cpus, gpus in nodes]).trials

    assert trials((3, 0), (1.5, 0)) == 4
    assert trials((8, 2), (8, 2), gpus_per_worker=0.25) == 16
    assert trials((8, 2), gpus_per_worker=0.4) == 4, "a worker stands on one device"
    assert trials((8, 2), (8, 2), gpus_per_worker=1, workers_per_trial=2) == 2
    assert trials((8, 1), (8, 1), gpus_per_worker=1, workers_per_trial=2) == 1
    with pytest.raises(ValueError, match="`workers_per_trial` must be at most 2"):
        trials((8, 1), (8, 1), gpus_per_worker=1, workers_per_trial=4)
    with pytest.raises(ValueError, match="must fit one machine together"):
        trials((1, 4), (8, 0), gpus_per_worker=1, cpus_per_worker=4)
