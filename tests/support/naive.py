# SPDX-License-Identifier: Apache-2.0
"""Slow and obvious references in float64, written from the paper's equations: one loop over cells at a time.

Flow is (B, 2, h, w), channel 0 = dx, channel 1 = dy; the value at a source cell says by how much it moves.
"""

from __future__ import annotations

import math
from itertools import product

import torch


def tent(distance: float) -> float:
    """The bilinear kernel along one axis."""
    return max(0.0, 1.0 - abs(distance))


def targets(flow: torch.Tensor):
    """(b, row, column, target row, target column) of every source cell, in row-major order."""
    batch, _, h, w = flow.shape
    for b, row, column in product(range(batch), range(h), range(w)):
        dx, dy = flow[b, :, row, column].tolist()
        yield b, row, column, row + dy, column + dx


def splat(x: torch.Tensor, flow: torch.Tensor, metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. (4): σ(q) = Σ_p b(p, q) e^{M(p)} x(p) / Σ_p b(p, q) e^{M(p)}, and the sum below the line."""
    batch, _, h, w = x.shape
    x, flow, metric = x.double(), flow.double(), metric.double()
    total, weight = torch.zeros_like(x), torch.zeros(batch, 1, h, w, dtype=torch.float64)
    for b, row, column, y, x_ in targets(flow):
        for q_row, q_column in product(range(h), range(w)):
            share = tent(y - q_row) * tent(x_ - q_column) * math.exp(metric[b, 0, row, column])
            if share > 0:
                total[b, :, q_row, q_column] += share * x[b, :, row, column]
                weight[b, :, q_row, q_column] += share
    return torch.where(weight > 0, total / weight, 0), weight


def winner_splat(x: torch.Tensor, flow: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every source lands on its nearest cell, halves right and down; the heaviest stays, the earliest in a draw."""
    x, flow, weight = x.double(), flow.double(), weight.double()
    out, best = torch.zeros_like(x), torch.zeros_like(weight)
    h, w = x.shape[-2:]
    for b, row, column, y, x_ in targets(flow):
        q_row, q_column = math.floor(y + 0.5), math.floor(x_ + 0.5)
        if 0 <= q_row < h and 0 <= q_column < w and weight[b, 0, row, column] > best[b, 0, q_row, q_column]:
            out[b, :, q_row, q_column] = x[b, :, row, column]
            best[b, :, q_row, q_column] = weight[b, :, row, column]
    return out, best


def backward_warp(x: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """out(p) = x(p + flow(p)), bilinear, zero outside, integer coordinates at cell centres."""
    h, w = x.shape[-2:]
    x, flow = x.double(), flow.double()
    out = torch.zeros_like(x)
    for b, row, column, y, x_ in targets(flow):
        for q_row, q_column in product(range(h), range(w)):
            out[b, :, row, column] += tent(y - q_row) * tent(x_ - q_column) * x[b, :, q_row, q_column]
    return out


def match(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Eq. (5): flow (1, 2, h, w) from each cell of `first` (C, h, w) to the most similar of `second`, lowest index."""
    h, w = first.shape[-2:]
    cells = list(product(range(h), range(w)))
    flow = torch.zeros(1, 2, h, w, dtype=torch.float64)
    for row, column in cells:
        a = first[:, row, column].double()
        best = -math.inf
        for q_row, q_column in cells:
            b = second[:, q_row, q_column].double()
            cosine = float(a @ b / (a.norm() * b.norm()))
            if cosine > best:
                best = cosine
                flow[0, :, row, column] = torch.tensor([q_column - column, q_row - row])
    return flow


def round_trip_error(there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """|F(p) + F'(p + F(p))| for the cells of one image, (1, 1, h, w); infinite where p + F(p) leaves the grid."""
    h, w = there.shape[-2:]
    found = backward_warp(back, there)
    error = torch.full((1, 1, h, w), math.inf, dtype=torch.float64)
    for row, column in product(range(h), range(w)):
        dx, dy = there[0, :, row, column].tolist()
        if 0 <= column + dx <= w - 1 and 0 <= row + dy <= h - 1:
            error[0, 0, row, column] = (there[0, :, row, column] + found[0, :, row, column]).norm()
    return error


def smooth_flow(there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """One pass over the flow of one image, (1, 2, h, w): Gaussian (σ 1.5, 5×5) times exp(−e²/2) + 0.001."""
    h, w = there.shape[-2:]
    error, out = round_trip_error(there, back), torch.zeros_like(there)
    for row, column in product(range(h), range(w)):
        total = 0.0
        for y, x in product(range(row - 2, row + 3), range(column - 2, column + 3)):
            if 0 <= y < h and 0 <= x < w:
                near = math.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * 1.5**2))
                weight = near * (math.exp(-(float(error[0, 0, y, x]) ** 2) / 2) + 1e-3)
                out[0, :, row, column] += weight * there[0, :, y, x]
                total += weight
        out[0, :, row, column] /= total
    return out


def photometric_error(pair: torch.Tensor, forward: torch.Tensor, backward: torch.Tensor) -> torch.Tensor:
    """mean_c |x − backwarp(x of the other image)|, (2, 1, h, w)."""
    first, last = pair[:1].double(), pair[1:].double()
    errors = [first - backward_warp(last, forward), last - backward_warp(first, backward)]
    return torch.cat(errors).abs().mean(1, keepdim=True)


def importance(pair: torch.Tensor, forward: torch.Tensor, backward: torch.Tensor) -> torch.Tensor:
    """M = clip(−10 · error, −10, 10)."""
    return (-10 * photometric_error(pair, forward, backward)).clip(-10, 10)


def high_level(pair, forward, backward, metric, delta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. (7) and its holes, for one frame: (C, h, w), and how many images reach each cell, (1, h, w)."""
    pair = pair.double()
    (first,), (weight0,) = splat(pair[:1], delta * forward, metric[:1])
    (last,), (weight1,) = splat(pair[1:], (1 - delta) * backward, metric[1:])
    frame, coverage = torch.zeros_like(first), torch.zeros_like(weight0)
    for row, column in product(*map(range, first.shape[-2:])):
        cell = (slice(None), row, column)
        reached = bool(weight0[cell] > 0), bool(weight1[cell] > 0)
        coverage[cell] = sum(reached)
        frame[cell] = {
            (True, True): (1 - delta) * first[cell] + delta * last[cell],
            (True, False): first[cell],
            (False, True): last[cell],
            (False, False): (1 - delta) * pair[0][cell] + delta * pair[1][cell],
        }[reached]
    return frame, coverage


def low_level(eps, forward, backward, metric, delta: float) -> torch.Tensor:
    """Winner takes all and its holes, for one frame: (C, h, w)."""
    eps, weights = eps.double(), metric.double().exp()
    (first,), (weight0,) = winner_splat(eps[:1], delta * forward, weights[:1])
    (last,), (weight1,) = winner_splat(eps[1:], (1 - delta) * backward, weights[1:])
    frame = torch.zeros_like(first)
    for row, column in product(*map(range, first.shape[-2:])):
        cell = (slice(None), row, column)
        share0, share1 = (1 - delta) * weight0[cell], delta * weight1[cell]
        if share0 == share1 == 0:
            frame[cell] = eps[0 if delta < 0.5 else 1][cell]
        else:
            frame[cell] = first[cell] if share0 >= share1 else last[cell]
    return frame


def select_unwarped(latents, forward, backward, delta: float) -> torch.Tensor:
    """The released code's mix, for one frame: clip(0.3 − error, 0.001, 1) · time decides cell by cell."""
    weight = (0.3 - photometric_error(latents, forward, backward)).clip(0.001, 1)
    frame = torch.zeros_like(latents[0], dtype=torch.float64)
    for row, column in product(*map(range, frame.shape[-2:])):
        wins = (1 - delta) * weight[0, 0, row, column] >= delta * weight[1, 0, row, column]
        frame[:, row, column] = latents[0 if wins else 1, :, row, column]
    return frame


def similarity(flow, weight, row: int, column: int, sigma: float) -> tuple[complex, complex]:
    """The turn less one and the shift at a cell, of one image's matches (2, h, w) by weights (h, w) and a Gaussian."""
    h, w = flow.shape[-2:]
    stiffness = 0.5 * (min(h, w) / 32) ** 2
    total = mean_place = mean_vector = 0
    entries = []
    for y, x in product(range(h), range(w)):
        dx, dy = x - column, y - row
        if max(abs(dx), abs(dy)) <= 8:
            share = float(weight[y, x]) * math.exp(-(dx**2 + dy**2) / (2 * sigma**2))
            place, vector = complex(dx, dy), complex(*flow[:, y, x].tolist())
            entries.append((share, place, vector))
            total += share
            mean_place += share * place
            mean_vector += share * vector
    mean_place, mean_vector = mean_place / total, mean_vector / total
    spread = sum(share * abs(place - mean_place) ** 2 for share, place, _ in entries)
    joint = sum(share * (vector - mean_vector) * (place - mean_place).conjugate() for share, place, vector in entries)
    turn = joint / (spread + stiffness * total)
    return turn, mean_vector - turn * mean_place


def window_difference(own, other, cell: tuple[int, int], size: tuple[int, int], shift, turn) -> float:
    """The weighted mean difference in colour of the window around a cell from the place that it is carried to.

    `own` and `other` are photos (3, H, W), `cell` is row and column in a grid of `size` cells, and `shift` and `turn`
    (2, h, w) are in cells.
    """
    h, w = size
    row, column = cell
    total = weights = 0.0
    for j, i in product(range(11), repeat=2):
        offset = complex(-2.5 + 0.5 * i, -2.5 + 0.5 * j)
        start = complex(column, row) + offset
        if not (-0.5 < start.real < w - 0.5 and -0.5 < start.imag < h - 0.5):
            continue
        end = start + complex(*shift[:, row, column].tolist()) + complex(*turn[:, row, column].tolist()) * offset
        weight = math.exp(-2 * abs(offset) ** 2 / 2.5**2)
        difference = 0.25
        if -0.5 < end.real < w - 0.5 and -0.5 < end.imag < h - 0.5:
            there, here = (colour_at(photo, place, size) for photo, place in ((other, end), (own, start)))
            difference = min(0.25, sum(abs(a - b) for a, b in zip(there, here, strict=True)) / 3)
        total += weight * difference
        weights += weight
    return total / weights


def colour_at(photo, place: complex, size: tuple[int, int]) -> list[float]:
    """The bilinear colours of a photo (3, H, W) at a place in cells; beyond the edge those of the edge."""
    _, height, width = photo.shape
    x = min(max((place.real + 0.5) * width / size[1] - 0.5, 0), width - 1)
    y = min(max((place.imag + 0.5) * height / size[0] - 0.5, 0), height - 1)
    left, top = min(int(x), width - 2), min(int(y), height - 2)
    fx, fy = x - left, y - top
    corners = ((0, 0, (1 - fy) * (1 - fx)), (0, 1, (1 - fy) * fx), (1, 0, fy * (1 - fx)), (1, 1, fy * fx))
    return [sum(share * float(photo[c, top + dy, left + dx]) for dy, dx, share in corners) for c in range(3)]
