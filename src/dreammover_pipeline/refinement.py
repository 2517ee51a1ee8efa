# SPDX-License-Identifier: Apache-2.0
"""A flow made finer than its cells by comparing the photos themselves.

Features know what a thing is and find it again wherever it has gone, but no closer than to a cell. The photos' own
colours know the place to a fraction of a cell, once it is known roughly. Around every cell a window of one photo is
compared with the place in the other photo to which the cell's similarity carries it. A cell that features have led
astray is looked for anywhere in the other photo first. Lengths are in cells, whatever the number of pixels in a cell.

Source of all of it: ours; the steps are Gauss–Newton's, as in Lucas and Kanade 1981, neighbours pass on what fits, as
in PatchMatch (Barnes et al. 2009).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
import torch.nn.functional as F

from .fields import at_once, cell_grid, lattice, sampled, sampled_around
from .flow import agreement, exact_matmul
from .light import in_one_light
from .paths import PATH_SIGMA, PATH_STIFFNESS, PATH_TOLERANCES
from .records import BidirectionalFlow
from .rigid import Similarity, complex_one, complex_product, fit_similarities, nearer_fit
from .search import most_alike

PIXELS = 4  # the photos are compared at this many pixels a cell; in finer ones every other pixel would go unseen
WINDOW_RADIUS = 5  # places from the middle of the window to its edge at which the photos are compared
REFINEMENT_ROUNDS = 4  # how often neighbours are asked and steps are taken
NEIGHBOUR_GAIN = 0.004  # difference in colour by which a neighbour's similarity must be better to be taken over
REST_GAIN = 0.01  # difference in colour by which a cell's similarity must be better than rest to be kept
SCALES = (0.6, 1.6)  # least and largest factor by which a similarity may scale what it carries
SETTLED = 0.002  # difference in colour of a window up to which it is not worth a step
DAMPING = 0.0006  # what is added to the normal equations' diagonal, so that a window without texture stays
OUTLIER = 0.12  # difference in colour that counts a quarter as much as it would without the robust weight
WORST = 0.25  # difference in colour beyond which it makes no difference how much larger it is
UNFOUND_WEIGHT = 0.3  # weight of a cell whose colours were not found, when the flow is made regular again
REGULAR_SIGMA = 1.5  # sigma, in cells of the unit grid, of the windows in which the refined flow is made regular
REGULAR_TOLERANCES = (2.0, 1.0, 0.7)  # sigmas, in cells of the unit grid, of how far vectors lie from the last fit
# Windows, on a CPU and elsewhere, that are worked on together, so that memory does not grow with the grid.
WINDOWS_AT_ONCE, WINDOWS_AT_ONCE_ON_GPU = 1024, 4096
LOST = 0.05  # difference in colour of a cell's window above which it is worth looking elsewhere
FOUND_GAIN = 0.015  # difference in colour by which what is found must be better in both photos
ALIGNED_TOLERANCE = 0.1  # difference in colour up to which a window counts as found in the photos' finer detail


@dataclass(frozen=True)
class Reach:
    """How much of a photo a window covers, and how far it may be moved; lengths are in cells.

    Windows are compared at `density` places a cell along each side; `neighbours` are how far away the eight neighbours
    are that are asked; a round takes at most so many Gauss–Newton `steps`, none of them longer than `longest`, and
    may lead as far as `furthest`.
    """

    density: int
    neighbours: tuple[int, ...]
    steps: int
    longest: float
    furthest: float

    @property
    def half(self) -> float:
        """From the middle of the window to its edge."""
        return WINDOW_RADIUS / self.density

    def counted(self, offsets: torch.Tensor) -> torch.Tensor:
        """How much samples count whose places from the middle of the window are (…, 2)."""
        return (-2 * offsets.square().sum(-1) / self.half**2).exp()


FROM_FEATURES = Reach(density=2, neighbours=(1, 2, 4), steps=6, longest=0.5, furthest=2.0)
WITHIN_A_CELL = Reach(density=3, neighbours=(1,), steps=3, longest=0.25, furthest=0.5)


def refined_flow(flow: BidirectionalFlow, photos: torch.Tensor, tolerance: float) -> BidirectionalFlow:
    """The flow refined on the photos wherever their colours say the same.

    Where the window of a cell differs by more than `tolerance` from what it is carried to even at best, the photos
    show different things, or the thing is hidden, and the cell keeps the flow that it had. At last a similarity is
    fitted to the flow around every cell, in windows half as wide as those of the match, so that single cells that were
    carried off fall into line.

    Args:
        flow: The flow on a grid of cells that covers the same picture as the photos. Where it is off by more than a
            few cells, only what looks like nothing else is found.
        photos: The two photos, (2, 3, H, W) in [0, 1]; they are brought into one light here.
        tolerance: Mean difference in colour, of 1, up to which the window of a cell counts as found.

    Returns:
        The flow in both directions, in fractions of cells.
    """
    with exact_matmul(flow.forward.device.type):
        ways = flow.stacked()
        h, w = ways.shape[-2:]
        photos = F.interpolate(photos.to(ways), (PIXELS * h, PIXELS * w), mode="area")
        windows = Windows.of(in_one_light(photos, flow), (h, w), FROM_FEATURES)
        best = _found_anywhere(windows, _rest(windows, windows.compared(ways, _turn(flow))))
        for _ in range(REFINEMENT_ROUNDS):
            best = _bettered(windows, _rest(windows, best))
        found = best.residual <= tolerance
        ways = torch.where(found, best.shift, ways)
        sure = agreement(BidirectionalFlow.of(ways)) * found.to(ways.dtype).clamp(min=UNFOUND_WEIGHT)
        return BidirectionalFlow.of(fit_similarities(ways, sure, True, REGULAR_SIGMA, REGULAR_TOLERANCES).shift)


def aligned_flow(flow: BidirectionalFlow, levels: Iterable[torch.Tensor]) -> BidirectionalFlow:
    """The flow aligned with the photos' finer detail.

    At each level a cell may come to rest, take over the similarity of a cell beside it, and then move by half a cell,
    where colours differ less for it. This is for looking up pixels and not for moving cells: parts of a cell may move
    differently, and what is found is the flow of its middle.

    Args:
        flow: The flow, which must be right to within a cell.
        levels: The two photos, (2, 3, H, W) in [0, 1], finer from level to level. Windows have as many samples at all
            levels, so none costs more than another.

    Returns:
        The flow in both directions, in fractions of cells.
    """
    with exact_matmul(flow.forward.device.type):
        size = tuple(flow.forward.shape[-2:])
        for photos in levels:
            ways = flow.stacked()
            windows = Windows.of(in_one_light(photos.to(ways), flow), size, WITHIN_A_CELL)
            best = _bettered(windows, _rest(windows, windows.compared(ways, _turn(flow))))
            flow = BidirectionalFlow.of(torch.where(best.residual <= ALIGNED_TOLERANCE, best.shift, ways))
    return flow


def _turn(flow: BidirectionalFlow) -> torch.Tensor:
    """How what is around every cell turns and grows along a flow, (2, 2, h, w), as `Similarity` has it."""
    ways = flow.stacked()
    return fit_similarities(ways, agreement(flow), False, PATH_SIGMA, PATH_TOLERANCES, PATH_STIFFNESS).turn


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows around the n = h·w cells of each of two photos, s samples each.

    `photos` are the two, (2, 3, H, W), and `slopes` (2, 6, H, W) their change per cell to the right in three colours
    and downwards in three; `cells` (1, 2, h, w) are the places of the cells. The other fields have all 2n cells in a
    row, the first photo's first: `own` (3, s, 2n) are the colours of the samples; `weight` (s, 2n) is how much they
    count, which is nothing off the picture and 1 in all after a division by `total` (2n,). `offsets` (s, 2) are the
    places of the samples from the middle, and `reach` says how large windows are.
    """

    photos: torch.Tensor
    slopes: torch.Tensor
    cells: torch.Tensor
    own: torch.Tensor
    offsets: torch.Tensor
    weight: torch.Tensor
    total: torch.Tensor
    reach: Reach

    @classmethod
    def of(cls, photos: torch.Tensor, size: tuple[int, int], reach: Reach) -> Windows:
        """The windows of two photos (2, 3, H, W) around the cells of a grid (h, w)."""
        cells = cell_grid(*size, photos)
        offsets = lattice(WINDOW_RADIUS, reach.density, photos)
        there = cells[0].flatten(1)
        seen = [sampled_around(photo, there, torch.zeros_like(there), offsets, size) for photo in photos]
        own, inside = (torch.cat(parts, -1) for parts in zip(*seen, strict=True))
        weight = reach.counted(offsets)[:, None] * inside
        total = weight.sum(0)
        padded = F.pad(photos, (1, 1, 1, 1), mode="replicate")
        right = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2 * (photos.shape[-1] / size[1])
        down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2 * (photos.shape[-2] / size[0])
        return cls(photos, torch.cat([right, down], 1), cells, own, offsets, weight / total, total, reach)

    @property
    def size(self) -> tuple[int, int]:
        """Size (h, w) of the grid."""
        return tuple(self.cells.shape[-2:])

    def row(self, field: torch.Tensor) -> torch.Tensor:
        """A field (2, C, h, w) as what it is at the cells in a row, (C, 2n)."""
        return field.flatten(2).movedim(0, 1).flatten(1)

    def field(self, row: torch.Tensor) -> torch.Tensor:
        """What (C, 2n) is at the cells in a row as a field (2, C, h, w)."""
        return row.unflatten(1, (2, *self.size)).movedim(0, 1)

    def compared(self, shift: torch.Tensor, turn: torch.Tensor) -> Similarity:
        """Similarities (2, 2, h, w) with how far the colours of the cells' windows are from where they lead.

        The difference in colour is averaged over the part of the window that lies on its photo; what is carried
        beyond the other photo counts as `WORST`.
        """
        shifts, turns = self.row(shift), self.row(turn)
        residual = torch.empty_like(shifts[:1])
        for image, cells in self._blocks():
            colours, inside = self._carried(image, cells, shifts[:, cells], turns[:, cells], self.offsets)
            off = _difference(self.own[..., cells] - colours, inside)
            residual[0, cells] = (self.weight[:, cells] * off).sum(0)
        return Similarity(shift, turn, self.field(residual))

    def resting(self) -> Similarity:
        """Rest, with how far the colours of the cells' windows are from those of the other photo's."""
        first, second = self.own.chunk(2, 2)
        n = first.shape[2]
        off = _difference(first - second, torch.ones_like(first[0], dtype=torch.bool))
        cost = (self.weight[:, :n] * off).sum(0).unflatten(0, self.size).expand(2, 1, -1, -1)
        still = torch.zeros_like(self.cells).expand(2, -1, -1, -1)
        return Similarity(still, still, cost)

    def contrast(self) -> torch.Tensor:
        """How far the colours of every cell's window are from their mean, on average, (2, 1, h, w)."""
        mean = (self.weight * self.own).sum(1, keepdim=True)
        return self.field((self.weight * (self.own - mean).abs().mean(0)).sum(0, keepdim=True))

    def of_neighbours(self, fit: Similarity) -> Similarity:
        """For every cell the similarity that fits it best of those of its neighbours that do not rest.

        Each similarity is followed once, for the samples of all the windows that might take it over.
        """
        h, w = self.size
        reach, furthest = self.reach, max(self.reach.neighbours)
        beside = [(y * by, x * by) for by in reach.neighbours for y, x in product((-1, 0, 1), repeat=2) if y or x]
        samples = lattice(WINDOW_RADIUS + furthest * reach.density, reach.density, self.offsets)
        # A cell whose neighbour lies so far below and to the right lies as far above and to the left of the neighbour.
        apart = samples + self.offsets.new_tensor(beside).flip(1)[:, None]  # (k, samples, 2)
        kernels = reach.counted(apart) * (apart.abs().amax(2) < reach.half + 0.1)
        shifts, turns = self.row(fit.shift), self.row(fit.turn)
        costs = shifts.new_full((len(beside), shifts.shape[1]), torch.inf)
        for image, cells in self._blocks((shifts != 0).any(0) | (turns != 0).any(0)):
            still = torch.zeros_like(shifts[:, cells])
            own, seen = self._carried(1 - image, cells, still, still, samples)
            colours, inside = self._carried(image, cells, shifts[:, cells], turns[:, cells], samples)
            costs[:, cells] = kernels @ (_difference(own - colours, inside) * seen)
        padded = F.pad(self.field(costs), (furthest,) * 4, value=torch.inf)
        parts = [padded[:, k, furthest + y :, furthest + x :][..., :h, :w] for k, (y, x) in enumerate(beside)]
        cost, which = torch.stack(parts, 1).min(1, keepdim=True)
        way = torch.tensor(beside, device=which.device).T.flip(0)[:, which[:, 0]].movedim(1, 0)  # (2, 2, h, w)
        x, y = (self.cells.long() + way).unbind(1)
        index = (y.clamp(0, h - 1) * w + x.clamp(0, w - 1)).flatten(1)[:, None].expand(-1, 2, -1)
        shift, turn = (part.flatten(2).gather(2, index).unflatten(2, (h, w)) for part in (fit.shift, fit.turn))
        shift = shift - complex_product(turn, way.to(turn))
        return Similarity(shift, turn, cost / self.field(self.total[None]))

    def stepped(self, fit: Similarity, chosen: torch.Tensor) -> Similarity:
        """Gauss–Newton steps towards colours that differ less, at chosen cells (2, 1, h, w), as long as they do so."""
        parts = [self.row(part).clone() for part in (fit.shift, fit.turn, fit.residual)]
        for image, cells in self._blocks(self.row(chosen)[0]):
            self._descend(image, cells, *parts)
        return Similarity(*map(self.field, parts))

    def _descend(
        self, image: int, cells: torch.Tensor, shifts: torch.Tensor, turns: torch.Tensor, residuals: torch.Tensor
    ) -> None:
        """Put what the steps of some of an image's cells lead to into shifts, turns and residuals (…, 2n).

        A step moves the window before it is carried. So its own slopes serve all steps: where it is carried rightly,
        the other photo's are the same, turned.
        """
        begin, shift, turn = shifts[:, cells], shifts[:, cells], turns[:, cells]
        still = torch.zeros_like(shift)
        slopes, _ = self._carried(1 - image, cells, still, still, self.offsets, self.slopes)
        right, down = slopes.split(3)
        tensor = torch.stack([(a * b).sum(0) for a, b in ((right, right), (right, down), (down, down))])  # (3, s, m)
        own, weight = self.own[..., cells], self.weight[:, cells]
        for step in range(self.reach.steps + 1):
            colours, inside = self._carried(image, cells, shift, turn, self.offsets)
            off = own - colours
            residual = (weight * _difference(off, inside)).sum(0)
            if step:
                near = torch.hypot(*(shift - begin)) <= self.reach.furthest
                better = ((residual < residuals[0, cells]) & near).nonzero()[:, 0]
                cells, begin, shift, turn, residual, own, weight, slopes, tensor, off, inside = (
                    part.index_select(-1, better)
                    for part in (cells, begin, shift, turn, residual, own, weight, slopes, tensor, off, inside)
                )
            shifts[:, cells], turns[:, cells], residuals[0, cells] = shift, turn, residual
            if step == self.reach.steps or not len(cells):
                return
            robust = weight * inside * (1 + (off.abs().mean(0) / OUTLIER).square()) ** -2
            pull = [robust * (part * off).sum(0) for part in slopes.split(3)]
            square = self._squares @ (robust * tensor).flatten(0, 1)
            moved = _solved(square, sum(move @ part for move, part in zip(self._moves, pull, strict=True)))
            moved = moved.clamp(-self.reach.longest, self.reach.longest)
            shift = shift + moved[:2] + _product(turn, moved[:2])
            grown = moved[2:] / self._unit
            turn = _held_to_scale(turn + grown + _product(turn, grown))

    @property
    def _unit(self) -> float:
        """Turns are counted by how far they move a sample that is so many cells from the middle."""
        return self.reach.half / 2

    @cached_property
    def _moves(self) -> torch.Tensor:
        """How far each of a step's four numbers moves a sample to the right and downwards, (2, 4, s)."""
        x, y = self.offsets.T / self._unit
        one, zero = torch.ones_like(x), torch.zeros_like(x)
        return torch.stack([torch.stack([one, zero, x, -y]), torch.stack([zero, one, y, x])])

    @cached_property
    def _squares(self) -> torch.Tensor:
        """What the three parts of a sample's tensor add to the normal equations, (4·4, 3·s)."""
        outer = torch.einsum("ais,bjs->abijs", self._moves, self._moves)
        return torch.stack([outer[0, 0], outer[0, 1] + outer[1, 0], outer[1, 1]], 2).flatten(2).flatten(0, 1)

    def _blocks(self, chosen: torch.Tensor | None = None) -> Iterator[tuple[int, torch.Tensor | slice]]:
        """The image and the places in the row of chosen cells (2n,) bool, or of all, a few at a time."""
        n = self.own.shape[2] // 2
        few = at_once(self.own, WINDOWS_AT_ONCE, WINDOWS_AT_ONCE_ON_GPU)
        for image in (0, 1):
            if chosen is None:
                starts = range(image * n, (image + 1) * n, few)
                yield from ((image, slice(start, min(start + few, starts.stop))) for start in starts)
            else:
                cells = chosen.chunk(2)[image].nonzero()[:, 0] + image * n
                yield from ((image, block) for block in cells.split(few) if len(block))

    def _carried(
        self,
        image: int,
        cells: torch.Tensor | slice,
        shift: torch.Tensor,
        turn: torch.Tensor,
        offsets: torch.Tensor,
        pictures: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What samples at offsets (s, 2) from an image's cells are carried to, (C, s, m), and whether that is inside.

        Colours of the other photo, or values of the other of two `pictures`; inside (s, m) is inside the picture.
        """
        middle = self.cells[0].flatten(1).repeat(1, 2)[:, cells] + shift
        other = (self.photos if pictures is None else pictures)[1 - image]
        return sampled_around(other, middle, turn, offsets, self.size)


def _solved(square: torch.Tensor, towards: torch.Tensor) -> torch.Tensor:
    """The solutions (4, m) of damped normal equations (16, m) and (4, m)."""
    there = square.device if square.is_cuda else "cpu"  # since MPS neither solves nor has float64
    square = square.T.unflatten(1, (4, 4)).to(there).double()
    square = square + DAMPING * torch.eye(4, dtype=square.dtype, device=there)
    # Unlike `solve`, this does not wait for a GPU to say whether a matrix is singular, which damped ones are not.
    solved, _ = torch.linalg.solve_ex(square, towards.T.to(there).double()[..., None])
    return solved[..., 0].T.to(towards)


def _product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The products of complex numbers (2, m)."""
    return complex_product(first[None], second[None])[0]


def _difference(off: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """The difference in colour (s, m) of samples that differ by (3, s, m), or `WORST` where they are off the photo."""
    return off.abs().mean(0).clamp(max=WORST).where(inside, WORST)


def _found_anywhere(windows: Windows, fit: Similarity) -> Similarity:
    """Where the colours of a cell differ, look all over the other photo for a place that is like its window.

    It is believed only if the place found finds the cell, too, and both are better off by it. A window without texture
    is like many places, and what it could gain counts as no more than its contrast: ground that is hidden in the one
    photo would else be carried to ground that is hidden in the other.
    """
    shift, turn, matched = most_alike(windows.photos, windows.size, windows.reach.half)
    matched = matched & (fit.residual > LOST)
    made = windows.stepped(Similarity(shift, turn, torch.ones_like(fit.residual)), matched)
    gain = torch.minimum(fit.residual, windows.contrast()).where(matched, 0) - made.residual
    there, seen = sampled(gain.flip(0), (windows.cells + made.shift).flatten(2)[..., None], windows.size)
    both = torch.minimum(gain, there.where(seen, -1).reshape(gain.shape))
    return nearer_fit(fit, Similarity(made.shift, made.turn, made.residual.where(both > FOUND_GAIN, torch.inf)))


def _rest(windows: Windows, fit: Similarity) -> Similarity:
    """Let every cell rest that fits nearly as well so."""
    return nearer_fit(fit, windows.resting(), -REST_GAIN)


def _bettered(windows: Windows, fit: Similarity) -> Similarity:
    """Let every cell take over a neighbour's similarity that fits better, and take steps from there."""
    fit = nearer_fit(fit, windows.of_neighbours(fit), NEIGHBOUR_GAIN)
    return windows.stepped(fit, fit.residual > SETTLED)


def _held_to_scale(turn: torch.Tensor) -> torch.Tensor:
    """Turns (2, m) that scale by no less and no more than `SCALES`."""
    one = complex_one(turn[0])
    scale = torch.hypot(*(one + turn)).clamp(min=1e-3)
    return (one + turn) * (scale.clamp(*SCALES) / scale) - one
