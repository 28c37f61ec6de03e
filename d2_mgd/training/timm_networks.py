"""Networks of timm, which are named ``timm:NAME``, for images of any size."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from d2_mgd.errors import UserError, reason

TIMM = "timm:"


def timm_network(name: str, **options: Any) -> nn.Module:
    """Build a network; ``options`` are those of ``timm.create_model``.

    Raises:
        UserError: timm is not installed, or has no such network; the message lists the nearest names.
    """
    timm, bare = _timm(name), name.removeprefix(TIMM)
    if not timm.is_model(bare):
        near = ", ".join(difflib.get_close_matches(bare, timm.list_models(), 5))
        raise UserError(f"timm has no model {bare!r}. Nearest: {near or 'none; timm.list_models() lists all'}.")
    return timm.create_model(bare, **options)


def timm_network_for(image_size: int, name: str, **options: Any) -> nn.Module:
    """As :func:`timm_network`; position embeddings are resampled to ``image_size`` px.

    Raises:
        UserError: as there, or the network takes images of one size only; the message names it.
    """
    config = _timm(name).get_pretrained_cfg(name.removeprefix(TIMM))
    if config is None or not config.fixed_input_size or config.input_size[-1] == image_size:
        return timm_network(name, **options)
    try:
        return timm_network(name, img_size=image_size, **options)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{name} cannot be built for images of {image_size} px ({reason(error)}): it is made for images of "
            f"{config.input_size[-1]} px."
        ) from error


def resampled(network: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state of the network at another image size, with position embeddings resampled by timm's own function."""
    own = network.state_dict()
    resample = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if resample is None or not any(key in own and own[key].shape != value.shape for key, value in state.items()):
        return state
    found: Mapping[str, Tensor] = resample(dict(state), network)
    return found


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{name} needs timm, which is not installed: pip install timm.") from error
    return timm
