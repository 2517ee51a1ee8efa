# SPDX-License-Identifier: Apache-2.0
"""What a session of the page keeps of its work: a prepared pair, rendered frames, a finished video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from PIL import Image

from ..media.correspondences import confidence_picture, correspondence_lines, flow_picture, occlusion_picture
from ..media.pictures import contact_sheet, picture_of
from ..media.sources import sources_picture
from ..outputs import DreamMoverPipelineOutput
from ..ranking import Chooser
from ..records import FrameSources, PreparedPair


@dataclass(frozen=True)
class PreparedPhotos:
    """A prepared pair, a key that is equal only for the same photos and the same settings, and the seed of frames."""

    key: str
    pair: PreparedPair
    seed: int


@dataclass(frozen=True, eq=False)
class UnwrittenFrames:
    """The frames of a prepared pair before they are files.

    Args:
        key: a key that is equal only for the same prepared pair and the same settings.
        prepared: the prepared pair.
        rendering: the settings, which are arguments of `DreamMoverPipeline.render`.
        output: what the pipeline returned, with both photos at the ends.
        sources: where each of the frames between the photos takes its detail from; empty where they take none.
        chooser: what each frame was chosen among; one that has seen nothing where every frame was made once.
    """

    key: str
    prepared: PreparedPhotos
    rendering: Mapping[str, object]
    output: DreamMoverPipelineOutput
    sources: Sequence[FrameSources]
    chooser: Chooser

    @property
    def nbytes(self) -> int:
        """How many bytes all pictures take; Pillow holds every pixel in four."""
        pictures = chain(self.output.frames[0], *self.chooser.seen.values())
        return sum(4 * picture.width * picture.height for picture in pictures)


@dataclass(frozen=True)
class RenderedFrames:
    """The frames of a prepared pair as files, with both photos at the ends.

    Args:
        key: a key that is equal only for the same prepared pair and the same settings.
        prepared: the prepared pair.
        rendering: the settings, which are arguments of `DreamMoverPipeline.render`.
        folder: the folder that holds all files of these frames.
        files: the frames, in their order.
        times: the δ of every frame.
        pictures: the files of the pictures that explain the frames, by their names.
        flagged: how many frames the safety checker has blacked out.
        candidates: the files that each frame was chosen among, by its δ, in the order in which frames are made; empty
            where every frame was made once.
        chosen: which of its candidates each frame is, by its δ.
    """

    key: str
    prepared: PreparedPhotos
    rendering: Mapping[str, object]
    folder: Path
    files: tuple[Path, ...]
    times: tuple[float, ...]
    pictures: dict[str, Path]
    flagged: int
    candidates: dict[float, tuple[Path, ...]]
    chosen: dict[float, int]


@dataclass(frozen=True)
class FinishedVideo:
    """A video, and what was done to make it.

    Args:
        rendered: the frames that the video plays.
        video: the file of the video.
        comparison: the file of a video that shows the frames beside a cross-fade of the two photos.
        work: what had to be done anew for this video: "prepared", "rendered" or "written", in this order.
    """

    rendered: RenderedFrames
    video: Path
    comparison: Path
    work: tuple[str, ...]


def explaining_pictures(
    pair: PreparedPair,
    frames: Sequence[Image.Image],
    times: Sequence[float],
    sources: Sequence[FrameSources],
    motion: str,
) -> dict[str, Image.Image]:
    """The pictures that explain the frames of a pair, by the names that the page knows them by.

    Args:
        pair: the prepared pair.
        frames: the frames, with both photos at the ends.
        times: the δ of every frame.
        sources: where each of the frames between the photos takes its detail from; empty where they take none.
        motion: the way that things take through the frames.
    """
    first, last = (picture_of(image) for image in pair.images)
    flow, canvas = pair.flow, pair.canvas
    pictures = {
        "flow": flow_picture(flow, canvas),
        "matches": correspondence_lines(first, last, flow, canvas=canvas, motion=motion),
        "confidence": confidence_picture(flow, (first, last), canvas),
        "occlusion": occlusion_picture(flow, (first, last), canvas),
        "sheet": contact_sheet(frames, times),
    }
    if sources:
        pictures["sources"] = sources_picture(frames[1:-1], sources, canvas)
    return pictures
