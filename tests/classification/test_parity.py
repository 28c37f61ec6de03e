"""What the pipeline computes against the formulas of the publication, written out here once more and independently."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm as normal

from classification.distillation import DistillationStep, Student, Teacher
from classification.features import pair_features, published_factors
from classification.models import build
from d2_mgd.distill import MatchingGuidedDistiller
from d2_mgd.distill.margins import tap_margins
from d2_mgd.matching import ChannelCost, solve_matching
from tests.classification.conftest import settled

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def published_cost(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Mean over images of the squared distance of flattened maps of length one."""
    images, s_channels, t_channels = len(student), student.shape[1], teacher.shape[1]
    cost = np.zeros((s_channels, t_channels))
    for image in range(images):
        for s in range(s_channels):
            for t in range(t_channels):
                a, b = student[image, s].ravel(), teacher[image, t].ravel()
                cost[s, t] += 2.0 - 2.0 * (a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))
    return cost / images


def published_groups(cost: np.ndarray) -> list[list[int]]:
    """The square assignment over T // S copies of the rows, the last T mod S columns left out by index."""
    students, teachers = cost.shape
    copies = teachers // students
    expanded = np.concatenate([cost] * copies, axis=0)[:, : copies * students]
    _, mates = linear_sum_assignment(expanded)
    return [[int(mates[copy * students + s]) for copy in range(copies)] for s in range(students)]


def published_margin(weight: float, bias: float) -> float:
    scale = abs(weight)
    negative = normal.cdf(-bias / scale)
    if negative <= 0.001:
        return -3.0 * scale
    return -scale * math.exp(-((bias / scale) ** 2) / 2) / math.sqrt(2 * math.pi) / negative + bias


def published_loss(student: torch.Tensor, guided: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    target = torch.max(guided, margin.view(1, -1, 1, 1))
    counted = (student > target) | (target > 0)
    return (F.mse_loss(student, target, reduction="none") * counted).sum()


def published_amp(
    teacher: torch.Tensor, margin: torch.Tensor, groups: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    maps, bounds = [], []
    for group in groups:
        members = teacher[:, group]  # (N, G, H, W)
        largest = members.abs().argmax(dim=1, keepdim=True)
        maps.append(members.gather(1, largest)[:, 0])
        bounds.append(margin[group].mean())
    return torch.stack(maps, dim=1), torch.stack(bounds)


def published_max(
    teacher: torch.Tensor, margin: torch.Tensor, groups: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    maps = torch.stack([teacher[:, group].amax(dim=1) for group in groups], dim=1)
    return maps, torch.stack([margin[group].max() for group in groups])


def total(cost: np.ndarray, groups: list[list[int]]) -> float:
    return float(sum(cost[s, t] for s, group in enumerate(groups) for t in group))


@pytest.mark.parametrize(("students", "teachers"), [(4, 12), (6, 6), (5, 13)])
def test_cost_and_matching(students: int, teachers: int) -> None:
    generator = np.random.default_rng(students)
    student = generator.normal(size=(7, students, 3, 5))
    teacher = generator.normal(size=(7, teachers, 3, 5))
    expected = published_cost(student, teacher)
    cost = ChannelCost(students, teachers)
    for part in (slice(0, 3), slice(3, 7)):
        cost.update(torch.from_numpy(student[part]).float(), torch.from_numpy(teacher[part]).float())
    np.testing.assert_allclose(cost.mean().numpy(), expected, **CLOSE)

    published = total(expected, published_groups(expected))
    ours = solve_matching(cost.mean(), "even")
    if teachers % students == 0:
        assert ours.total_cost == pytest.approx(published, abs=1e-5)
        balanced = solve_matching(cost.mean(), "balanced")
        assert balanced.total_cost == pytest.approx(published, abs=1e-5)
    else:  # which channels are left out is part of our optimum, and not of the published one
        assert ours.total_cost <= published + 1e-6


@pytest.mark.parametrize(
    ("weight", "bias"), [(1.0, 0.0), (-0.7, 0.3), (0.2, 1.5), (0.05, -0.4), (2.0, -1.0), (0.1, 0.3)]
)
def test_margins(weight: float, bias: float) -> None:
    module = torch.nn.BatchNorm2d(1)
    torch.nn.init.constant_(module.weight, weight)
    torch.nn.init.constant_(module.bias, bias)
    from d2_mgd.distill import batch_norm_margin

    assert float(batch_norm_margin(module)) == pytest.approx(published_margin(weight, bias), abs=1e-5)


def block_before_relu(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A bottleneck of torchvision's ResNet without its last ReLU."""
    out = F.relu(block.bn1(block.conv1(x)))
    out = F.relu(block.bn2(block.conv2(out)))
    out = block.bn3(block.conv3(out))
    return out + (x if block.downsample is None else block.downsample(x))


def resnet_maps(network: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    x = network.maxpool(F.relu(network.bn1(network.conv1(images))))
    maps = []
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        maps.append(block_before_relu(layer[-1], layer[:-1](x)))
        x = F.relu(maps[-1])
    return maps


def mobilenet_maps(network: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    maps, x, first = [], images, 0
    for last in (3, 5, 11, 13):
        maps.append(network.model[last][:-1](network.model[first:last](x)))
        x, first = F.relu(maps[-1]), last + 1
    return maps


@pytest.mark.parametrize(("reducer", "formula"), [("amp", published_amp), ("sp", published_max)])
def test_whole_step_of_mobilenet_v1_and_resnet50(reducer: str, formula) -> None:
    student_net = build("mobilenet_v1", 5)
    teacher_net = settled(build("resnet50", 5))
    pairs = pair_features("mobilenet_v1", "resnet50")
    widths = {"stage1": (128, 256), "stage2": (256, 512), "stage3": (512, 1024), "stage4": (1024, 2048)}
    teacher_taps = {name: pair.teacher for name, pair in pairs.items()}
    bounds = tap_margins(teacher_net, teacher_taps, {name: pair.norm for name, pair in pairs.items()})
    distiller = MatchingGuidedDistiller(
        widths, reducer=reducer, weights=published_factors(pairs, 1e4), margins=bounds, reduction="image_sum"
    )
    student = Student(student_net, {name: pair.student for name, pair in pairs.items()}, distiller)
    teacher = Teacher(teacher_net, teacher_taps, with_logits=True)
    step = DistillationStep(student, teacher)
    images, targets = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    step.eval()
    observed = step(images)
    distiller.observe(observed.student_maps, observed.teacher_maps)
    distiller.rematch()

    # the published step, from the modules alone
    with torch.no_grad():
        teacher_maps, teacher_logits = resnet_maps(teacher_net, images), teacher_net(images)
        student_maps, student_logits = mobilenet_maps(student_net, images), student_net(images)
    expected = torch.zeros(())
    for index, (name, module) in enumerate(
        zip(widths, (teacher_net.layer1, teacher_net.layer2, teacher_net.layer3, teacher_net.layer4))
    ):
        last = module[-1].bn3
        margin = torch.tensor(
            [published_margin(float(w), float(b)) for w, b in zip(last.weight, last.bias)], dtype=torch.float32
        )
        torch.testing.assert_close(bounds[name], margin, **CLOSE)
        groups = distiller.matchings[name].groups.tolist()
        guided, bound = formula(teacher_maps[index], margin, groups)
        normalised = F.batch_norm(
            student_maps[index], torch.zeros(widths[name][0]), torch.ones(widths[name][0]), training=False
        )
        expected = expected + published_loss(normalised, guided, bound) / 2 ** (4 - index - 1)
    expected = expected / 4 / 1e4  # the batch, and --loss-factor
    kd = (
        F.kl_div(
            F.log_softmax(student_logits / 1.5, dim=1), F.softmax(teacher_logits / 1.5, dim=1), reduction="batchmean"
        )
        * 1.5**2
    )

    output = step(images, targets)
    losses = {name: float(value) / 4 for name, value in output.losses.items()}
    found = sum(value for name, value in losses.items() if name.startswith("loss_distill/"))
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert losses["loss_kd"] == pytest.approx(float(kd), rel=1e-5)
    assert losses["loss_class"] == pytest.approx(float(F.cross_entropy(student_logits, targets)), rel=1e-5)


def test_cost_of_a_pass_is_that_of_the_published_maps() -> None:
    student_net, teacher_net = build("mobilenet_v1", 5), settled(build("resnet50", 5))
    pairs = {"stage4": pair_features("mobilenet_v1", "resnet50")["stage4"]}
    student = Student(
        student_net, {"stage4": pairs["stage4"].student}, MatchingGuidedDistiller({"stage4": (1024, 2048)})
    )
    step = DistillationStep(
        student, Teacher(teacher_net, {"stage4": pairs["stage4"].teacher}, with_logits=False)
    ).eval()
    images = torch.randn(3, 3, 64, 64)
    observed = step(images)
    student.distiller.observe(observed.student_maps, observed.teacher_maps)
    with torch.no_grad():
        expected = published_cost(
            mobilenet_maps(student_net, images)[3][:, :6].double().numpy(),
            resnet_maps(teacher_net, images)[3][:, :9].double().numpy(),
        )
    np.testing.assert_allclose(student.distiller.costs["stage4"].mean()[:6, :9].numpy(), expected, **CLOSE)


def test_random_drop_takes_members_of_the_group() -> None:
    distiller = MatchingGuidedDistiller({"a": (3, 9)}, reducer="rd", margins={"a": torch.arange(9.0)}, norm="none")
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 9, 4, 4)
    distiller.observe({"a": student}, {"a": teacher})
    distiller.rematch()
    groups = torch.from_numpy(distiller.matchings["a"].groups.copy())
    guided, margin = distiller._feature("a")._guided(teacher)
    members = teacher[:, groups]  # (N, S, G, H, W)
    assert (members == guided.unsqueeze(2)).any(dim=2).all()
    assert ((members == guided.unsqueeze(2)).float().mean(dim=(0, 3, 4)) > 0).all()  # each of them somewhere
    assert all(float(value) in groups[s].tolist() for s, value in enumerate(margin))
