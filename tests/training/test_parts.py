"""Schedules and the replay buffer, as functions of the step and of the order of data alone."""

import torch

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.data.loading.batches import Batch
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.training.replay import ReplayBuffer
from ebwm_scale.training.schedule import interpolate, refinement_point


def test_schedules_interpolate_between_their_points():
    assert interpolate((), 0.5, 7.0) == 7.0
    points = ((0.2, 1.0), (0.6, 3.0), (0.6, 5.0))
    assert [interpolate(points, p, 0) for p in (0.0, 0.2, 0.4, 0.6, 1.0)] == [
        1.0,
        1.0,
        2.0,
        3.0,
        5.0,
    ]


def test_the_refinement_follows_its_schedules_and_draws_the_number_of_steps_per_step():
    config = config_from_dict(
        {
            "refinement": {
                "num_steps": 4,
                "min_num_steps": 2,
                "schedule": {
                    "step_size": [[0, 1], [1, 0.5]],
                    "noise": [[0, 1], [0.5, 0]],
                    "num_steps": [[0, 2], [0.5, 4]],
                },
            },
            "train": {"max_steps": 100},
        }
    )
    point = lambda step: refinement_point(config, step, NoiseSource(0, step))
    assert (
        point(0).num_steps == 2
        and point(50).step_size_scale == 0.75
        and point(50).noise_scale == 0.0
    )
    late = [point(step).num_steps for step in range(50, 100)]
    assert set(late) == {2, 3, 4} and late == [point(step).num_steps for step in range(50, 100)]


def batch(step, size=8):
    positions = torch.arange(step * size, (step + 1) * size)
    sequences = positions[:, None].expand(-1, 4).clone()
    actions = positions[:, None, None].expand(-1, 3, 2).float()
    states = positions[:, None, None].expand(-1, 3, 5).float()
    return Batch(sequences, positions, positions, {"action": actions}), states


def part_of(whole, rows):
    conditions = {name: values[rows] for name, values in whole.conditions.items()}
    return Batch(whole.sequences[rows], whole.sample_ids[rows], whole.positions[rows], conditions)


def test_replay_restarts_odd_samples_from_stored_states_with_their_own_context():
    buffer = ReplayBuffer(capacity=8, global_batch_size=8)
    first, states = batch(0)
    assert buffer.restart(first, NoiseSource(0, 0))[1] is None
    buffer.store(first, states)
    fresh, _ = batch(1)
    replayed, (rows, restart) = buffer.restart(fresh, NoiseSource(0, 1))
    assert rows.tolist() == [1, 3, 5, 7]
    assert torch.equal(replayed.sequences[::2], fresh.sequences[::2])
    assert torch.equal(replayed.conditions["action"][::2], fresh.conditions["action"][::2])
    for row, state in zip(rows.tolist(), restart):
        # the context the state belongs to, and the actions in it
        assert (replayed.sequences[row] == state[0, 0].int()).all()
        assert (replayed.conditions["action"][row] == state[0, 0]).all()
        assert int(state[0, 0]) // 2 == row // 2  # of the row's own pair


def test_replay_does_not_depend_on_how_the_batch_is_cut():
    whole, parts = (
        ReplayBuffer(capacity=16, global_batch_size=8),
        [ReplayBuffer(capacity=16, global_batch_size=8) for _ in range(2)],
    )
    for step in range(4):
        fresh, states = batch(step)
        source = NoiseSource(0, step)
        expected, _ = whole.restart(fresh, source)
        whole.store(expected, states)
        for half, rows in zip(parts, (slice(0, 4), slice(4, 8))):
            ours, _ = half.restart(part_of(fresh, rows), source)
            half.store(ours, states[rows])
            assert torch.equal(ours.sequences, expected.sequences[rows])


def test_replay_is_bounded_and_saved():
    buffer = ReplayBuffer(capacity=10, global_batch_size=8)
    for step in range(9):
        buffer.store(*batch(step))
    assert sum(len(queue) for queue in buffer.queues.values()) <= 10
    other = ReplayBuffer(capacity=10, global_batch_size=8)
    other.load_state_dict(buffer.state_dict())
    fresh, _ = batch(9)
    ours, ours_restart = buffer.restart(fresh, NoiseSource(0, 9))
    theirs, theirs_restart = other.restart(fresh, NoiseSource(0, 9))
    exactly = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ours.sequences, theirs.sequences, **exactly)
    torch.testing.assert_close(ours.conditions, theirs.conditions, **exactly)
    torch.testing.assert_close(ours_restart, theirs_restart, **exactly)


def test_a_buffer_that_was_saved_before_there_were_conditions_is_read():
    buffer = ReplayBuffer(capacity=8, global_batch_size=8)
    first, states = batch(0)
    text = Batch(first.sequences, first.sample_ids, first.positions)
    buffer.store(text, states)
    saved = buffer.state_dict()
    assert {len(entry) for entries in saved["queues"].values() for entry in entries} == {2}
    other = ReplayBuffer(capacity=8, global_batch_size=8)
    other.load_state_dict(saved)
    replayed, _ = other.restart(text, NoiseSource(0, 1))
    assert replayed.conditions == {}


def test_stored_states_are_within_a_bfloat16_rounding():
    buffer = ReplayBuffer(capacity=8, global_batch_size=2)
    states = torch.randn(2, 3, 5) * 100
    places = torch.arange(2)
    buffer.store(Batch(torch.zeros(2, 4, dtype=torch.int64), places, places), states)
    stored = buffer.queues[0][0][1].float()
    assert ((stored - states[0]).abs() <= states[0].abs() / 256).all()
