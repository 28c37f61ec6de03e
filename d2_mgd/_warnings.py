"""The warnings of dependencies that a user of the commands cannot act on."""

import warnings

_DEPRECATIONS = (
    "pkg_resources is deprecated as an API",  # detectron2/model_zoo/model_zoo.py
    "`torch.jit.script` is deprecated",  # decorated functions of Detectron2 and fvcore
    "torch.meshgrid: in an upcoming release",  # detectron2/modeling/anchor_generator.py
)


def ignore_deprecations() -> None:
    """Ignore the deprecation warnings that Detectron2 and fvcore cause, and no other warning."""
    for message in _DEPRECATIONS:
        warnings.filterwarnings("ignore", message=message)
