# SPDX-License-Identifier: Apache-2.0
"""From clean latents to the pictures of a video: decode, bring in the photos' detail, check, and hand over.

A picture is made by itself, so frames can be made one at a time: all of them at once by `finish_frames`, or each when
it is asked for by `LazyFrames`, whose memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import PIL.Image
import torch

from .captured import RecordedCall
from .cascade import PairCascade
from .detail import PairDetail, drawn_at_once, frame_sources, in_dtype, lookup_flow, plan_detail, with_detail
from .framing import fit, unfit
from .images import rgb
from .memory import free_memory, is_out_of_memory
from .models import Models
from .outputs import DreamMoverPipelineOutput, as_output
from .paths import motion_paths
from .progress import Stages
from .records import Canvas, FrameSources
from .rendering import DenoisedFrames
from .settings import RenderSettings
from .tone import tone_difference, with_tone
from .turns import interruptible

RECORDED_PIXELS = 2**20  # pixels of a frame at most, for its detail to be recorded; a larger one keeps a GPU busy
RECORDING_BYTES = 3 * 2**30  # free memory from which on it is recorded; a record of frames of 1024² holds 0.8 GiB
KEPT_BYTES = 2**28  # largest size in bytes of a video whose finished pictures are kept, so that none is made twice

# A function from pictures (B, 3, H, W) to the same with what was flagged blacked out, and to whether each was flagged,
# or None without a checker.
SafetyCheck = Callable[[torch.Tensor], tuple[torch.Tensor, list[bool] | None]]
# A function that is handed which photo every place of a frame comes from.
SourcesListener = Callable[[FrameSources], object]
# A function from clean latents (B, C, h, w) to pictures (B, 3, height, width) on the canvas.
Decode = Callable[[torch.Tensor], torch.Tensor]


class FrameMaker:
    """Makes the pictures of one pair's video, each by itself, with the photos at the ends where they are wanted.

    Args:
        models: The models that decode and refine the frames.
        frames: What `render_latents` returned.
        settings: What detail frames have, whether the photos are wanted, and in what form.
        dtype: Dtype of pictures with the photos' detail: float32, or uint8, which takes a quarter of the memory.
        check_safety: Function that blacks out what the safety checker flags.
        on_sources: Function called once for every frame that takes detail from the photos, the ends aside; None for
            none.
    """

    def __init__(
        self,
        models: Models,
        frames: DenoisedFrames,
        settings: RenderSettings,
        dtype: torch.dtype,
        check_safety: SafetyCheck,
        on_sources: SourcesListener | None = None,
    ):
        self.models, self.frames, self.settings, self.dtype = models, frames, settings, dtype
        self.times = (0.0, *frames.times, 1.0) if settings.include_inputs else frames.times
        self._check_safety, self._on_sources = check_safety, on_sources
        self._told: set[int] = set()
        self._decoded: dict[int, torch.Tensor] = {}
        self._pair: _FinishedPair | None = None

    @property
    def decodes(self) -> int:
        """How many latents are decoded for all pictures together."""
        return len(self.frames.latents) + 2 * self._needs_photos

    @property
    def _needs_photos(self) -> bool:
        return self.settings.detail_made != "upsampled" or self.settings.include_inputs

    def make(self, index: int, decode: Decode) -> tuple[torch.Tensor, bool | None]:
        """Make the picture of an index among `times`.

        Args:
            index: Index of the picture among `times`.
            decode: Function that decodes latents, as `Autoencoder.decoder` gives it.

        Returns:
            The picture (1, 3, H, W), uint8 or float32 in [0, 1], and whether the safety checker flagged it; None
            without a checker, and for the photos themselves, which are not checked.

        Raises:
            RuntimeError, such as torch.OutOfMemoryError: Memory does not suffice; the error's `latents` are the
                frames'.
        """
        frames, time = self.frames, self.times[index]
        between = index - self.settings.include_inputs
        at_an_end = not 0 <= between < len(frames.latents)
        end = round(time)
        if at_an_end and self.settings.endpoints == "original":
            return frames.images[end][None], None
        try:
            pair = self._pair = self._pair or self._finished_pair(decode)
            if at_an_end:
                return pair.finish(pair.copies[end], (), time, None), None
            on_sources = None if index in self._told else self._on_sources
            picture = pair.finish(self._decoded_frame(between, decode), pair.tones, time, on_sources)
            self._told.add(index)
            picture, flags = self._check_safety(picture)
        except RuntimeError as error:
            if is_out_of_memory(error):
                error.latents = frames.latents
                error.add_note("What was denoised is not lost: this error's `latents` are for `decode_latents`.")
            raise
        return picture, flags[0] if flags else None

    def forget_pair(self) -> None:
        """Give back the memory of what is known of the pair; it is found out again for the next picture."""
        self._pair, self._decoded = None, {}

    def _decoded_frame(self, index: int, decode: Decode) -> torch.Tensor:
        """The decoded latents of a frame, (1, 3, height, width) on the CPU.

        A GPU decodes a few frames at once in less time, so neighbours are decoded together and wait for their turn.
        """
        if index not in self._decoded:
            canvas, latents = self.frames.canvas, self.frames.latents
            together = self.models.autoencoder.decodes_at_once(canvas.height * canvas.width)
            start = index - index % together
            pictures = decode(latents[start : start + together]).cpu()
            self._decoded = dict(enumerate(pictures.split(1), start))
        return self._decoded.pop(index)

    def _finished_pair(self, decode: Decode) -> _FinishedPair:
        """What can be known once for all pictures."""
        frames, canvas = self.frames, self.frames.canvas
        if not self._needs_photos:
            return _FinishedPair(canvas, self.dtype)
        photos = [rgb(image) for image in frames.images]
        working = torch.stack([fit(photo, canvas) for photo in photos])
        copies = tuple(decode(latent).cpu() for latent in frames.clean_ends.split(1))
        detail = cascade = None
        if self.settings.detail_made != "upsampled":
            with interruptible():
                flow, paths = frames.flow, frames.paths
                if paths is None:
                    flow = lookup_flow(flow, photos, canvas)
                    paths = motion_paths(flow, self.settings.motion)
                moved = self.settings.method == "flow"
                detail = PairDetail.of(photos, working, torch.cat(copies), canvas, flow, paths, moved)
        if self.settings.detail_made == "diffusion":
            cascade = PairCascade.of(self.models, frames.pair, detail, largest_batch=self.settings.frame_batch_size)
        tones = []
        if self.settings.include_inputs and self.settings.endpoints == "original":
            tones = [
                tone_difference(photo[canvas.content], copy[canvas.content])
                for photo, copy in zip(working.split(1), copies, strict=True)
            ]
        recorded = None
        if detail is not None and cascade is None and self._records(detail):
            recorded = RecordedCall(partial(drawn_at_once, detail), "The pictures of a video", before=1)
        return _FinishedPair(canvas, self.dtype, copies, tones, detail, cascade, recorded)

    def _records(self, detail: PairDetail) -> bool:
        """Whether the detail of frames is recorded on a GPU."""
        device, canvas = detail.small.device, self.frames.canvas
        small = canvas.output_height * canvas.output_width <= RECORDED_PIXELS
        return device.type == "cuda" and small and free_memory(device) >= RECORDING_BYTES


@dataclass(frozen=True, eq=False)
class _FinishedPair:
    """What is known once for all pictures of a pair.

    `canvas` is where the photos sit, and `dtype` that of pictures with detail. `copies` are the two photos as the VAE
    brings them back and `tones` what of their tones is faded out. `detail` is what pictures take from the photos, None
    where they are upsampled; `cascade` refines what they do not take from them, None where nothing does. `recorded`
    is `drawn_at_once` for the pair, as a GPU repeats it; None where nothing is recorded.
    """

    canvas: Canvas
    dtype: torch.dtype
    copies: tuple[torch.Tensor, ...] = ()
    tones: Sequence[torch.Tensor] = ()
    detail: PairDetail | None = None
    cascade: PairCascade | None = None
    recorded: RecordedCall | None = None

    def finish(
        self, decoded: torch.Tensor, tones: Sequence[torch.Tensor], time: float, on_sources: SourcesListener | None
    ) -> torch.Tensor:
        """A picture at the output size, (1, 3, H, W), of a decoded one.

        Args:
            decoded: The decoded picture on the canvas, (1, 3, height, width) in [0, 1].
            tones: The tones of the photos, of which as much is added as the time calls for; an empty sequence for
                none.
            time: The δ of the picture.
            on_sources: Function that is told where the detail comes from, if there is any; None for none.
        """
        with interruptible():
            if self.detail is None:
                return with_tone(unfit(decoded, self.canvas), tones, time)
            content, frame = self.canvas.content, decoded.clone()
            frame[content] = with_tone(decoded[content], tones, time)
            if self.recorded is not None and on_sources is None:
                device = self.detail.small.device
                when = torch.full((), time, dtype=torch.float32, device=device)
                return in_dtype(self.recorded(frame[0].to(device), when), self.dtype).cpu()[None]
            plan = plan_detail(self.detail, frame[0], time)
            if on_sources is not None:
                on_sources(frame_sources(self.detail, plan, time))
            if self.cascade is None:
                return with_detail(self.detail, frame[0], time, self.dtype, plan=plan)[None]
        return self.cascade.refined(frame[0], plan, time)[None]


def finish_frames(
    models: Models,
    frames: DenoisedFrames,
    settings: RenderSettings,
    output_type: str,
    check_safety: SafetyCheck,
    stages: Stages,
    on_sources: SourcesListener | None = None,
) -> DreamMoverPipelineOutput:
    """Decode frames and bring them into the form asked for, with the photos at the ends where they are wanted.

    Args:
        models: The models that decode and refine the frames.
        frames: What `render_latents` returned.
        settings: What detail frames have, whether the photos are wanted, and in what form.
        output_type: Form of the frames: "pil", "np", "pt" or "latent".
        check_safety: Function that blacks out what the safety checker flags.
        stages: What is told of progress.
        on_sources: Function called for every frame that takes detail from the photos, the ends aside; None for none.

    Returns:
        A batch of one.

    Raises:
        RuntimeError, such as torch.OutOfMemoryError: Memory does not suffice for a single frame; the error's `latents`
            are the frames'.
    """
    maker = FrameMaker(models, frames, settings, picture_dtype(output_type), check_safety, on_sources)
    if output_type == "latent":
        ends = frames.clean_ends
        latents = torch.cat([ends[:1], frames.latents, ends[1:]]) if settings.include_inputs else frames.latents
        return DreamMoverPipelineOutput(latents[None], [frames.flow], None, [maker.times], frames.candidates)
    pictures, flags = [], []
    with stages("Decoding", maker.decodes) as step, models.autoencoder.decoder() as decode:

        def decode_and_step(latents: torch.Tensor) -> torch.Tensor:
            pictures = decode(latents)
            for _ in latents:
                step()
            return pictures

        for index in range(len(maker.times)):
            picture, flag = maker.make(index, decode_and_step)
            pictures.append(as_output(picture, output_type))
            flags.append(flag)
    flagged = None if all(flag is None for flag in flags) else [[bool(flag) for flag in flags]]
    if output_type == "pil":
        video = [[picture for (picture,) in pictures]]
    else:
        video = (torch.cat if output_type == "pt" else np.concatenate)(pictures)[None]
    return DreamMoverPipelineOutput(video, [frames.flow], flagged, [maker.times], frames.candidates)


def picture_dtype(output_type: str) -> torch.dtype:
    """The dtype in which pictures are made for an `output_type`."""
    return torch.uint8 if output_type in ("pil", "lazy") else torch.float32


# ── One at a time ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Workplace:
    """Where frames can be made after the call that they belong to.

    `turn` is a context that has the models for making a frame, and `short_turn` one that has them for anything less.
    `stages` is told of progress. `finish` is called at the end, in a short turn, for models that were brought to the
    device.
    """

    turn: Callable[[], AbstractContextManager]
    short_turn: Callable[[], AbstractContextManager]
    stages: Stages
    finish: Callable[[], object]


class LazyFrame:
    """A frame that is not made before it is asked for.

    Args:
        maker: What makes the frame.
        index: Index of the frame among those of its maker.
    """

    def __init__(self, maker: FrameMaker, index: int):
        self.maker, self.index, self.flagged = maker, index, False
        self.kept: PIL.Image.Image | None = None

    @property
    def nbytes(self) -> int:
        """How many bytes its picture takes; Pillow holds every pixel in four."""
        canvas = self.maker.frames.canvas
        return 4 * canvas.output_height * canvas.output_width

    def picture(self, workplace: Workplace) -> PIL.Image.Image:
        """The frame as it was kept, or made now."""
        if self.kept is not None:
            return self.kept
        with workplace.turn(), self.maker.models.autoencoder.decoder() as decode:
            picture, flag = self.maker.make(self.index, decode)
        self.flagged = bool(flag)
        (picture,) = as_output(picture, "pil")
        return picture


class LazyFrames(Sequence):
    """The frames of a video as a sequence of PIL images, each of which is made when it is asked for.

    Looped over, they are made one at a time, with progress shown. If all of them together take at most 256 MiB, each
    is kept once it is made. Of a larger video none is kept, and a frame is made again whenever it is asked for, so
    that memory does not grow with the number of frames. The pipeline must be as it was when the latents were made.

    Args:
        frames: The frames in their order; one may be there several times.
        workplace: Where the frames are made.
        keep: Whether each frame is kept once it is made; by default, if all of them take at most `KEPT_BYTES`.
    """

    def __init__(self, frames: Iterable[LazyFrame], workplace: Workplace, keep: bool | None = None):
        self._frames, self._workplace = list(frames), workplace
        self._keep = sum(frame.nbytes for frame in set(self._frames)) <= KEPT_BYTES if keep is None else keep

    @classmethod
    def of(cls, maker: FrameMaker, workplace: Workplace) -> LazyFrames:
        """All frames of a maker."""
        return cls((LazyFrame(maker, index) for index in range(len(maker.times))), workplace)

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int | slice) -> PIL.Image.Image | LazyFrames:
        """The frame of an index, or the frames of a slice, which are made when they are asked for."""
        if isinstance(index, slice):
            return self.arranged(range(len(self))[index])
        frame = self._frames[index]
        if frame.kept is not None:
            return frame.kept
        with self._pairs_forgotten():
            return self._kept(frame)

    def __iter__(self) -> Iterator[PIL.Image.Image]:
        """Make the frames one at a time."""
        with self._workplace.stages("Decoding", len(self)) as step, self._pairs_forgotten():
            before = None
            for frame, shown in groupby(self._frames):
                if before is not None and before is not frame.maker:
                    with self._workplace.short_turn():
                        before.forget_pair()
                before = frame.maker
                picture = self._kept(frame)
                for _ in shown:
                    yield picture
                    step()
                del picture  # before the next one is made, since both may be large

    def __add__(self, other: LazyFrames) -> LazyFrames:
        """These frames and then others."""
        return LazyFrames([*self._frames, *other._frames], self._workplace)

    def arranged(self, order: Iterable[int]) -> LazyFrames:
        """The frames of these indices in their order, in which one may be there several times."""
        return LazyFrames((self._frames[index] for index in order), self._workplace, self._keep)

    @property
    def frame_size(self) -> tuple[int, int]:
        """Width and height of the frames, which are not made for it."""
        canvas = self._frames[0].maker.frames.canvas
        return canvas.output_width, canvas.output_height

    @property
    def flags(self) -> LazyFlags:
        """Which frames the safety checker has flagged and blacked out."""
        return LazyFlags(self._frames)

    def _kept(self, frame: LazyFrame) -> PIL.Image.Image:
        """The picture of a frame, which is kept if all of them are."""
        picture = frame.picture(self._workplace)
        if self._keep:
            frame.kept = picture
        return picture

    @contextmanager
    def _pairs_forgotten(self) -> Iterator[None]:
        """Give memory back when the context ends, while no other thread makes a frame."""
        try:
            yield
        finally:
            with self._workplace.short_turn():
                for maker in {frame.maker for frame in self._frames}:
                    maker.forget_pair()
                self._workplace.finish()


class LazyFlags(Sequence):
    """Which of lazy frames the safety checker has flagged so far; frames that are not made yet are not flagged.

    Args:
        frames: The lazy frames, in their order.
    """

    def __init__(self, frames: Sequence[LazyFrame]):
        self._frames = frames

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int | slice) -> bool | list[bool]:
        """Whether the frame of an index is flagged, or which frames of a slice are."""
        if isinstance(index, slice):
            return [frame.flagged for frame in self._frames[index]]
        return self._frames[index].flagged


def lazy_output(maker: FrameMaker, workplace: Workplace, checked: bool) -> DreamMoverPipelineOutput:
    """The output of a pair whose frames are made when they are asked for.

    Args:
        maker: What makes the frames.
        workplace: Where the frames are made.
        checked: Whether a safety checker looks at the frames.
    """
    frames = LazyFrames.of(maker, workplace)
    flags, made = [frames.flags] if checked else None, maker.frames
    return DreamMoverPipelineOutput([frames], [made.flow], flags, [maker.times], made.candidates)
