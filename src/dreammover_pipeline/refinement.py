# SPDX-License-Identifier: Apache-2.0
"""A flow made finer than its cells by comparing the photos themselves.

Features know what a thing is and find it again wherever it has gone, but no closer than to a cell. The photos' own
colours know the place to a fraction of a cell, once it is known roughly. Around every cell a window of one photo is
compared with the place in the other photo to which the cell's similarity carries it. A cell that features have led
astray is looked for anywhere in the other photo first. Lengths are in cells, whatever the number of pixels in a cell.

Source of all of it: ours; the steps are Gauss–Newton's, as in Lucas and Kanade 1981, neighbours pass on what fits, as
in PatchMatch (Barnes et al. 2009), and what is found anywhere must be unlike all other places, as in Lowe 2004.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F

from .fields import blurred, cell_grid, sampled
from .flow import agreement, exact_matmul
from .light import in_one_light
from .paths import PATH_SIGMA, PATH_STIFFNESS, PATH_TOLERANCES
from .records import BidirectionalFlow
from .rigid import Similarity, complex_product, fit_similarities, nearer_fit, similarities_of

PIXELS = 4  # the photos are compared at this many pixels a cell; in finer ones every other pixel would go unseen
WINDOW_SAMPLES = 11  # places along a side of the window at which the photos are compared
REFINEMENT_ROUNDS = 2  # how often neighbours are asked and steps are taken
NEIGHBOUR_GAIN = 0.004  # difference in colour by which a neighbour's similarity must be better to be taken over
REST_GAIN = 0.01  # difference in colour by which a cell's similarity must be better than rest to be kept
SCALES = (0.6, 1.6)  # between which a similarity may shrink and grow what it carries
DAMPING = 0.03  # what is added to the normal equations' diagonal, so that a window without texture stays
OUTLIER = 0.12  # difference in colour that counts a quarter as much as it would without the robust weight
WORST = 0.25  # difference in colour beyond which it makes no difference how much larger it is
UNFOUND_WEIGHT = 0.3  # weight of a cell whose colours were not found, when the flow is made regular again
REGULAR_SIGMA = 1.5  # cells of the unit grid, as of `rigid.WINDOW_SIGMA`
REGULAR_TOLERANCES = (2.0, 1.0, 0.7, 0.5)  # cells of the unit grid, as `rigid.TOLERANCES`
WINDOWS_AT_ONCE = 2048  # that are worked on together, so that memory does not grow with the grid
SEARCHED_PLACES = 2048  # of a photo at most, each of which is compared with each of the other photo's
SEARCHED_TURNS = range(-60, 61, 15)  # degrees; by which a window may have turned where it is found
SEARCH_SAMPLES = 7  # places along a side of a window that is looked for; …
SEARCH_BLUR = 0.5  # … cells; sigma of the Gaussian mean that is taken first, so that they see all of the window
SEARCH_RETURN = 1.5  # cells; how far from its start the way to what is found and back may end
DISTINCT = 0.7  # squared difference of what is found, at most, as a share of that of the best place elsewhere, …
ELSEWHERE = 2.5  # … which is farther away than so many cells
LOST = 0.05  # difference in colour of a cell's window, more than which makes it worth looking elsewhere
FOUND_GAIN = 0.015  # difference in colour by which what is found must be better in both photos
ALIGNED_TOLERANCE = 0.1  # difference in colour up to which a window counts as found in the photos' finer detail


@dataclass(frozen=True)
class Reach:
    """How much of a photo a window covers, and how far it may be moved; all but `steps` in cells.

    `half` leads from the middle of the window to its edge; `neighbours` are how far away the eight neighbours are that
    are asked, from near to far; a round takes as many Gauss–Newton `steps`, none of them longer than `longest`, and
    may lead as far as `furthest`.
    """

    half: float
    neighbours: tuple[int, ...]
    steps: int
    longest: float
    furthest: float


FROM_FEATURES = Reach(half=2.5, neighbours=(1, 2, 4), steps=6, longest=0.5, furthest=2.0)
WITHIN_A_CELL = Reach(half=1.6, neighbours=(1,), steps=3, longest=0.25, furthest=0.5)


def refined_flow(flow: BidirectionalFlow, photos: torch.Tensor, tolerance: float) -> BidirectionalFlow:
    """The flow refined on the photos wherever their colours say the same.

    Where the window of a cell differs by more than `tolerance` from what it is carried to even at best, the photos
    show different things, or the thing is hidden, and the cell keeps the flow that it had. At last a similarity is
    fitted to the flow around every cell, in windows half as wide as those of the match, so that single cells that were
    carried off fall into line.

    Args:
        flow: On a grid of cells that covers the same picture as the photos. Where it is off by more than a few cells,
            only what looks like nothing else is found.
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
            best = _steps(windows, _of_neighbours(windows, _rest(windows, best)))
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
        flow: Right to within a cell.
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
            best = _rest(windows, windows.compared(ways, _turn(flow)))
            best = _steps(windows, _of_neighbours(windows, best))
            flow = BidirectionalFlow.of(torch.where(best.residual <= ALIGNED_TOLERANCE, best.shift, ways))
    return flow


def _turn(flow: BidirectionalFlow) -> torch.Tensor:
    """How what is around every cell turns and grows along a flow, (2, 2, h, w), as `Similarity` has it."""
    ways = flow.stacked()
    return fit_similarities(ways, agreement(flow), False, PATH_SIGMA, PATH_TOLERANCES, PATH_STIFFNESS).turn


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows around the n = h·w cells of both photos, s samples each, and the photo that each is compared with.

    `own` (2, 3, n, s) are the colours of the samples and `inside` (2, 1, n, s) says which of them lie on the picture;
    `offsets` (1, 2, 1, s) are their places from the middle, and `weight` (1, 1, 1, s) how much they count. `other`
    (2, 3, H, W) is for each photo the other one, and `slopes` (2, 6, H, W) its change per cell to the right in three
    colours and downwards in three. `cells` (1, 2, h, w) are the cells' places,
    and `reach` says how large windows are.
    """

    own: torch.Tensor
    inside: torch.Tensor
    offsets: torch.Tensor
    weight: torch.Tensor
    other: torch.Tensor
    slopes: torch.Tensor
    cells: torch.Tensor
    reach: Reach

    @classmethod
    def of(cls, photos: torch.Tensor, size: tuple[int, int], reach: Reach) -> Windows:
        """The windows of two photos (2, 3, H, W) around the cells of a grid (h, w)."""
        half = reach.half
        side = torch.linspace(-half, half, WINDOW_SAMPLES, dtype=photos.dtype, device=photos.device)
        y, x = torch.meshgrid(side, side, indexing="ij")
        offsets = torch.stack([x.flatten(), y.flatten()]).reshape(1, 2, 1, -1)
        weight = (-2 * offsets.square().sum(1, keepdim=True) / half**2).exp()
        cells = cell_grid(*size, photos)
        own, inside = sampled(photos, (cells.flatten(2)[..., None] + offsets).expand(2, -1, -1, -1), size)
        other = photos.flip(0)
        padded = F.pad(other, (1, 1, 1, 1), mode="replicate")
        right = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2 * (photos.shape[-1] / size[1])
        down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2 * (photos.shape[-2] / size[0])
        return cls(own, inside, offsets, weight, other, torch.cat([right, down], 1), cells, reach)

    @property
    def size(self) -> tuple[int, int]:
        """Size (h, w) of the grid."""
        return tuple(self.cells.shape[-2:])

    def compared(self, shift: torch.Tensor, turn: torch.Tensor) -> Similarity:
        """Similarities (2, 2, h, w) with how far the colours of the cells' windows are from where they lead.

        The difference in colour is averaged over the part of the window that lies on its photo; what is carried
        beyond the other photo counts as `WORST`.
        """
        costs = []
        for block, targets in self._targets(shift, turn):
            colours, inside = sampled(self.other, targets, self.size)
            off = (self.own[:, :, block] - colours).abs().mean(1, keepdim=True).clamp(max=WORST)
            weight = self.weight * self.inside[:, :, block]
            costs.append((torch.where(inside, off, WORST) * weight).sum(3) / weight.sum(3))
        return Similarity(shift, turn, torch.cat(costs, 2).unflatten(2, self.size))

    def contrast(self) -> torch.Tensor:
        """How far the colours of every cell's window are from their mean, on average, (2, 1, h, w)."""
        weight = self.weight * self.inside
        weight = weight / weight.sum(3, keepdim=True)
        mean = (weight * self.own).sum(3, keepdim=True)
        return (weight * (self.own - mean).abs().mean(1, keepdim=True)).sum(3).unflatten(2, self.size)

    def stepped(self, shift: torch.Tensor, turn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift and turn (2, 2, h, w) after a Gauss–Newton step towards colours that differ less."""
        unit = self.reach.half / 2  # turns are counted by how far they move a sample so far from the middle
        x, y = self.offsets[0, :, 0] / unit
        one, zero = torch.ones_like(x), torch.zeros_like(x)
        # How far each of the four numbers moves a sample to the right and downwards, (s, 4, 2).
        moves = torch.stack([torch.stack(part, 1) for part in ([one, zero, x, -y], [zero, one, y, x])], 2)
        outer = torch.einsum("sia,sjb->abijs", moves, moves)
        squares = torch.stack([outer[0, 0], outer[0, 1] + outer[1, 0], outer[1, 1]]).flatten(1, 2)  # (3, 16, s)
        products, rights = [], []
        for block, targets in self._targets(shift, turn):
            colours, inside = sampled(self.other, targets, self.size)
            slopes, _ = sampled(self.slopes, targets, self.size)
            right, down = slopes.split(3, 1)
            off = self.own[:, :, block] - colours
            robust = (1 + (off.abs().mean(1, keepdim=True) / OUTLIER).square()) ** -2
            weight = (self.weight * (inside & self.inside[:, :, block]) * robust)[:, 0]
            tensor = torch.stack(
                [weight * (a * b).sum(1) for a, b in ((right, right), (right, down), (down, down))], 1
            )
            towards = torch.stack([weight * (a * off).sum(1) for a in (right, down)], 3)  # (2, n, s, 2)
            products.append(torch.einsum("ians,abs->inb", tensor, squares))
            rights.append(torch.einsum("insa,sba->inb", towards, moves))
        # On the CPU, because not every device solves equations.
        square = torch.cat(products, 1).unflatten(2, (4, 4)).cpu().double()
        square = square + DAMPING * torch.eye(4, dtype=square.dtype, device=square.device)
        step = torch.linalg.solve(square, torch.cat(rights, 1).cpu().double()[..., None])[..., 0].to(shift)
        longest = self.reach.longest
        step = step.clamp(-longest, longest).movedim(2, 1).unflatten(2, self.size)
        return shift + step[:, :2], _held_to_scale(turn + step[:, 2:] / unit)

    def _targets(self, shift: torch.Tensor, turn: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Where the samples are carried to, (2, 2, m, s), for a few cells at a time."""
        middle = (self.cells + shift).flatten(2)[..., None]
        turn = turn.flatten(2)[..., None]
        offsets = self.offsets.expand(2, -1, -1, -1)
        for start in range(0, middle.shape[2], WINDOWS_AT_ONCE):
            block = slice(start, start + WINDOWS_AT_ONCE)
            yield block, middle[:, :, block] + offsets + complex_product(turn[:, :, block], offsets)


def _found_anywhere(windows: Windows, fit: Similarity) -> Similarity:
    """Where the colours of a cell differ, look all over the other photo for a place that is like its window.

    It is believed only if the place found finds the cell, too, and both are better off by it. A window without texture
    is like many places, and what it could gain counts as no more than its contrast: ground that is hidden in the one
    photo would else be carried to ground that is hidden in the other.
    """
    shift, turn, matched = _most_alike(windows)
    made = _steps(windows, windows.compared(shift, turn))
    could = torch.minimum(fit.residual, windows.contrast()).where(fit.residual > LOST, 0)
    gain = could - made.residual.where(matched, 1)
    there, seen = sampled(gain.flip(0), (windows.cells + made.shift).flatten(2)[..., None], windows.size)
    both = torch.minimum(gain, there.where(seen, -1).reshape(gain.shape))
    return nearer_fit(fit, Similarity(made.shift, made.turn, made.residual.where(both > FOUND_GAIN, torch.inf)))


def _most_alike(windows: Windows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every cell the place of the other photo whose surroundings are most like its own, of all places and turns.

    On a grid of more than `SEARCHED_PLACES` cells every second or third is looked for, in windows as much larger, and
    stands for those around it.

    Returns:
        Shift and turn (2, 2, h, w), and (2, 1, h, w) bool: whether the other photo finds the cell from there, and no
        other place is nearly as much alike.
    """
    h, w = windows.size
    stride = math.ceil(math.sqrt(h * w / SEARCHED_PLACES))
    rows, columns = (torch.arange(min(stride // 2, n - 1), n, stride, device=windows.cells.device) for n in (h, w))
    places = windows.cells[..., rows[:, None], columns]  # (1, 2, r, c)
    photos = blurred(windows.other.flip(0), SEARCH_BLUR * stride * windows.other.shape[-1] / w)
    half = stride * windows.reach.half
    side = torch.linspace(-half, half, SEARCH_SAMPLES, dtype=photos.dtype, device=photos.device)
    offsets = torch.stack(torch.meshgrid(side, side, indexing="xy")).reshape(1, 2, 1, -1)
    weight = (-offsets.square().sum(1, keepdim=True) / half**2).exp()

    def seen_around(image: int, turn: torch.Tensor) -> torch.Tensor:
        """The colours (n, 3·s) of the windows around the places of a photo, turned."""
        around = places.flatten(2)[..., None] + complex_product(turn, offsets)
        colours, _ = sampled(photos[image, None], around, windows.size)
        return (weight * colours)[0].movedim(0, 1).flatten(1)

    angles = photos.new_tensor(list(SEARCHED_TURNS)).deg2rad()
    turns = torch.stack([angles.cos(), angles.sin()], 1)  # (turns, 2)
    n = places[0, 0].numel()
    difference = photos.new_full((n, n), torch.inf)
    turned = torch.zeros(n, n, dtype=torch.long, device=photos.device)
    for number, half in enumerate(angles / 2):  # each photo turns half the way, so that both are treated alike
        first, second = (
            seen_around(image, torch.stack([angle.cos(), angle.sin()]).reshape(1, 2, 1, 1))
            for image, angle in enumerate((-half, half))
        )
        made = first.square().sum(1, keepdim=True) + second.square().sum(1) - 2 * first @ second.T
        turned = torch.where(made < difference, number, turned)
        difference = torch.minimum(difference, made.clamp(min=0))
    points = places[0].flatten(1).T  # (n, 2)
    near = torch.cdist(points, points) <= ELSEWHERE * stride
    index = [difference.argmin(1), difference.argmin(0)]
    shifts, factors, matched = [], [], []
    for image, way in enumerate((difference, difference.T)):
        there, back = index[image], index[1 - image]
        elsewhere = way.masked_fill(near[there], torch.inf).amin(1)
        returned = (points[back[there]] - points).norm(dim=1) <= SEARCH_RETURN * stride
        matched.append(returned & (way.amin(1) < DISTINCT * elsewhere))
        shifts.append(points[there] - points)
        of = turned if image == 0 else turned.T
        factor = turns[of.gather(1, there[:, None])[:, 0]]
        factors.append(factor * factor.new_tensor([1, 1 if image == 0 else -1]) - factor.new_tensor([1, 0]))
    # Every cell moves as one with the place that stands for it.
    row, column = (
        (torch.arange(n, device=rows.device) // stride).clamp(max=len(some) - 1)
        for n, some in ((h, rows), (w, columns))
    )

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(2, (len(rows), len(columns)))[..., row[:, None], column]

    turn = spread(torch.stack(factors).mT)
    shift = spread(torch.stack(shifts).mT) + complex_product(turn, windows.cells - spread(places.flatten(2)))
    return shift, turn, spread(torch.stack(matched)[:, None])


def _rest(windows: Windows, fit: Similarity) -> Similarity:
    """Let every cell rest that fits nearly as well so."""
    still = torch.zeros_like(fit.shift)
    return nearer_fit(fit, windows.compared(still, still), -REST_GAIN)


def _of_neighbours(windows: Windows, fit: Similarity) -> Similarity:
    """Let every cell take over a neighbour's similarity that fits better."""
    best = fit
    for radius, (dy, dx) in product(windows.reach.neighbours, product((-1, 0, 1), repeat=2)):
        if dy or dx:
            shift, turn = similarities_of(fit, dy * radius, dx * radius)
            best = nearer_fit(best, windows.compared(shift, turn), NEIGHBOUR_GAIN)
    return best


def _steps(windows: Windows, fit: Similarity) -> Similarity:
    """Gauss–Newton steps; of all places on the way, the one where the colours differ least is kept."""
    best, shift, turn = fit, fit.shift, fit.turn
    for _ in range(windows.reach.steps):
        shift, turn = windows.stepped(shift, turn)
        made = windows.compared(shift, turn)
        far = (shift - fit.shift).norm(dim=1, keepdim=True) > windows.reach.furthest
        best = nearer_fit(best, Similarity(shift, turn, torch.where(far, torch.inf, made.residual)))
    return best


def _held_to_scale(turn: torch.Tensor) -> torch.Tensor:
    """Turns (2, 2, h, w) that scale by no less and no more than `SCALES`."""
    one = turn.new_tensor([1.0, 0]).reshape(1, 2, 1, 1)
    scale = (one + turn).norm(dim=1, keepdim=True).clamp(min=1e-3)
    return (one + turn) * (scale.clamp(*SCALES) / scale) - one
