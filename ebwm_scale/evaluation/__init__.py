"""What a model is worth: bootstrap intervals, scaling laws, parity with the released code."""
