"""The refinement of predictions by gradient descent on the energy. Start at loop.py.

loop               the paper's algorithm: states, energies, updates, losses
step_plan          what each step does, decided once before the loop
sampling, noise    initial states and Langevin noise, addressed by sample and position
contexts           the observed stream, encoded once for all steps that see the same
inner_gradient     the energy and its gradient with respect to the candidate
deferred_backward  the loss's gradient, computed step by step
block_recompute    a step one block at a time, for ZeRO stage 3 and little memory
tiling             how a batch is cut into tiles of rows
"""
