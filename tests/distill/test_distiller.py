"""The distiller as a whole: recovery, losses, resizing, errors, and processes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from d2_mgd.distill import FEATURE_LOSSES, MatchingGuidedDistiller, batch_norm_margin
from d2_mgd.matching import ChannelMatching, matched_weight

CHANNELS = {"a": (4, 10), "b.c": (6, 6)}


def batch(images: int = 3, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    student = {
        "a": torch.randn(images, 4, 6, 5, generator=generator),
        "b.c": torch.randn(images, 6, 3, 3, generator=generator),
    }
    teacher = {
        "a": torch.randn(images, 10, 6, 5, generator=generator),
        "b.c": torch.randn(images, 6, 3, 3, generator=generator),
    }
    return student, teacher


def ready(**options: Any) -> MatchingGuidedDistiller:
    distiller = MatchingGuidedDistiller(CHANNELS, **{"loss": "mse", **options})
    distiller.observe(*batch())
    distiller.rematch()
    return distiller


def test_a_teacher_that_is_a_permuted_student_is_recovered_with_zero_loss() -> None:
    maps = torch.randn(4, 32, 7, 7)
    order = torch.randperm(32)
    for reducer in ("amp", "max", "mean", "rd", "sm"):
        for metric in ("cosine", "pearson"):
            distiller = MatchingGuidedDistiller(
                {"x": (32, 32)}, reducer=reducer, metric=metric, loss="mse", norm="none"
            )
            distiller.observe({"x": maps}, {"x": maps[:, order]})
            report = distiller.rematch()["x"]
            assert torch.equal(order[torch.from_numpy(report.matching.groups[:, 0].copy())], torch.arange(32))
            assert report.mean_cost == pytest.approx(0.0, abs=1e-6)
            assert distiller({"x": maps}, {"x": maps[:, order]})["loss_distill/x"].item() == 0.0


def test_names_weights_and_gradients() -> None:
    student, teacher = batch()
    for maps in (*student.values(), *teacher.values()):
        maps.requires_grad_()
    distiller = ready()
    plain = distiller(student, teacher)
    assert list(plain) == ["loss_distill/a", "loss_distill/b.c"]
    sum(plain.values()).backward()
    assert all(maps.grad is not None and maps.grad.any() for maps in student.values())
    assert all(maps.grad is None for maps in teacher.values())
    assert all(p.grad is not None for p in distiller.parameters())  # nothing for DDP to find unused
    weighted = ready(weights={"a": 0.25, "b.c": 0.0})
    weighted.load_state_dict(distiller.state_dict())
    losses = weighted(student, teacher)
    torch.testing.assert_close(losses["loss_distill/a"], 0.25 * plain["loss_distill/a"])
    assert losses["loss_distill/b.c"].item() == 0.0


def test_reports() -> None:
    distiller = MatchingGuidedDistiller(CHANNELS, loss="mse")
    assert not distiller.matched and distiller.matchings == {"a": None, "b.c": None}
    distiller.observe(*batch())
    distiller.observe(*batch(2, seed=1))
    first = distiller.rematch()
    assert distiller.matched and list(first) == ["a", "b.c"]
    report = first["a"]
    assert (report.num_images, report.changed, report.cost.shape) == (5, 1.0, (4, 10))
    assert report.matching == distiller.matchings["a"]
    assert report.mean_cost == pytest.approx(report.matching.total_cost / 10)
    assert distiller.costs["a"].num_images == 0  # costs start anew
    distiller.observe(*batch())
    distiller.observe(*batch(2, seed=1))
    again = distiller.rematch()
    assert again["a"].changed == 0.0 and again["a"].matching == report.matching
    with pytest.raises(ValueError, match="feature a: the matching cost is empty"):
        distiller.rematch()
    assert distiller.matchings["a"] == report.matching


def test_a_bad_cost_names_the_feature_and_keeps_the_old_matching() -> None:
    distiller = ready()
    old = distiller.matchings
    student, teacher = batch()
    teacher["b.c"][0, 2, 0, 0] = math.nan
    distiller.observe(student, teacher)
    with pytest.raises(ValueError, match=r"feature b\.c: .*teacher channel 2"):
        distiller.rematch()
    assert distiller.matchings == old


def test_inference_mode_and_float64_maps() -> None:
    student, teacher = batch()
    distiller = MatchingGuidedDistiller(CHANNELS, loss="mse")
    with torch.inference_mode():
        distiller.observe(student, teacher)
    distiller.observe(student, teacher)
    with torch.inference_mode():
        assert distiller.rematch()["a"].num_images == 6
    distiller.observe(student, teacher)
    distiller.rematch()
    double = [{name: found.double() for name, found in maps.items()} for maps in (student, teacher)]
    single, losses = distiller(student, teacher), distiller(*double)
    precise = distiller.double()(*double)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32 and precise[name].dtype == torch.float64
        torch.testing.assert_close(loss, single[name])
        torch.testing.assert_close(loss.double(), precise[name])


def test_mask_means_that_padding_changes_nothing() -> None:
    student, teacher = batch()
    padded = [
        {name: torch.nn.functional.pad(m, (0, 2, 0, 1), value=9.0) for name, m in maps.items()}
        for maps in (student, teacher)
    ]
    valid = {}
    for name, maps in student.items():
        valid[name] = torch.zeros(3, 1, maps.shape[2] + 1, maps.shape[3] + 2, dtype=torch.bool)
        valid[name][:, :, : maps.shape[2], : maps.shape[3]] = True
    for norm in ("bn", "gn", "none"):
        for loss in ("mse", "partial_l2", "pearson", "channel_kl"):
            plain, masked = (MatchingGuidedDistiller(CHANNELS, loss=loss, norm=norm) for _ in range(2))
            plain.observe(student, teacher)
            masked.observe(*padded, valid)
            assert masked.rematch()["a"].matching == plain.rematch()["a"].matching
            expected, losses = plain(student, teacher), masked(*padded, valid)
            for name in losses:
                torch.testing.assert_close(losses[name], expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("align", ["matching", "conv1x1"])
@pytest.mark.parametrize("reducer", ["amp", "rd"])
@pytest.mark.parametrize("norm", ["bn", "sync_bn", "gn", "none"])
@pytest.mark.parametrize("loss", ["mse", "partial_l2", "pearson", "channel_kl", "distance"])
def test_gradients_do_not_see_what_the_padding_holds(
    align: str, reducer: str, norm: str, loss: str, registered_distance: str
) -> None:
    if align == "conv1x1" and reducer == "rd":
        return  # reduces nothing
    valid = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    valid[1, :, 4:] = False
    student, teacher = torch.randn(2, 4, 6, 6), torch.randn(2, 10, 6, 6)
    distiller = MatchingGuidedDistiller({"a": (4, 10)}, norm=norm, loss=loss, reducer=reducer, align=align)
    if align == "matching":
        distiller.observe({"a": student}, {"a": teacher}, {"a": valid})
        distiller.rematch()
    found = []
    for padding in (0.0, math.nan, math.inf):
        torch.manual_seed(1)  # of `rd`
        distiller.zero_grad()
        given = torch.where(valid, student, padding).requires_grad_()
        value = distiller({"a": given}, {"a": torch.where(valid, teacher, padding)}, {"a": valid})["loss_distill/a"]
        value.backward()
        found.append([value, given.grad, *(parameter.grad for parameter in distiller.parameters())])
    for other in found[1:]:
        for one, two in zip(found[0], other):
            torch.testing.assert_close(two, one, atol=1e-6, rtol=1e-5)


@pytest.fixture
def registered_distance() -> Iterator[str]:
    """A loss of somebody who did not think of padding."""
    FEATURE_LOSSES._do_register("distance", lambda student, guided, margin=None, valid=None: (student - guided).abs())
    yield "distance"
    del FEATURE_LOSSES._obj_map["distance"]


def test_maps_of_other_size_are_resized_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = batch()
    teacher["a"] = torch.nn.functional.interpolate(teacher["a"], scale_factor=2)
    distiller = MatchingGuidedDistiller(CHANNELS, loss="mse")
    with caplog.at_level(logging.WARNING):
        distiller.observe(student, teacher)
        distiller.rematch()
        distiller(student, teacher)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["feature a: the teacher's map of (12, 10) is resized to the student's (6, 5)."]


def test_mixed_precision_compares_in_float32() -> None:
    student, teacher = batch()
    low = (
        {name: maps.bfloat16() for name, maps in student.items()},
        {name: maps.bfloat16() for name, maps in teacher.items()},
    )
    distiller = ready()
    expected = distiller(*({name: maps.float() for name, maps in part.items()} for part in low))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = distiller(*low)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=1e-2, atol=1e-3)


def test_margins_bound_the_teacher() -> None:
    norm = nn.BatchNorm2d(10)
    student, teacher = batch()
    teacher["a"] = torch.full_like(teacher["a"], -50.0)
    student["a"] = torch.full_like(student["a"], 1.0)
    distiller = MatchingGuidedDistiller(
        {"a": (4, 10)}, loss="partial_l2", norm="none", margins={"a": batch_norm_margin(norm)}
    )
    distiller.observe(student, teacher)
    distiller.rematch()
    expected = (1.0 + math.sqrt(2 / math.pi)) ** 2
    assert distiller(student, teacher)["loss_distill/a"].item() == pytest.approx(expected, rel=1e-6)


def test_image_sum_is_the_published_reduction() -> None:
    student, teacher = batch()
    mean, summed = ready(norm="none"), ready(norm="none", reduction="image_sum")
    for name, (s, _) in CHANNELS.items():
        pixels = student[name].shape[2] * student[name].shape[3]
        torch.testing.assert_close(
            summed(student, teacher)[f"loss_distill/{name}"],
            mean(student, teacher)[f"loss_distill/{name}"] * s * pixels,
        )


def test_alignments_without_a_matching() -> None:
    student, teacher = batch()
    projected = MatchingGuidedDistiller(CHANNELS, loss="mse", align="conv1x1")
    assert projected.matched and projected.rematch() == {} and projected.costs == {}
    sum(projected(student, teacher).values()).backward()
    assert all(p.grad is not None for p in projected.parameters())
    direct = MatchingGuidedDistiller({"b.c": (6, 6)}, loss="mse", align="none", norm="none")
    expected = (student["b.c"] - teacher["b.c"]).square().mean()
    torch.testing.assert_close(direct(student, teacher)["loss_distill/b.c"], expected)


def test_installed_matchings_are_the_ones_used() -> None:
    distiller = ready(norm="none", reducer="mean")
    student, teacher = batch()
    groups = torch.from_numpy(distiller.matchings["a"].groups.copy())
    guided = torch.stack([teacher["a"][:, row[row >= 0]].mean(1) for row in groups], dim=1)
    torch.testing.assert_close(distiller(student, teacher)["loss_distill/a"], (student["a"] - guided).square().mean())


def test_narrow_teachers_and_modes() -> None:
    maps = {"x": torch.randn(2, 9, 4, 4)}, {"x": torch.randn(2, 4, 4, 4)}
    for reducer in ("amp", "sm"):
        distiller = MatchingGuidedDistiller({"x": (9, 4)}, reducer=reducer, loss="mse")
        distiller.observe(*maps)
        assert isinstance(distiller.rematch()["x"].matching, ChannelMatching)
        assert torch.isfinite(distiller(*maps)["loss_distill/x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reducer": "median"}, "unknown reducer 'median'; there are: amp, max, mean, rd, sm, sp"),
        ({"loss": "l7"}, "unknown loss 'l7'; there are:"),
        ({"loss": {"a": "mse"}}, r"no loss was given for feature b\.c"),
        ({"metric": "l1"}, "unknown matching metric 'l1'"),
        ({"mode": "greedy"}, "unknown matching mode 'greedy'"),
        ({"align": "mlp"}, "unknown alignment 'mlp'; there are: matching, matched_projection, conv1x1, none"),
        ({"align": "matched_projection", "mode": "even"}, "needs the matching mode 'balanced'.*got 'even'"),
        ({"align": "none"}, "feature a: alignment 'none' needs equal widths, got 4 student and 10 teacher"),
        ({"norm": "ln"}, "unknown norm 'ln'"),
        ({"reduction": "sum"}, "unknown reduction 'sum'; there are: mean, image_sum"),
        ({"weights": {"a": -1.0}}, "feature a: a weight must be finite and not negative, got -1.0"),
        ({"weights": {"a": math.nan}}, "feature a: a weight must be finite"),
        ({"weights": {"d": 1.0}}, r"a weight was given for d, but the features are: a, b\.c"),
        ({"margins": {"a": torch.zeros(4)}}, r"feature a: margins must be \(10,\), got \(4,\)"),
        ({"reducer": "sm", "mode": "balanced"}, "feature a: reducer 'sm' goes with the mode 'one_to_one'"),
    ],
)
def test_bad_options_are_refused_when_it_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatchingGuidedDistiller(CHANNELS, **{"loss": "mse", **options})


def test_bad_maps_and_order_of_calls() -> None:
    student, teacher = batch()
    with pytest.raises(RuntimeError, match=r"feature a has no matching yet.*rematch"):
        MatchingGuidedDistiller(CHANNELS, loss="mse")(student, teacher)
    distiller = ready()
    with pytest.raises(ValueError, match=r"the teacher gave no map of feature a; it gave: b\.c"):
        distiller(student, {"b.c": teacher["b.c"]})
    with pytest.raises(ValueError, match=r"feature a: expected \(N, 4, H, W\) from the student and \(N, 10, H, W\)"):
        distiller(student, {**teacher, "a": teacher["a"][:, :9]})
    with pytest.raises(ValueError, match=r"feature a: expected \(N, 4, .* got \(3, 4, 6, 5\) and \(1, 10, 6, 5\)"):
        distiller(student, {**teacher, "a": teacher["a"][:1]})
    with pytest.raises(ValueError, match="a feature cannot have the name 'keys'"):
        MatchingGuidedDistiller({"keys": (4, 10)})
    with pytest.raises(ValueError, match="at least one feature"):
        MatchingGuidedDistiller({})
    with pytest.raises(ValueError, match="T >= S"):
        MatchingGuidedDistiller({"x": (9, 4)}, loss="mse", mode="one_to_one")


def _rank(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    distiller = MatchingGuidedDistiller(CHANNELS, loss="mse", norm="sync_bn")
    distiller.observe(*batch(3, seed=rank))
    reports = distiller.rematch()
    student, teacher = batch(3, seed=rank)
    leaf = student["a"].requires_grad_()
    distiller(student, teacher)["loss_distill/a"].backward()
    projected = MatchingGuidedDistiller(CHANNELS, align="matched_projection")
    projected.observe(*batch(3, seed=rank))
    projected.rematch()
    torch.save(
        {
            "projections": projected.projections,
            "groups": {n: r.matching.groups.tolist() for n, r in reports.items()},
            "grad": leaf.grad,
            "state": distiller.state_dict(),
        },
        f"{folder}/{rank}.pt",
    )
    distiller.observe(*batch(3, seed=rank))
    if rank == 1:  # a cost that cannot be solved: all processes must say so, none may wait
        student, teacher = batch()
        teacher["a"][:] = math.nan
        distiller.observe(student, teacher)
    try:
        distiller.rematch()
    except ValueError as error:
        Path(f"{folder}/{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    mp.start_processes(_rank, (2, str(tmp_path)), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    single = MatchingGuidedDistiller(CHANNELS, loss="mse")
    (s0, t0), (s1, t1) = batch(3, seed=0), batch(3, seed=1)
    student, teacher = ({n: torch.cat([p[n], q[n]]) for n in p} for p, q in ((s0, s1), (t0, t1)))
    single.observe(student, teacher)
    reports = single.rematch()
    for rank in ranks:
        assert rank["groups"] == {name: report.matching.groups.tolist() for name, report in reports.items()}
        for name, report in reports.items():
            assert torch.equal(rank["projections"][name], matched_weight(report.matching))
    leaf = student["a"].requires_grad_()
    single(student, teacher)["loss_distill/a"].backward()
    assert leaf.grad is not None
    # a rank's loss is the mean over its half, DDP averages over ranks: together half of each gradient
    torch.testing.assert_close(torch.cat([rank["grad"] for rank in ranks]) / 2, leaf.grad, atol=1e-6, rtol=1e-4)
    state = single.state_dict()
    for rank in ranks:
        torch.testing.assert_close(rank["state"]["features.a.norm.running_var"], state["features.a.norm.running_var"])
    messages = {(tmp_path / f"{rank}.txt").read_text() for rank in range(2)}
    assert len(messages) == 1 and "feature a: the matching cost is not finite" in messages.pop()
