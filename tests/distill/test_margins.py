"""Margins: the published formula, its limits, and the kinds of batch-norm."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm as normal
from torch import nn

from d2_mgd.distill import batch_norm_margin


def published(scale: float, shift: float) -> float:
    """The formula as published, one channel at a time; not defined for a scale of zero."""
    scale = abs(scale)
    negative = normal.cdf(-shift / scale)
    if negative > 0.001:
        return -scale * math.exp(-((shift / scale) ** 2) / 2) / math.sqrt(2 * math.pi) / negative + shift
    return -3 * scale


def with_affine(scale: torch.Tensor, shift: torch.Tensor) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(scale))
    norm.weight.data, norm.bias.data = scale.clone(), shift.clone()
    return norm


def test_published_formula() -> None:
    scale = torch.cat([torch.randn(200), torch.tensor([1e-3, -1e-3, 10.0])])
    shift = torch.cat([torch.randn(200) * 2, torch.tensor([1e-3, 1e-3, 1.0])])
    expected = torch.tensor([published(s, b) for s, b in zip(scale.tolist(), shift.tolist())], dtype=torch.float32)
    torch.testing.assert_close(batch_norm_margin(with_affine(scale, shift)), expected, atol=1e-6, rtol=1e-5)


def test_margin_is_the_mean_of_the_negative_part() -> None:
    scale, shift = torch.tensor([1.5, 0.7]), torch.tensor([0.4, -1.0])
    samples = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0)) * scale + shift
    means = torch.stack([column[column < 0].mean() for column in samples.T])
    torch.testing.assert_close(batch_norm_margin(with_affine(scale, shift)), means, atol=1e-2, rtol=0)


def test_tiny_and_zero_scales() -> None:
    scale = torch.tensor([1e-30, 1e-30, 0.0, 0.0, 0.0, 1e-8])
    shift = torch.tensor([-2.0, 2.0, -2.0, 2.0, 0.0, -0.5])
    margin = batch_norm_margin(with_affine(scale, shift))
    torch.testing.assert_close(margin, torch.tensor([-2.0, 0.0, -2.0, 0.0, 0.0, -0.5]), atol=1e-7, rtol=0)


def test_margins_are_never_positive_and_the_sign_of_a_scale_does_not_matter() -> None:
    scale, shift = torch.logspace(-12, 4, 99), torch.linspace(-50, 50, 99)
    margin = batch_norm_margin(with_affine(scale, shift))
    assert torch.isfinite(margin).all() and (margin <= 0).all()
    assert torch.equal(margin, batch_norm_margin(with_affine(-scale, shift)))


def test_kinds_of_batch_norm() -> None:
    scale, shift = torch.rand(5) + 0.5, torch.randn(5)
    expected = batch_norm_margin(with_affine(scale, shift))
    synced = nn.SyncBatchNorm(5)
    synced.load_state_dict(with_affine(scale, shift).state_dict())
    assert torch.equal(batch_norm_margin(synced), expected)
    plain = batch_norm_margin(nn.BatchNorm2d(5, affine=False))
    assert torch.equal(plain, batch_norm_margin(with_affine(torch.ones(5), torch.zeros(5))))
    assert plain[0].item() == pytest.approx(-math.sqrt(2 / math.pi))


def test_detectron2_frozen_batch_norm() -> None:
    layers = pytest.importorskip("detectron2.layers", reason="Detectron2 is not installed")
    norm = with_affine(torch.rand(5) + 0.5, torch.randn(5))
    expected = batch_norm_margin(norm)
    frozen = layers.FrozenBatchNorm2d.convert_frozen_batchnorm(norm)
    assert torch.equal(batch_norm_margin(frozen), expected)


def test_what_is_no_batch_norm() -> None:
    for module in (nn.GroupNorm(2, 4), nn.Conv2d(3, 4, 1), nn.Identity()):
        with pytest.raises(
            ValueError, match=f"margins are made from a batch-norm, and this is a {type(module).__name__}"
        ):
            batch_norm_margin(module)
    with pytest.raises(ValueError, match="not finite"):
        batch_norm_margin(with_affine(torch.tensor([math.nan]), torch.tensor([0.0])))
