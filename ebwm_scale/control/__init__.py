"""Control: actions that lead to a goal, found in futures that a world model imagines.

    goal, past frames and actions --solver--> actions --environment--> next frame, and again

planner.py: START HERE. world_costs.py says what a future costs, solvers/ how actions are searched,
futures.py how they are imagined, joint_energy.py what a model's energy says of imagined states and
actions together, mpc.py how a plan is acted on.
"""
