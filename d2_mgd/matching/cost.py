"""The matching cost: a running (S, T) mean distance between student and teacher channel maps.

Shape shorthand: N images, S student channels, T teacher channels, P = H * W pixels of a map.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2_mgd.errors import UserError

METRICS = ("cosine", "pearson")

_EPSILON = 1e-12  # maps with a smaller norm are dead: they are similar to nothing


class ChannelCost:
    """Running mean over images of the distance between every student and every teacher channel.

    The distance of two channels in one image is ``2 - 2 cos`` of their flattened maps, which is the squared Euclidean
    distance of the maps after each is scaled to length one (Yue et al., ECCV 2020). A map that is zero everywhere has
    cosine 0, so distance 2, to every other. ``pearson`` centres each map first: the distance is ``2 - 2 r``, and
    constant maps count as dead.

    Similarities of a batch are one matrix product in float32 (float64 for float64 maps) whatever the dtype of the maps
    or the autocast state; sums over batches are float64, so that nothing is lost over 10^5 images and more.

    Args:
        num_student: S.
        num_teacher: T.
        metric: ``cosine`` (the published one) or ``pearson``.
        device: where the sums live; by default where the first maps are.
    """

    def __init__(
        self,
        num_student: int,
        num_teacher: int,
        metric: str = "cosine",
        device: torch.device | str | None = None,
    ) -> None:
        if metric not in METRICS:
            raise UserError(f"unknown matching metric {metric!r}; there are: {', '.join(METRICS)}.")
        if num_student < 1 or num_teacher < 1:
            raise UserError(f"a cost needs at least one channel on each side, got S={num_student}, T={num_teacher}.")
        self.num_student = int(num_student)
        self.num_teacher = int(num_teacher)
        self.metric = metric
        self._device = None if device is None else torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._similarity: Tensor | None = None  # (S, T) float64, sum over this process's images
        with torch.inference_mode(False):  # sums made there could not be added to elsewhere
            self._count = torch.zeros((), dtype=torch.float64)
        self._reduced: tuple[Tensor, float] | None = None  # the same two, over all processes

    @property
    def num_images(self) -> int:
        """Images that count in :meth:`mean`: of all processes after :meth:`all_reduce`, else of this one."""
        return round(float(self._count) if self._reduced is None else self._reduced[1])

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> None:
        """Add the images of a batch.

        Args:
            student: (N, S, H, W) maps of any floating dtype.
            teacher: (N, T, H, W) maps of the same images.
            valid: (N, 1, H, W) boolean, true at real pixels; padded pixels count for nothing, and an image
                without a real pixel is no image. All pixels are real by default.

        Raises:
            ValueError: shapes that do not fit, with both shapes.
        """
        self._check(student, teacher, valid)
        with torch.autocast(student.device.type, enabled=False):
            similarity = self._directions(student, valid) @ self._directions(teacher, valid).T
        self._device = self._device or similarity.device
        if self._similarity is None:
            self._similarity = torch.zeros_like(similarity, dtype=torch.float64, device=self._device)
        self._similarity = self._similarity.to(self._device)  # a stored sum waits elsewhere for the first maps
        self._similarity += similarity.to(self._similarity)
        if valid is None:
            self._count += student.shape[0]
        else:
            self._count = self._count.to(valid.device) + valid.flatten(1).any(dim=1).sum()
        self._reduced = None

    def all_reduce(self, group: Any = None) -> None:
        """Sum over all processes of ``group`` (collective; a process without images takes part too).

        :meth:`mean` and :meth:`num_images` then speak for all processes, until the next :meth:`update`. Without an
        initialised process group this does nothing. Calling it twice changes nothing.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        packed = self.packed().to(_collective_device(group))
        dist.all_reduce(packed, group=group)
        self._reduced = (packed[:-1].view(self.num_student, self.num_teacher), float(packed[-1]))

    def mean(self) -> Tensor:
        """(S, T) float64 mean distance over the images, between 0 and 4, on the CPU.

        Raises:
            ValueError: there was no image, or an entry is not finite (the message says which channels).
        """
        similarity, count = self._reduced or (self._similarity, float(self._count))
        if count == 0 or similarity is None:
            raise UserError("the matching cost is empty: no image was observed.")
        cost = (2.0 - 2.0 * similarity.cpu() / count).clamp_(0.0, 4.0)  # clamp keeps NaN
        if not torch.isfinite(cost).all():
            student, teacher = torch.nonzero(~torch.isfinite(cost))[0].tolist()
            bad = int((~torch.isfinite(cost)).sum())
            raise UserError(
                f"the matching cost is not finite at {bad} of {cost.numel()} entries, first at student channel "
                f"{student}, teacher channel {teacher}: the maps held NaN or infinity."
            )
        return cost

    def packed(self) -> Tensor:
        """(S * T + 1,) float64: a copy of this process's sum, and the number of images. Does not wait for a GPU."""
        device = None if self._similarity is None else self._similarity.device
        packed = torch.zeros(self.num_student * self.num_teacher + 1, dtype=torch.float64, device=device)
        if self._similarity is not None:
            packed[:-1] = self._similarity.flatten()
        packed[-1] = self._count
        return packed

    def load_packed(self, packed: Tensor) -> None:
        """Continue from :meth:`packed`, or from the sum of several processes' tensors."""
        count = float(packed[-1])
        similarity = packed[:-1].view(self.num_student, self.num_teacher) if count else None
        self.load_state_dict({"similarity": similarity, "count": count})

    def state_dict(self) -> dict[str, Any]:
        """This process's sums, for resuming in the middle of a collection."""
        return {"similarity": self._similarity, "count": float(self._count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, on whatever device that was.

        Raises:
            ValueError: the state is of a cost between other numbers of channels.
        """
        similarity = state["similarity"]
        if similarity is not None and tuple(similarity.shape) != (self.num_student, self.num_teacher):
            raise UserError(
                f"the stored cost is of {tuple(similarity.shape)} channels, this one of "
                f"{(self.num_student, self.num_teacher)}."
            )
        self.reset()
        if similarity is not None:
            self._similarity = similarity.to(device=self._device, dtype=torch.float64, copy=True)
        self._count = torch.tensor(float(state["count"]), dtype=torch.float64)

    def _check(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> None:
        shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
        if student.ndim != 4 or teacher.ndim != 4:
            raise ValueError(f"maps must be (N, C, H, W), got {shapes}.")
        if student.shape[1] != self.num_student or teacher.shape[1] != self.num_teacher:
            raise ValueError(
                f"expected {self.num_student} student and {self.num_teacher} teacher channels, got {shapes}."
            )
        if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
            raise ValueError(f"both maps must have the same images, height and width, got {shapes}.")
        if valid is not None and (
            valid.dtype != torch.bool or tuple(valid.shape) != (student.shape[0], 1, *student.shape[2:])
        ):
            raise ValueError(
                f"valid must be a boolean mask of {(student.shape[0], 1, *student.shape[2:])}, "
                f"got {valid.dtype} of {tuple(valid.shape)}."
            )

    def _directions(self, maps: Tensor, valid: Tensor | None) -> Tensor:
        """(C, N * P) matrix: each image's map of each channel, scaled to length one (or zero if it is dead)."""
        by_pixel = _is_channels_last(maps)  # their order in memory is kept: turning maps costs more than the product
        axis = 1 if by_pixel else 2  # of the pixels
        rows = maps.permute(0, 2, 3, 1).flatten(1, 2) if by_pixel else maps.flatten(2)  # (N, P, C) or (N, C, P)
        if rows.dtype != torch.float64:
            rows = rows.float()
        mask = None if valid is None else valid.flatten(1).unsqueeze(2 if by_pixel else 1)
        if mask is not None:
            rows = rows.masked_fill(~mask, 0.0)  # not a product: the padding may hold NaN
        length = _length(rows, axis)
        if self.metric == "pearson":
            if mask is None:
                rows = rows - rows.mean(dim=axis, keepdim=True)
            else:
                pixels = mask.sum(dim=axis, keepdim=True).clamp(min=1)
                rows = (rows - rows.sum(dim=axis, keepdim=True) / pixels).masked_fill(~mask, 0.0)
            whole = length
            length = _length(rows, axis)
            # what centring leaves of a constant map is rounding, not a direction
            length = torch.where(length <= 16 * torch.finfo(rows.dtype).eps * whole, torch.zeros_like(length), length)
        scale = torch.where(length > _EPSILON, 1.0 / length.clamp(min=_EPSILON), torch.zeros_like(length))
        scale = torch.where(torch.isfinite(length), scale, length)  # NaN and infinity are reported, not hidden
        if by_pixel:
            return (rows * scale).flatten(0, 1).T
        channels_first = torch.empty(
            (rows.shape[1], rows.shape[0], rows.shape[2]), dtype=rows.dtype, device=rows.device
        )
        torch.mul(rows.transpose(0, 1), scale.transpose(0, 1), out=channels_first)
        return channels_first.flatten(1)


def _length(rows: Tensor, axis: int) -> Tensor:
    if axis == rows.ndim - 1:
        return torch.linalg.vector_norm(rows, dim=axis, keepdim=True)
    return rows.square().sum(dim=axis, keepdim=True).sqrt()  # a norm over strided values is several times slower


def _is_channels_last(maps: Tensor) -> bool:
    return not maps.is_contiguous() and maps.is_contiguous(memory_format=torch.channels_last)


def _collective_device(group: Any = None) -> torch.device:
    """Where tensors have to be for the collectives of ``group``: NCCL takes none on the CPU."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
