"""Fixtures of tests that start train.py."""

from training_runs import dataset, runs
