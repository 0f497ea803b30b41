"""A real Slurm on virtual nodes of this machine. Skipped, with the reason, without root or apt."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster_jobs import Jobs, install_slurm, training_runs
from minislurm import MiniSlurm

dataset, runs = training_runs.dataset, training_runs.runs  # fixtures


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> MiniSlurm:
    reason = install_slurm()
    if reason is not None:
        pytest.skip(reason)
    with MiniSlurm(tmp_path_factory.mktemp("slurm"), nodes=6) as running:
        yield running


@pytest.fixture(scope="module")
def jobs(slurm, tmp_path_factory, dataset) -> Jobs:
    return Jobs(slurm, tmp_path_factory.mktemp("jobs"), dataset)
