"""How to install Detectron2: the one place that the documentation, the Makefile and the error messages agree with."""

DETECTRON2_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
DETECTRON2_URL = f"git+https://github.com/facebookresearch/detectron2.git@{DETECTRON2_COMMIT}"

# Detectron2's setup.py imports torch, which pip's build isolation would hide from it.
DETECTRON2_INSTALL = f"pip install --no-build-isolation '{DETECTRON2_URL}'"
