"""Reasoning tasks as data: generated, seeded, with one right answer and a difficulty each."""
