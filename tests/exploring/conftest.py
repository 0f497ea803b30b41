"""Runs by name, and the explorer that a command line opens on them."""

import argparse

import pytest
from explored_runs import (
    frame_model_of,
    model_of,
    task_dataset,
    text_dataset,
    video_dataset,
    world_dataset,
)

from ebwm_scale import explore


@pytest.fixture(scope="session")
def text_manifest(tmp_path_factory):
    return text_dataset(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def maze_manifest(tmp_path_factory):
    return task_dataset(tmp_path_factory.mktemp("tasks"), "reachability", 3)


@pytest.fixture(scope="session")
def hops_manifest(tmp_path_factory):
    return task_dataset(tmp_path_factory.mktemp("hops"), "hops", 4)


@pytest.fixture(scope="session")
def world_manifest(tmp_path_factory):
    return world_dataset(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def buttons_manifest(tmp_path_factory):
    return world_dataset(tmp_path_factory.mktemp("buttons"), discrete=True)


@pytest.fixture(scope="session")
def video_manifest(tmp_path_factory):
    return video_dataset(tmp_path_factory.mktemp("video"))


class Runs(dict):
    """Runs by a name that stands for a run folder, each made when it is first asked for."""

    def __missing__(self, name):
        if callable(self.makers.get(name)):
            self[name] = self.makers[name]()
            return self[name]
        raise KeyError(name)


@pytest.fixture
def runs(monkeypatch, request):
    """A test may add others."""
    known = Runs()
    of = request.getfixturevalue
    known.makers = {
        "text": lambda: model_of(of("text_manifest")),
        "second": lambda: model_of(of("text_manifest"), seed=1),
        "plain": lambda: model_of(of("text_manifest"), seed=2, kind="baseline"),
        "mazes": lambda: model_of(of("maze_manifest")),
        "mazes_with_workspace": lambda: model_of(of("maze_manifest"), workspace=6),
        "plain_mazes": lambda: model_of(of("maze_manifest"), seed=2, kind="baseline"),
        "hops": lambda: model_of(of("hops_manifest")),
        "world": lambda: frame_model_of(of("world_manifest")),
        "plain_world": lambda: frame_model_of(of("world_manifest"), seed=2, kind="baseline"),
        "buttons": lambda: frame_model_of(of("buttons_manifest")),
        "video": lambda: frame_model_of(of("video_manifest")),
        "plain_video": lambda: frame_model_of(of("video_manifest"), seed=2, kind="baseline"),
    }
    monkeypatch.setattr(explore, "load_checkpoint", lambda path, device: known[str(path)])
    return known


@pytest.fixture
def opened(runs):
    """opened("text", "--prompt", "abc"): the explorer that a command line opens."""

    def open_it(*arguments):
        options: argparse.Namespace = explore.parser().parse_args(list(arguments))
        return explore.opened(options)

    return open_it
