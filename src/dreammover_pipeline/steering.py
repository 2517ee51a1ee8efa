# SPDX-License-Identifier: Apache-2.0
"""Matching steered by the user: by points that correspond, and by masks of what may move.

Points become a prior, a bias on the cosine similarities around them, so that the features still decide the detail.
The cells of the points are then pinned to the flow that the points give, and smoothing carries that flow to their
neighbours. Cells that may not move have no match and no flow.

Source of all of it: ours; DreamMover matches by features alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .fields import cell_grid
from .flow import Regulariser, match_features, neighbourhood_mean, regularise, resting_cells, unit_features
from .records import BidirectionalFlow

# Chosen on procedural pairs whose true flow is known; docs/points.md has the figures.
STRENGTH = 1.0  # largest bias, reached where both directions support a match, in units of cosine similarity
# Standard deviation of the Gaussian by which a point's influence falls off, as a share of the grid's shorter side.
REACH = 1 / 4
# Standard deviation of the Gaussian around where a match is expected, as a share of the grid's shorter side.
TOLERANCE = 1 / 16
# Share of a cell's pixels that must be bright for the cell to move. It is small because an edge that stays behind is
# worse than a little background that moves along.
BRIGHT_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Steering:
    """What the user says about the motion between the two images of a pair, on its latent grid.

    `points` (k, 2, 2) are k places (x, y) in cells, in the first and in the second image; `moves` (2, 1, h, w) is
    true where a cell of the first and of the second image may move.
    """

    points: torch.Tensor
    moves: torch.Tensor

    def __post_init__(self):
        if self.points.ndim != 3 or self.points.shape[1:] != (2, 2):
            raise ValueError(f"`points` must be (k, 2, 2), not {tuple(self.points.shape)}")
        if self.moves.ndim != 4 or self.moves.shape[:2] != (2, 1) or self.moves.dtype != torch.bool:
            raise ValueError(f"`moves` must be (2, 1, h, w) bool, not {tuple(self.moves.shape)} {self.moves.dtype}")


def point_pairs(points: object, name: str = "points") -> torch.Tensor:
    """The `points` argument of one pair as a tensor (k, 2, 2).

    Its axes are the k correspondences, the first and the last image, and x and y.

    Raises:
        TypeError, ValueError: The argument is not a sequence of ((x0, y0), (x1, y1)), or a number is not finite.
    """
    if points is None or (isinstance(points, (list, tuple)) and not points):
        return torch.zeros(0, 2, 2, dtype=torch.float32, device="cpu")
    form = f"`{name}` must be a sequence of ((x0, y0), (x1, y1)), a place in each photo"
    try:
        values = torch.as_tensor(points, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{form}, not {points!r}") from error
    except OverflowError as error:
        raise ValueError(f"`{name}` must be finite, but hold a number that is too large") from error
    if values.ndim != 3 or values.shape[1:] != (2, 2):
        raise ValueError(f"{form}; this is of shape {tuple(values.shape)}, not (k, 2, 2)")
    if not values.isfinite().all():
        raise ValueError(f"`{name}` must be finite, but hold {values[~values.isfinite()][0]}")
    return values


def check_points_inside(points: torch.Tensor, sizes: Sequence[tuple[int, int]], name: str = "points") -> None:
    """Raise ValueError unless the points (k, 2, 2) lie in their photos, whose sizes (H, W) are given in order."""
    for i, correspondence in enumerate(points.tolist()):
        for photo, ((x, y), (height, width)) in enumerate(zip(correspondence, sizes, strict=True)):
            if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
                raise ValueError(
                    f"`{name}[{i}]` is at ({x:g}, {y:g}) in img{photo}, which has {width}×{height} pixels "
                    "(width × height)"
                )


def cells_of(points: torch.Tensor, content: tuple[int, int], cell: int, name: str = "points") -> torch.Tensor:
    """Points on the canvas as places on the latent grid.

    Args:
        points: Correspondences (k, 2, 2): in the first and the second image, x and y in pixels of the canvas.
        content: Size (H, W) in pixels of the picture on the canvas; the rest of the canvas is padding.
        cell: Side of a latent cell in pixels.
        name: Name of the checked argument, for error messages.

    Returns:
        The points in cells, (k, 2, 2); those beyond the picture's edge are moved onto it.

    Raises:
        ValueError: A point lies more than a cell outside the picture, in a part of the photo that is cropped.
    """
    height, width = content
    last = points.new_tensor([width, height]) - 0.5
    outside = ((points < -0.5 - cell) | (points > last + cell)).any(2)
    if outside.any():
        i, image = outside.nonzero()[0].tolist()
        raise ValueError(
            f"`{name}[{i}]` lies in a part of img{image} that is cut away, since the video has another aspect ratio; "
            "points must lie in the part that is shown"
        )
    return (points.clamp(min=-0.5).minimum(last) + 0.5) / cell - 0.5


def cells_that_move(masks: torch.Tensor, content: tuple[int, int], cell: int, name: str = "mask") -> torch.Tensor:
    """Which latent cells may move, by masks on the canvas.

    A cell may move if at least `BRIGHT_SHARE` of its pixels are at least half grey.

    Args:
        masks: The masks of the first and the second image, (2, 3, H, W) in [0, 1].
        content: Size (H, W) in pixels of the picture on the canvas; the rest of the canvas is padding.
        cell: Side of a latent cell in pixels.
        name: Name of the checked argument, for error messages.

    Returns:
        True where a cell of the first and of the second image may move, (2, 1, h, w) bool.

    Raises:
        ValueError: In one of the images nothing may move.
    """
    bright = (masks.mean(1, keepdim=True) >= 0.5).to(masks.dtype)
    moves = F.avg_pool2d(bright, cell) >= BRIGHT_SHARE
    for image, part in enumerate(moves):
        if not part[:, : -(-content[0] // cell), : -(-content[1] // cell)].any():
            raise ValueError(
                f"`{name}` lets nothing move in img{image}, where it is dark all over; what may move must be bright"
            )
    return moves


def steered_flow(
    features: torch.Tensor,
    steering: Steering,
    passes: int,
    bias: Callable[[slice], torch.Tensor] | None = None,
    regulariser: Regulariser = neighbourhood_mean,
    rest_tolerance: float = 0.0,
) -> BidirectionalFlow:
    """`match_features` and `regularise`, steered.

    The cell of a point is pinned: it keeps its flow through every smoothing pass, and its neighbours take it over with
    the weight of a cell whose match agrees exactly. From a cell that may not move, neighbours take over nothing. Where
    points and mask disagree, the mask prevails.

    Args:
        features: UNet features of the first and the second image, (2, C', h', w').
        steering: The user's points and masks on the latent grid (h, w).
        passes: Number of passes of smoothing, 0 … .
        bias: Function from a slice of the first image's cells to what is added to their similarities besides what the
            user says, (cells in the slice, h·w); None for nothing.
        regulariser: What carries the flow on in each pass: `neighbourhood_mean`, or `similarity_flow`.
        rest_tolerance: By how much in cosine similarity a doubtful match may be better than the same place for the
            cell to rest; 0 for no cell.

    Returns:
        The flow in both directions on the latent grid, in cells.
    """
    size = tuple(steering.moves.shape[-2:])
    moves = steering.moves.to(features.device)
    steered = match_bias(features, steering)
    flow = match_features(features, size, steered if bias is None else lambda rows: steered(rows) + bias(rows))
    rests = resting_cells(features, flow, rest_tolerance)
    if rests is not None:
        rests = rests & moves & moves.flip(0)  # what may move does not rest on what may not
    return regularise_steered(flow, steering, passes, regulariser, rests)


def regularise_steered(
    flow: BidirectionalFlow,
    steering: Steering,
    passes: int,
    regulariser: Regulariser,
    rests: torch.Tensor | None = None,
    trust: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight,
) -> BidirectionalFlow:
    """`regularise`, with the points' cells held and fully trusted, and cells that may not move held and not trusted.

    Args:
        flow: The flow in both directions, on the grid of the steering.
        steering: The user's points and masks.
        passes: Number of passes of smoothing, 0 … .
        regulariser: What carries the flow on in each pass: `neighbourhood_mean`, or `similarity_flow`.
        rests: Cells that rest, (2, 1, h, w) bool, as `resting_cells` finds them; None for none.
        trust: Function from the agreement of cells, (2, 1, h, w), to how sure they are, for all cells that are not
            held.
    """
    moves = steering.moves.to(flow.forward.device)
    _, pinned = _pins(steering, flow.forward)

    def held(stacked: torch.Tensor) -> torch.Tensor:
        return held_flow(BidirectionalFlow.of(stacked), steering).stacked()

    def trusted(weight: torch.Tensor) -> torch.Tensor:
        return torch.where(pinned, 1, trust(weight)) * moves

    return regularise(flow, passes, regulariser, rests, held, trusted)


def held_flow(flow: BidirectionalFlow, steering: Steering) -> BidirectionalFlow:
    """A flow with the points' own flow at their cells, and none where nothing may move."""
    pins, pinned = _pins(steering, flow.forward)
    moves = steering.moves.to(flow.forward.device)
    ways = torch.where(moves, torch.where(pinned, pins, flow.stacked()), 0)
    return BidirectionalFlow.of(ways)


def match_bias(features: torch.Tensor, steering: Steering) -> Callable[[slice], torch.Tensor]:
    """The steering as a bias on the cosine similarity of every cell p of the first and q of the second image.

    `expected_places` says where p should be found in the second image and where q in the first. Each of these two
    expectations that the match fulfils adds up to half of `STRENGTH` to its similarity. How much is a product of three
    factors, each at most 1: how near the match lies to the expected place, by a Gaussian of `TOLERANCE`; how near the
    cell lies to a point of its own image, by a Gaussian of `REACH`; and how alike the cell and that point look, by the
    cosine of their features. The last keeps a point on an object from deciding about the background beside it. Where
    p or q may not move, the bias is −∞.

    Args:
        features: UNet features of the first and the second image, (2, C', h', w').
        steering: The user's points and masks on the latent grid (h, w).

    Returns:
        A function from a slice of the first image's cells, in row-major order, to their bias, (cells in the slice,
        h·w).
    """
    h, w = steering.moves.shape[-2:]
    unit = unit_features(features, (h, w))
    cells = cell_grid(h, w, unit)[0].flatten(1).T  # (h·w, 2)
    points = steering.points.to(unit)
    moves = steering.moves.to(unit.device).flatten(1)
    side = min(h, w)
    expected, weight = [], []
    if len(points):
        for own, other, looks in ((points[:, 0], points[:, 1], unit[0]), (points[:, 1], points[:, 0], unit[1])):
            expected.append(expected_places(cells, own, other, (TOLERANCE * side) ** 2))
            near = (-_square_distances(cells, own) / (2 * (REACH * side) ** 2)).exp()
            # One product for each point, not a matrix product, since the caller may have lowered that one's precision.
            alike = torch.stack([(looks * looks[:, i : i + 1]).sum(0) for i in _nearest_cells(own, h, w)], 1)
            weight.append((near * alike.clamp(min=0)).amax(1))

    def bias(rows: slice) -> torch.Tensor:
        allowed = moves[0][rows, None] & moves[1]
        total = unit.new_zeros(allowed.shape)
        if len(points):
            spread = 2 * (TOLERANCE * side) ** 2
            there = weight[0][rows, None] * (-_square_distances(expected[0][rows], cells) / spread).exp()
            back = weight[1] * (-_square_distances(cells[rows], expected[1]) / spread).exp()
            total = STRENGTH / 2 * (there + back)
        return total.masked_fill(~allowed, -torch.inf)

    return bias


def expected_places(
    cells: torch.Tensor, points: torch.Tensor, matches: torch.Tensor, stiffness: float
) -> torch.Tensor:
    """Where cells go if they move along with the points, by moving least squares.

    Every cell gets the translation, rotation and scaling that best brings the points to their matches, each point
    weighted by 1 / (1 + squared distance to the cell). Rotation and scaling are damped by `stiffness`, so that points
    that lie close together, or a single point, only translate.

    Source: Schaefer, McPhail and Warren 2006, similarity transformations; the stiffness is ours.

    Args:
        cells: Places (x, y) of the cells, (n, 2).
        points: Places (x, y) of the points, (k, 2), k ≥ 1.
        matches: Places (x, y) that the points go to, (k, 2).
        stiffness: How strongly rotation and scaling are damped, a squared length in squared cells.

    Returns:
        The places (x, y) that the cells go to, (n, 2).
    """
    weight = 1 / (1 + _square_distances(cells, points))  # (n, k)
    weight = weight / weight.sum(1, keepdim=True)
    centre, goal = ((weight[..., None] * places).sum(1) for places in (points, matches))  # (n, 2) each
    arm, moved = points - centre[:, None], matches - goal[:, None]  # (n, k, 2)
    size = (weight * arm.square().sum(2)).sum(1) + stiffness
    along = ((weight * (arm * moved).sum(2)).sum(1) + stiffness) / size
    across = (weight * (arm[..., 0] * moved[..., 1] - arm[..., 1] * moved[..., 0])).sum(1) / size
    x, y = (cells - centre).unbind(1)
    return goal + torch.stack([along * x - across * y, across * x + along * y], 1)


def _pins(steering: Steering, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The flow of the points, (2, 2, h, w), at the cells nearest to them, and a mask of these cells, (2, 1, h, w)."""
    h, w = steering.moves.shape[-2:]
    points = steering.points.to("cpu", like.dtype)
    pins, pinned = points.new_zeros(2, 2, h * w), points.new_zeros(2, 1, h * w, dtype=torch.bool)
    for image, (own, other) in enumerate(((points[:, 0], points[:, 1]), (points[:, 1], points[:, 0]))):
        for cell, way in zip(_nearest_cells(own, h, w), other - own, strict=True):
            pins[image, :, cell], pinned[image, :, cell] = way, True
    return pins.unflatten(2, (h, w)).to(like.device), pinned.unflatten(2, (h, w)).to(like.device)


def _nearest_cells(places: torch.Tensor, h: int, w: int) -> list[int]:
    """Row-major indices of the cells nearest to the places (k, 2), on a grid of h × w cells."""
    x, y = places.round().long().unbind(1)
    return (y.clamp(0, h - 1) * w + x.clamp(0, w - 1)).tolist()


def _square_distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The squared distances (n, m) between places (n, 2) and places (m, 2)."""
    (x0, y0), (x1, y1) = first.unbind(1), second.unbind(1)
    return (x0[:, None] - x1).square() + (y0[:, None] - y1).square()
