"""The pointwise operations in Triton, one kernel for each pass over their tensors: RMSNorm, SwiGLU,
rotary positions, and a vocabulary's passes over states. What they compute, in plain PyTorch, stands
in pointwise.py, vocabulary/ and rotation.py.
"""
