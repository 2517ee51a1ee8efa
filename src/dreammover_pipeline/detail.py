# SPDX-License-Identifier: Apache-2.0
"""Frames with the photos' own detail, at the photos' own size.

Diffusion lays a frame out at the size that the checkpoint was trained on; what is finer than that is in the photos.
For every place of a frame it is chosen where in the photos it comes from, and whether it is seen in both or in one.
Where the photos' colours there agree with the frame, or with each other, they take its place, pixel by pixel at full
size:

    frame = (1 − M) · B↑ + M · (Σ w (a⁰ g⁰ I⁰(z⁰) + a¹ g¹ I¹(z¹)) + ΔI)

B↑ is the frame of diffusion, enlarged; z⁰ and z¹ are where a candidate of weight w comes from in the photos I⁰ and
I¹; a⁰ + a¹ = 1 are their shares; g brings each photo to the frame's light; ΔI is what light is left; M is how far the
photos are taken. No model runs. Everything but the lookups in the photos is decided on a grid of `SAMPLES` places a
cell along each side, and the lookups are made in strips, so memory hardly grows with the photos.

Places z are (x, y) in cells of the latent grid, as in `fields.py`. Source: ours; M, I and ΔI play the parts that masks
and residuals have in learned frame interpolation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
import torch.nn.functional as F

from .fields import at_once, blurred, cell_grid, distances, looked_up, quantile, sampled, values_beside
from .flow import agreement
from .framing import fit
from .light import gain_maps, light_gains
from .paths import MotionPaths, Time
from .records import BidirectionalFlow, Canvas, FrameSources
from .refinement import aligned_flow
from .rigid import complex_one, complex_product

ALIGNED_PIXELS = (8, 16)  # pixels a cell at which the flow is aligned with the photos, where they have as many
SAMPLES = 4  # places along a side of a cell at which it is chosen where a frame comes from
CANDIDATES = 8  # number of cells whose motion is tried at every place: those that land nearest to it
CANDIDATES_KEPT = 4  # number of candidates of a place that are mixed at full size
SURE_BONUS = 0.5  # cells by which a cell counts as nearer whose flow agrees both ways
NEIGHBOURHOOD = (1, 3)  # distances, in places, of the eight neighbours whose choice is tried, too
FIRST_BLUR = 1.2  # sigma, in places, of the Gaussian that costs are averaged by before neighbours are tried
SECOND_BLUR = 1.5  # sigma, in places, of the Gaussian that averages costs when neighbours are tried, and errors
COST_CLIP = 0.3  # difference in colour, of 1, beyond which it makes no difference how much larger it is
PHOTOS_WEIGHT = 0.5  # weight of the photos' difference from each other, beside a weight of 1 for that from the frame
OFF_PICTURE = 0.5  # cost of a place that lies off a photo
ONE_PHOTO = 0.04  # cost of taking one photo only
DISTANCE_COST = 0.004  # cost of each cell between a place and where its candidate lands
DOUBT_COST = 0.01  # cost of a candidate whose flow does not agree both ways
SOFTNESS = 0.01  # difference in cost at which a candidate has 1/e of the weight
STRANGE_SHARE = 0.9  # quantile of the VAE's errors in a pair; nowhere is a smaller error assumed
TRUSTED_ERROR = 0.02  # mean error of the VAE, in colours of 1, at which its frames are trusted half as much
TAKEN = 0.15  # difference in colour from the frame at which the photos are taken to 1/e, where the VAE has no error
TAKEN_FOR_ERROR = 10.0  # difference in colour that is added to `TAKEN` for each unit of the VAE's error at a place
ALIKE = 0.05  # difference in colour between the photos at which they count as showing the same to 1/e
# Difference in colour from what both photos show at which they are taken to 1/e; where a frame differs by more, it may
# show a thing whose way was not found.
DRAWN_UPON = 0.4
LIGHT_BLUR = 2.0  # sigma, in places, of the Gaussian mean that is the light of a difference
LIGHT_TRUSTED_ERROR = 0.01  # mean error of the VAE, in colours of 1, at which its light is trusted half as much
LIGHT_OUTLIER = 0.04  # difference in colour that is more likely one of content than of light
FAINT = 1e-4  # share of a photo that is not meant to be seen, so that a place is never without any
# Cells, on a CPU and elsewhere, for which candidates are looked for together, so that the workspace stays bounded.
CELLS_AT_ONCE_NEARBY, CELLS_AT_ONCE_NEARBY_ON_GPU = 128, 2048
PLACES_AT_ONCE = 2**21  # places, counted for each candidate, for which costs are computed together
STRIP_PIXELS = 2**19  # pixels of a frame that are made together


@dataclass(frozen=True, eq=False)
class PairDetail:
    """What the frames of a pair take their detail from.

    `photos` are the two at the output size, (3, H, W) in [0, 1] each. `small` (2, 4, h', w') are they on the grid of
    places, with the VAE's mean error as a fourth channel; `gains` (2, 3, 3) bring each to the light of the other.
    `canvas` is where both sit, `paths` are the ways of the cells and `sure` (2, 1, h, w) is how far the flow agrees
    both ways. `moved` says whether diffusion began the frames from what had moved along these ways; then what both
    photos show alike on the way is meant to be in the frame, also where diffusion has drawn something faint upon it.
    """

    photos: tuple[torch.Tensor, torch.Tensor]
    small: torch.Tensor
    gains: torch.Tensor
    canvas: Canvas
    flow: BidirectionalFlow
    paths: MotionPaths
    sure: torch.Tensor
    moved: bool

    @classmethod
    def of(
        cls,
        photos: Sequence[torch.Tensor],
        working: torch.Tensor,
        reconstructed: torch.Tensor,
        canvas: Canvas,
        flow: BidirectionalFlow,
        paths: MotionPaths,
        moved: bool,
    ) -> PairDetail:
        """What can be known once for all frames of a pair.

        Args:
            photos: The two photos at the output size, (3, H, W) each, float32 in [0, 1].
            working: The two photos on the canvas, (2, 3, canvas.height, canvas.width) in [0, 1].
            reconstructed: The two photos on the canvas, encoded and decoded by the VAE, which shows how far it can be
                trusted, place by place.
            canvas: Where the photos sit.
            flow: The flow between the two photos, in cells.
            paths: The ways of the cells through time.
            moved: Whether diffusion began the frames from what had moved along these ways.
        """
        size = tuple(SAMPLES * side for side in flow.forward.shape[-2:])
        colours, copies = (
            F.interpolate(part.to(flow.forward), size, mode="area") for part in (working, reconstructed)
        )
        error = blurred(blurred(colours - copies, SECOND_BLUR).abs().mean(1, keepdim=True), SECOND_BLUR)
        # A checkpoint that does not know what is in a tenth of the photos may draw anything into the rest.
        error = error.clamp(min=quantile(error, STRANGE_SHARE))
        photos = tuple(photo.to(flow.forward) for photo in photos)
        gains = light_gains(colours, flow).to(flow.forward)
        return cls(photos, torch.cat([colours, error], 1), gains, canvas, flow, paths, agreement(flow), moved)

    @cached_property
    def taps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows of the picture on the canvas make up each row of a frame, as `_taps` gives them."""
        return _taps(self.canvas.content_height, self.canvas.output_height, self.small)

    @cached_property
    def axes(self) -> tuple[Axis, Axis]:
        """How the rows and the columns of a frame lie on the grid of places."""
        (h, w), canvas = self.small.shape[-2:], self.canvas
        across, down = canvas.content_on(h, w)
        return Axis.of(canvas.output_height, down, h, self.small), Axis.of(canvas.output_width, across, w, self.small)

    @cached_property
    def nearest_on_picture(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For every row and every column of the grid of places, the nearest one whose middle lies on the picture."""
        size = self.small.shape[-2:]
        row, column = (
            torch.arange(count, device=self.small.device).clamp(max=last)
            for count, last in zip(size, self.canvas.last_on(*size), strict=True)
        )
        return row, column

    @property
    def content(self) -> tuple[float, float]:
        """Width and height in cells of the part of the canvas that the picture fills."""
        return self.canvas.content_on(*self.flow.forward.shape[-2:])


def lookup_flow(flow: BidirectionalFlow, photos: Sequence[torch.Tensor], canvas: Canvas) -> BidirectionalFlow:
    """The flow by which detail is looked up: that of a pair, aligned with what of the photos is finer than cells.

    Args:
        flow: The flow between the two photos, in cells.
        photos: The two photos at the output size, (3, H, W) each, float32 in [0, 1].
        canvas: Where the photos sit.
    """
    cell = canvas.height // flow.forward.shape[-2]
    larger = []
    for scale in (pixels // cell for pixels in ALIGNED_PIXELS if pixels % cell == 0):
        content = scale * canvas.content_height, scale * canvas.content_width
        if content[0] <= canvas.output_height:  # the photos have as many pixels
            larger.append(Canvas(scale * canvas.height, scale * canvas.width, *content, *content))
    return aligned_flow(flow, (torch.stack([fit(photo, there) for photo in photos]) for there in larger))


@dataclass(frozen=True, eq=False)
class Candidates:
    """Where the surroundings of every cell of both photos would be at one time, N = 3·h·w candidates.

    A candidate is a similarity that has moved on the way: what is u away from `landing` in the frame comes from
    `places`[i] + `factors`[i]·u in photo i, with complex products. All are (2, N) in cells, of which `places` and
    `factors` hold one for each photo; `doubt` (N,) is 0 where the flow agrees both ways and 1 where it does not. The
    cells of the first photo are followed by those of the last one and by cells at rest, whose flow nobody has found:
    ground that is hidden in one photo has no flow of its own, and mostly rests.
    """

    landing: torch.Tensor
    places: tuple[torch.Tensor, torch.Tensor]
    factors: tuple[torch.Tensor, torch.Tensor]
    doubt: torch.Tensor

    @classmethod
    def at(cls, pair: PairDetail, time: Time) -> Candidates:
        """The candidates at a time δ."""
        ways = pair.flow.stacked()
        cells = cell_grid(*ways.shape[-2:], ways)[0]
        landing, places, factors = [], ([], []), ([], [])
        for image in (0, 1):
            gone = torch.ones(1, dtype=torch.float32, device=ways.device) * (time if image == 0 else 1 - time)
            landing.append(cells + pair.paths.displacements(image, gone)[0])
            places[image].append(cells)
            places[1 - image].append(cells + ways[image])
            factors[image].append(pair.paths.factor(image, gone, 0))
            factors[1 - image].append(pair.paths.factor(image, gone, 1))
        landing.append(cells)
        for image in (0, 1):
            places[image].append(cells)
            factors[image].append(complex_one(cells[0]))

        def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.cat([part.flatten(1) for part in parts], 1)

        return cls(
            joined(landing),
            (joined(places[0]), joined(places[1])),
            (joined(factors[0]), joined(factors[1])),
            torch.cat([1 - pair.sure.flatten(), torch.ones_like(pair.sure[0].flatten())]),
        )

    def sources(self, index: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where places z (2, h', w') of the frame come from in the two photos, (2, K, h', w') each.

        Args:
            index: Indices of K candidates for each place, (K, h', w').
            z: The places in the frame, (2, h', w') in cells.
        """
        away = z[:, None] - self.landing[:, index]
        first, second = (
            place[:, index] + complex_product(factor[None, :, index], away[None])[0]
            for place, factor in zip(self.places, self.factors, strict=True)
        )
        return first, second

    def nearest(self, cells: torch.Tensor) -> torch.Tensor:
        """The indices (n, `CANDIDATES` + 1) of those that land nearest to the n cells (2, n), and of rest there."""
        moving = self.landing.shape[1] - cells.shape[1]
        landing, bonus = self.landing[:, :moving], SURE_BONUS * (1 - self.doubt[:moving])
        together = at_once(cells, CELLS_AT_ONCE_NEARBY, CELLS_AT_ONCE_NEARBY_ON_GPU)
        nearest = torch.cat(
            [
                (distances(some, landing) - bonus).topk(min(CANDIDATES, moving), largest=False).indices
                for some in cells.split(together, 1)
            ]
        )
        return torch.cat([nearest, torch.arange(moving, self.landing.shape[1], device=nearest.device)[:, None]], 1)


# ── What is decided on the grid of places ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Sources:
    """Where every place of a frame comes from, K candidates for each.

    `index` (K, h', w') are the candidates, and `weight` (K, h', w') sums to 1; `shown` (K, h', w') is 0 for what is
    seen in both photos, 1 for what is seen in the first only, 2 in the second only.
    """

    index: torch.Tensor
    shown: torch.Tensor
    weight: torch.Tensor

    def kept(self, count: int) -> Sources:
        """The `count` of them with the most weight, where those that are the same are taken together."""
        key = 3 * self.index + self.shown
        left, weights = self.weight, []
        for k in range(len(key)):  # the first of those that are the same takes the weights of all
            taken = left * (key[k:] == key[k])
            weights.append(taken.sum(0))
            left = (left - taken)[1:]
        most, where = torch.stack(weights).topk(min(count, len(key)), 0)
        return Sources(self.index.gather(0, where), self.shown.gather(0, where), most / most.sum(0))

    def shares(self, time: Time) -> tuple[torch.Tensor, torch.Tensor]:
        """The shares of the two photos in each candidate, (K, h', w') each."""
        first, second = (torch.ones_like(self.weight) * (share + FAINT) for share in (1 - time, time))
        return first.masked_fill(self.shown == 2, FAINT), second.masked_fill(self.shown == 1, FAINT)


def choose_sources(
    pair: PairDetail, candidates: Candidates, lit: torch.Tensor, frame: torch.Tensor, time: Time
) -> Sources:
    """Choose for every place of a frame which candidates it comes from.

    A candidate costs what its two places in the photos differ from each other and, as far as the VAE can be trusted
    there, from the frame, averaged over the places around; one that is seen in one photo only costs `ONE_PHOTO`
    instead of the difference. First the nearest candidates are compared, then what the neighbours have chosen.

    Args:
        pair: What the frames of the pair take their detail from.
        candidates: The candidates at the frame's time.
        lit: The photos on the grid of places in the frame's light, with the VAE's error as a fourth channel.
        frame: The frame on the grid of places, (3, h', w').
        time: The δ of the frame.

    Returns:
        The `Sources`, `CANDIDATES_KEPT` for each place.
    """
    h, w = pair.flow.forward.shape[-2:]
    cells = cell_grid(h, w, frame)[0]
    nearest = candidates.nearest(cells.flatten(1)).T.unflatten(1, (h, w))
    nearest = nearest.repeat_interleave(SAMPLES, 1).repeat_interleave(SAMPLES, 2)
    together = max(1, PLACES_AT_ONCE // nearest[0].numel())
    costs = torch.cat([_costs(pair, candidates, index, lit, frame, time) for index in nearest.split(together)], 1)
    best = blurred(costs, FIRST_BLUR).flatten(0, 1).argmin(0)
    index = nearest.gather(0, (best % len(nearest))[None])[0]
    shown = best // len(nearest)
    index, shown = _neighbours(index), _neighbours(shown)
    tried = zip(index.split(together), shown.split(together), strict=True)
    costs = torch.cat([_costs(pair, candidates, i, lit, frame, time).gather(0, s[None])[0] for i, s in tried])
    weight = (-blurred(costs, SECOND_BLUR) / SOFTNESS).softmax(0)
    return Sources(index, shown, weight).kept(CANDIDATES_KEPT)


def _costs(
    pair: PairDetail,
    candidates: Candidates,
    index: torch.Tensor,
    lit: torch.Tensor,
    frame: torch.Tensor,
    time: Time,
) -> torch.Tensor:
    """What candidates (K, h', w') cost, (3, K, h', w'): seen in both photos, in the first, in the second only."""
    frame, z = frame[:, None], places(frame)
    (first, on_first), (second, on_second) = (
        _small_at(pair, lit[image], source) for image, source in enumerate(candidates.sources(index, z))
    )
    trust = 1 / (1 + (_seen_mean(first[3], on_first, second[3], on_second) / TRUSTED_ERROR).square())

    def off(colours: torch.Tensor) -> torch.Tensor:
        return trust * (colours - frame).abs().mean(0).clamp(max=COST_CLIP)

    apart = (first[:3] - second[:3]).abs().mean(0).clamp(max=COST_CLIP)
    mixed = (1 - time) * first[:3] + time * second[:3]
    far = torch.hypot(*(z[:, None] - candidates.landing[:, index]))
    off_first, off_second, off_either = (
        OFF_PICTURE * (~on).to(mixed) for on in (on_first, on_second, on_first & on_second)
    )
    costs = [
        PHOTOS_WEIGHT * apart + off(mixed) + off_either,
        ONE_PHOTO + off(first[:3]) + off_first,
        ONE_PHOTO + off(second[:3]) + off_second,
    ]
    return torch.stack(costs) + DISTANCE_COST * far + DOUBT_COST * candidates.doubt[index]


def places(like: torch.Tensor) -> torch.Tensor:
    """The places of a grid (…, h', w') in cells, (2, h', w')."""
    return (cell_grid(*like.shape[-2:], like)[0] + 0.5) / SAMPLES - 0.5


def _neighbours(field: torch.Tensor) -> torch.Tensor:
    """The values of a field (h', w') at every place and at its neighbours, (17, h', w'), within the field."""
    around = [(dy, dx) for dy, dx in product((-1, 0, 1), repeat=2) if dy or dx]
    steps = [(0, 0)] + [(dy * far, dx * far) for far in NEIGHBOURHOOD for dy, dx in around]
    return torch.stack(values_beside(field, steps))


def _small_at(pair: PairDetail, small: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is at places (2, …) of a photo (C, h', w') that is small as the grid is, (C, …), and which are on it."""
    values, _ = sampled(small[None], z.flatten(1)[None, ..., None], pair.flow.forward.shape[-2:])
    # `sampled` would tell which places lie on the canvas; the picture may fill only a part of it.
    return values[0, ..., 0].unflatten(1, z.shape[1:]), _on_picture(pair, z)


def _looked_up(image: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Values of an image (C, H, W) at x and y, which run from −1 to 1 from edge to edge; beyond it, the edge's.

    They are interpolated by cubics, since linear interpolation between pixels blurs the finest detail.
    """
    there = torch.stack([x, y], -1)[None]
    if image.device.type == "mps":  # which has no cubic interpolation in all versions of torch
        return looked_up(image[None], there)[0]
    return F.grid_sample(image[None], there, mode="bicubic", padding_mode="border", align_corners=False)[0]


def _on_picture(pair: PairDetail, z: torch.Tensor) -> torch.Tensor:
    """Which places z (2, …) lie on the picture, and not on what pads the canvas or outside of it."""
    width, height = pair.content
    x, y = z + 0.5
    return (x > 0) & (x < width) & (y > 0) & (y < height)


def _seen_mean(
    first: torch.Tensor, on_first: torch.Tensor, second: torch.Tensor, on_second: torch.Tensor
) -> torch.Tensor:
    """The mean of two values over the photos that a place is seen in; 0 where it is in none."""
    return (first * on_first + second * on_second) / (on_first.to(first) + on_second).clamp(min=1)


@dataclass(frozen=True, eq=False)
class FrameDetail:
    """All that is decided of a frame before its pixels are made; fields are (…, h', w') on the grid of places.

    `sources` and `candidates` say where it comes from; `taken` (1, …) is M; `added` (3, …) is ΔI; `light` (2, 3, …)
    are the gains g of both photos at the places that are seen there.
    """

    sources: Sources
    candidates: Candidates
    taken: torch.Tensor
    added: torch.Tensor
    light: torch.Tensor


def plan_detail(pair: PairDetail, frame: torch.Tensor, time: Time) -> FrameDetail:
    """Decide where a frame takes its detail from, and where it takes none.

    Args:
        pair: What the frames of the pair take their detail from.
        frame: The frame as diffusion made it, on the canvas, (3, canvas.height, canvas.width) in [0, 1].
        time: The δ of the frame, also as a tensor (), float32 on the device of the pair.
    """
    size = pair.small.shape[-2:]
    frame = F.interpolate(frame[None].to(pair.small), size, mode="area")[0]
    gains = gain_maps(pair.gains, size, pair.small)
    gains = torch.stack([gains[0] ** time, gains[1] ** (1 - time)])
    lit = torch.cat([pair.small[:, :3] * gains, pair.small[:, 3:]], 1)
    candidates = Candidates.at(pair, time)
    sources = choose_sources(pair, candidates, lit, frame, time)
    z = candidates.sources(sources.index, places(frame))
    (one, on_one), (other, on_other) = (_small_at(pair, lit[image], z[image]) for image in (0, 1))
    first, second = (share * on for share, on in zip(sources.shares(time), (on_one, on_other), strict=True))
    mixed = (first * one[:3] + second * other[:3]) / (first + second).clamp(min=FAINT)
    mixed = (sources.weight * mixed).sum(1)
    apart = (one[:3] - other[:3]).abs().mean(0).where(on_one & on_other, COST_CLIP)
    apart = (sources.weight * apart).sum(0)
    error = _seen_mean(one[3, 0], on_one[0], other[3, 0], on_other[0])
    light = torch.stack([_small_at(pair, gains[image], z[image][:, 0])[0] for image in (0, 1)])
    # What pads the canvas is like nothing in the photos, which must not make the picture's edge any less like them.
    row, column = pair.nearest_on_picture
    rest, error, apart, seen = (
        part[..., row[:, None], column] for part in (frame - mixed, error, apart, on_one[0] | on_other[0])
    )
    added = blurred(rest / (1 + (blurred(rest.abs().mean(0), 1.0) / LIGHT_OUTLIER).square()), LIGHT_BLUR)
    added = added / (1 + (error / LIGHT_TRUSTED_ERROR).square())
    off = blurred((rest - added).abs().mean(0), SECOND_BLUR)
    agreed = (-(off / (TAKEN + TAKEN_FOR_ERROR * error)).square()).exp()
    alike = (-(blurred(apart, SECOND_BLUR) / ALIKE).square() - (off / DRAWN_UPON) ** 4).exp()
    taken = (1 - (1 - agreed) * (1 - pair.moved * alike)) * seen
    return FrameDetail(sources, candidates, taken[None], added, light)


def frame_sources(pair: PairDetail, plan: FrameDetail, time: float) -> FrameSources:
    """Which photo every place of a frame comes from, and how far, as `with_detail` mixes it; on the CPU.

    Args:
        pair: What the frames of the pair take their detail from.
        plan: What `plan_detail` decided for the frame.
        time: The δ of the frame.
    """
    z = plan.candidates.sources(plan.sources.index, places(plan.added))
    shares = zip(plan.sources.shares(time), z, strict=True)
    seen = torch.stack([share * _on_picture(pair, there) for share, there in shares])  # (2, K, h', w')
    total = (plan.sources.weight * seen / seen.sum(0).clamp(min=FAINT)).sum(1)
    return FrameSources(time, (total / total.sum(0).clamp(min=FAINT)).cpu(), plan.taken.cpu())


# ── At full size ─────────────────────────────────────────────────────────────────────────────────────────────────────


def with_detail(
    pair: PairDetail,
    frame: torch.Tensor,
    time: float,
    dtype: torch.dtype = torch.float32,
    strip_pixels: int = STRIP_PIXELS,
    plan: FrameDetail | None = None,
) -> torch.Tensor:
    """A frame at the output size with the detail of the photos.

    Args:
        pair: What the frames of the pair take their detail from.
        frame: The frame as diffusion made it, on the canvas, (3, canvas.height, canvas.width) in [0, 1].
        time: The δ of the frame, in [0, 1].
        dtype: Dtype of the result: float32, or uint8, which takes a quarter of the memory.
        strip_pixels: How many pixels are made together, about; the frame does not depend on their number.
        plan: What `plan_detail` decided for the frame; by default `plan_detail` is asked.

    Returns:
        (3, H, W) in [0, 1] or uint8, on the CPU.
    """
    plan = plan or plan_detail(pair, frame, time)
    # In the layout of image files, so that a picture is made of it without a copy.
    size = pair.canvas.output_height, pair.canvas.output_width
    result = torch.empty(*size, 3, dtype=dtype, device="cpu").movedim(-1, 0)
    left = 0
    for pixels in _strips(pair, frame, time, plan, strip_pixels):
        right = left + pixels.shape[-1]
        result[..., left:right] = in_dtype(pixels, dtype)
        left = right
    return result


def drawn_at_once(pair: PairDetail, frame: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The frame that `with_detail` makes, wholly on the device of the pair, where it takes memory that grows with it.

    From the second frame of a pair on, nothing is done but to launch kernels, the same ones for every frame.

    Args:
        pair: What the frames of the pair take their detail from.
        frame: The frame as diffusion made it, on the canvas, (3, canvas.height, canvas.width) in [0, 1].
        time: The δ of the frame, a tensor (), float32. Both are on the device of the pair.

    Returns:
        (3, H, W) in [0, 1], float32.
    """
    return torch.cat(list(_strips(pair, frame, time, plan_detail(pair, frame, time), STRIP_PIXELS)), -1)


def in_dtype(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pixels in [0, 1] in a floating point dtype, or rounded to 8 bits in uint8."""
    return pixels.to(dtype) if dtype.is_floating_point else (255 * pixels).round().to(dtype)


def _strips(
    pair: PairDetail, frame: torch.Tensor, time: Time, plan: FrameDetail, strip_pixels: int
) -> Iterator[torch.Tensor]:
    """The pixels of a frame from left to right, (3, H, n) in [0, 1] each, of about so many pixels."""
    canvas = pair.canvas
    height, width = canvas.output_height, canvas.output_width
    content = frame[canvas.content].to(pair.small)
    wide = F.interpolate(content[None], (canvas.content_height, width), mode="bicubic", antialias=True)[0]
    taps, shares = pair.taps
    rows, columns = pair.axes
    lines = _Lines.of(pair, plan, time)
    fields = torch.cat([1 - plan.taken, plan.taken * plan.added, (plan.taken * plan.light).flatten(0, 1)])
    # In strips of columns: what is small is spread along the columns, and then its rows, which are copied whole.
    step = max(1, strip_pixels // height)
    for left in range(0, width, step):
        strip = columns.part(left, min(width, left + step))
        kept, added, light = rows.spread(strip.spread(fields, -1), -2).split([1, 3, 6])
        part = wide[..., left : left + step]
        enlarged = sum(shares[:, i, None] * part.index_select(1, taps[:, i]) for i in range(taps.shape[1]))
        seen = lines.looked_up(pair, rows, strip)
        pixels = kept * enlarged.clamp(0, 1) + added + light[:3] * seen[0] + light[3:] * seen[1]
        yield pixels.clamp(0, 1)


@dataclass(frozen=True, eq=False)
class Axis:
    """How n pixels along one side of a frame lie on the grid of places, of which there are m along that side.

    `index` (n,) is the place that a pixel is in, `offset` (n,) how far from its middle it lies in cells, and `weights`
    (3, n) how much the place before, the place itself and the place after count when values are interpolated.
    """

    index: torch.Tensor
    offset: torch.Tensor
    weights: torch.Tensor
    places: int

    @classmethod
    def of(cls, pixels: int, covered: float, count: int, like: torch.Tensor) -> Axis:
        """The axis of `pixels` pixels that cover `covered` of `count` places."""
        # In float64, so that a pixel is in the same place on every device; then the offsets are exact enough.
        position = (torch.arange(pixels, dtype=torch.float64, device="cpu") + 0.5) * (covered / pixels)
        index = position.floor().clamp(max=count - 1)
        offset = position - index - 0.5  # from the middle of the place, in places
        weights = torch.stack([(-offset).clamp(min=0), 1 - offset.abs(), offset.clamp(min=0)])
        return cls(index.long().to(like.device), (offset / SAMPLES).to(like), weights.to(like), count)

    def part(self, start: int, end: int) -> Axis:
        """The pixels from `start` to `end`."""
        return Axis(self.index[start:end], self.offset[start:end], self.weights[:, start:end], self.places)

    def at(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        """For every pixel, the value of the place that it is in."""
        return values.index_select(axis, self.index)

    def spread(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        """Values of the places, interpolated between the middles of the places."""
        shape = [-1, 1] if axis == -2 else [-1]
        steps = zip((-1, 0, 1), self.weights, strict=True)
        return sum(
            values.index_select(axis, (self.index + step).clamp(0, self.places - 1)) * weight.reshape(shape)
            for step, weight in steps
        )


def _taps(given: int, wanted: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of a picture make up each row of it resized, and how much of each: (wanted, k) twice."""
    unit = torch.eye(given, dtype=torch.float32, device="cpu")
    matrix = F.interpolate(unit[None, None], (wanted, given), mode="bicubic", antialias=True)[0, 0]
    count = int((matrix != 0).sum(1).max())
    index = matrix.abs().topk(count, 1).indices.sort(1).values
    return index.to(like.device), matrix.gather(1, index).to(like)


@dataclass(frozen=True, eq=False)
class _Lines:
    """Where the pixels of a frame come from, as linear functions of their offset from the middle of their place.

    `middle` (K, 2 photos, 2, h', w') are x and y of the middle in the photo, from −1 to 1 from edge to edge; `step` of
    the same shape is the complex factor, in the same unit along x; `ratio` is the unit along y by that along x.
    `shares` (K, 2, h', w') are those of the photos, and `weights` (3, 3, K, h', w') is how much each candidate of a
    place counts at the places around.
    """

    middle: torch.Tensor
    step: torch.Tensor
    ratio: float
    shares: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, pair: PairDetail, plan: FrameDetail, time: Time) -> _Lines:
        """The lines of a frame."""
        width, height = pair.content
        sources, candidates = plan.sources, plan.candidates
        middle = torch.stack(candidates.sources(sources.index, places(plan.added)), 1) + 0.5
        x, y = middle.movedim(2, 0).unbind(1)  # (K, 2 photos, h', w') each
        factors = torch.stack([factor[:, sources.index] for factor in candidates.factors])
        key = 3 * sources.index + sources.shown
        around = list(product((-1, 0, 1), repeat=2))
        weights = [
            ((key[:, None] == there) * weight).sum(1)
            for there, weight in zip(*(values_beside(part, around) for part in (key, sources.weight)), strict=True)
        ]
        return cls(
            torch.stack([x * (2 / width) - 1, y * (2 / height) - 1], 2),
            factors.movedim(2, 0) * (2 / width),
            width / height,
            torch.stack(sources.shares(time), 1),
            torch.stack(weights).unflatten(0, (3, 3)),
        )

    def looked_up(self, pair: PairDetail, rows: Axis, columns: Axis) -> tuple[torch.Tensor, torch.Tensor]:
        """What the pixels of some columns get from the first and from the second photo, (3, H, n) each."""
        across, down = columns.offset, rows.offset[:, None]
        weights = sum(
            weight * columns.at(part, -1) for weight, part in zip(columns.weights, self.weights.unbind(1), strict=True)
        )
        weights = sum(
            weight[:, None] * rows.at(part, -2) for weight, part in zip(rows.weights, weights, strict=True)
        )  # (K, H, n)
        real, imaginary = columns.at(self.step, -1).unbind(2)
        middle_x, middle_y = columns.at(self.middle, -1).unbind(2)
        lines = torch.stack(
            [middle_x + real * across, -imaginary, middle_y + self.ratio * imaginary * across, self.ratio * real], 2
        )
        shares = columns.at(self.shares, -1)
        sums, total = [0, 0], 0
        for k, weight in enumerate(weights):
            x0, dx, y0, dy = rows.at(lines[k], -2).unbind(1)  # (2, H, n) each
            x, y = x0 + dx * down, y0 + dy * down
            on = (x.abs() < 1) & (y.abs() < 1)
            share = rows.at(shares[k], -2) * on
            share = weight * share / share.sum(0).clamp(min=FAINT)
            for image in (0, 1):
                sums[image] = sums[image] + share[image] * _looked_up(pair.photos[image], x[image], y[image])
            total = total + share.sum(0)
        total = total.clamp(min=FAINT)
        return sums[0] / total, sums[1] / total
