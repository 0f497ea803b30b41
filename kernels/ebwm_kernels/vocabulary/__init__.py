"""The vocabulary side of a refinement step: api (functions), autograd (their derivatives),
formulas, softmax_cross_entropy; candidates (steps of a few tokens of each row).
"""
