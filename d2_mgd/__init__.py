"""Matching Guided Distillation for Detectron2 and for any two PyTorch networks.

`d2_mgd.matching` says which teacher channels guide which student channel, `d2_mgd.distill` turns that into losses, and
`d2_mgd.detection` plugs both into Detectron2. Importing this package imports none of them, nor PyTorch.
"""

__version__ = "0.1.0"
