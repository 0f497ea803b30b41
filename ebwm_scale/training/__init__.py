"""From a model and data to a trained run: optimizer, schedules, engine, checkpoints, metrics, and
the loop that reads like the paper.
"""
