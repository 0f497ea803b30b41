"""Solvers: how actions of the lowest cost are searched.

    random    the best of many drawn at random
    cem       draws around the best ones, narrower each time (cross-entropy method)
    icem      the same, with draws that are alike from step to step, and the best ones kept
    mppi      means weighted by exp(-cost / temperature), from draws of a constant width
    gradient  down the gradient of the energy of imagined states and actions together

Why ours: packages of such solvers take a state and a function from (state, action) to the next one.
Here a future depends on all frames before it, actions may be ids, draws must follow from a seed of
their own, and each future that is imagined is counted.
"""
