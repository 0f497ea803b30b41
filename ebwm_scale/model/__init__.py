"""The networks: the energy transformer with its two streams, the Transformer++ baseline, the
states, and the world model of them.
"""
