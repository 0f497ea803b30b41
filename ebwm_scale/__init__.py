"""ebwm_scale: pretraining of energy-based world models and Energy-Based Transformers.

    import ebwm_scale
    model, config = ebwm_scale.load_checkpoint("runs/quickstart")
"""
__version__ = "0.1.0"
