"""What the two networks' maps are to each other: padding, matching, known answers."""

from __future__ import annotations

import copy
import math

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.utils.events import EventStorage
from tiny_detectors import SIZES, batch, built, matched, paired, step, tiny

from d2_mgd.errors import UserError


class TestKnownAnswers:
    @pytest.mark.parametrize("align", ["none", "matching"])
    def test_twins_have_no_loss(self, align: str) -> None:
        student = tiny()
        model = paired(
            student, copy.deepcopy(student), ["res4", "p3"], align=align, norm="none", train_last_norm="none"
        )
        if align == "matching":
            for report in (model.distiller.observe(*model.extract_maps(batch())), model.distiller.rematch())[
                1
            ].values():
                assert report.matching.groups[:, 0].tolist() == list(range(report.matching.num_student))
        student.eval()  # a frozen norm rounds otherwise where gradients are wanted
        student_maps, teacher_maps, valid = model.extract_maps(batch())
        assert all(float(loss) == 0 for loss in model.distiller(student_maps, teacher_maps, valid).values())
        model.train()
        assert all(float(step(model)[f"loss_distill/{name}"]) < 1e-6 for name in ("res4", "p3"))

    def test_permuted_teacher_is_recovered(self) -> None:
        student = tiny()
        teacher = copy.deepcopy(student)
        order = torch.randperm(8)
        output = teacher.backbone.fpn_output3
        with torch.no_grad():
            output.weight.copy_(output.weight[order])
            output.bias.copy_(output.bias[order])
        model = matched(paired(student, teacher, ["p3"], norm="none"), batch(*SIZES))
        groups = model.distiller.matchings["p3"].groups[:, 0]
        assert order[torch.from_numpy(groups.copy())].tolist() == list(range(8))
        assert float(model.distiller(*model.extract_maps(batch(*SIZES)))["loss_distill/p3"]) == pytest.approx(
            0, abs=1e-9
        )


class TestPadding:
    def test_padded_cells_count_neither_in_cost_nor_in_loss(self) -> None:
        model = matched(
            built("retinanet", "retinanet", "MGD.FEATURES", ["res3", "p4"], "MGD.LOSS", "partial_l2, pearson")
        )
        student_maps, teacher_maps, valid = model.extract_maps(batch((64, 96), (33, 40)))
        spoilt = [
            {
                name: torch.where(valid[name], found, torch.full_like(found, 1e3)) if valid[name] is not None else found
                for name, found in maps.items()
            }
            for maps in (student_maps, teacher_maps)
        ]
        assert not torch.equal(spoilt[0]["res3"], student_maps["res3"])
        clean, spoilt_losses = model.distiller(student_maps, teacher_maps, valid), model.distiller(*spoilt, valid)
        for name in clean:
            assert float(clean[name]) == pytest.approx(float(spoilt_losses[name]), rel=1e-5)
        model.distiller.observe(student_maps, teacher_maps, valid)
        cost = {name: found.mean() for name, found in model.distiller.costs.items()}
        for found in model.distiller.costs.values():
            found.reset()
        model.distiller.observe(*spoilt, valid)
        for name, found in model.distiller.costs.items():
            torch.testing.assert_close(found.mean(), cost[name])

    def test_networks_that_pad_differently_see_the_same_place(self) -> None:
        """The student pads to the largest image, the teacher to a multiple of 32: its extra cells are left out."""
        model = built("faster_rcnn_c4", "faster_rcnn", "MGD.FEATURES", ["res2", "res4"])
        samples = batch((75, 100), (60, 50))
        student_maps, teacher_maps, valid = model.extract_maps(samples)
        with torch.no_grad():
            pixels = model.teacher.model.preprocess_image(samples).tensor
            assert pixels.shape[-2:] == (96, 128)
            alone = model.teacher.model.backbone.bottom_up(pixels)
        for name, (height, width) in {"res2": (19, 25), "res4": (5, 7)}.items():
            assert student_maps[name].shape[-2:] == teacher_maps[name].shape[-2:] == (height, width)
            assert valid[name].shape == (2, 1, height, width)
        assert torch.equal(teacher_maps["res4"].relu(), alone["res4"][..., :5, :7])
        matched(model, samples)
        assert all(math.isfinite(value.detach()) for value in step(model, samples).values())

    def test_no_mask_without_padding(self) -> None:
        assert built().extract_maps(batch((64, 64), (64, 64)))[2] == {"p3": None, "p4": None, "p5": None}


class TestMatching:
    def test_extract_maps_leaves_modes_and_gradients_alone(self) -> None:
        model = built("retinanet", "retinanet", "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0)
        for training in (True, False):
            model.student.train(training)
            modes = [module.training for module in model.modules()]
            student_maps, teacher_maps, _ = model.extract_maps(batch())
            assert modes == [module.training for module in model.modules()]
            assert not any(found.requires_grad for found in (*student_maps.values(), *teacher_maps.values()))
        assert model.training

    def test_extract_maps_needs_no_annotations(self) -> None:
        model = built("faster_rcnn", "faster_rcnn", "MGD.FEATURES", ["p2"])
        assert model.training
        assert "p2" in model.extract_maps([{"image": batch()[0]["image"]}])[0]

    def test_a_model_without_a_matching_matches_on_the_maps_of_its_first_step(self) -> None:
        model, other = built(), built()
        other.load_state_dict(model.state_dict())
        other.teacher.model.load_state_dict(model.teacher.model.state_dict())
        matched(other)
        losses = step(model)
        assert all(float(losses[f"loss_distill/{name}"].detach()) > 0 for name in ("p3", "p4", "p5"))
        for name, matching in other.distiller.matchings.items():
            assert not matching.changed(model.distiller.matchings[name])

    def test_every_tenth_step_counts_in_the_costs(self) -> None:
        model = matched(built())
        for iteration, images in ((0, 2), (1, 2), (9, 2), (10, 4)):
            with EventStorage(iteration):
                model(batch(*SIZES))
            assert {cost.num_images for cost in model.distiller.costs.values()} == {images}

    def test_before_the_first_scheduled_matching_nothing_is_distilled(self) -> None:
        model = built("retinanet", "retinanet", "MGD.REMATCH.START", False, "MGD.REMATCH.AT", [1])
        losses = step(model)
        assert all(float(losses[f"loss_distill/{name}"]) == 0 for name in ("p3", "p4", "p5"))
        sum(losses.values()).backward()  # every parameter takes part all the same
        assert all(p.grad is not None and float(p.grad.abs().sum()) == 0 for p in model.distiller.parameters())
        with EventStorage(1):
            assert all(float(model(batch(*SIZES))[f"loss_distill/{name}"]) > 0 for name in ("p3", "p4", "p5"))

    def test_a_pass_that_no_hook_made_is_an_error(self) -> None:
        model = built("retinanet", "retinanet", "MGD.REMATCH.SOURCE", "pass")
        with pytest.raises(UserError, match=r"iteration 0 has no matching: .*distillation_hooks\(cfg, model\)"):
            step(model)

    def test_distiller_state_is_restored(self) -> None:
        model, other = matched(built()), built()
        other.load_state_dict(model.state_dict())
        other.teacher.model.load_state_dict(model.teacher.model.state_dict())
        torch.manual_seed(1)
        one = step(model)
        torch.manual_seed(1)
        assert {name: float(value) for name, value in step(other).items()} == {n: float(v) for n, v in one.items()}
