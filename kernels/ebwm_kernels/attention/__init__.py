"""Attention of the predicted stream, differentiable twice, with a plain reference beside each
kernel.
"""
