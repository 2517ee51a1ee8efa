# SPDX-License-Identifier: Apache-2.0
"""What the pipeline lets its users call besides whole videos: its single steps, and prepared pairs in files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence

import torch

from .lora import check_pair_lora
from .outputs import as_output
from .paths import motion_paths
from .records import FusedFrames, PreparedPair, check_prepared
from .rendering import fuse_pair, place_frames, preview_pair
from .schedules import schedule_settings
from .settings import VideoSettings, arguments
from .storage import check_same_models, fingerprint, fingerprints, read_pair, write_pair
from .turns import Turn, interruptible


class StageMethods:
    """What `DreamMoverPipeline` lets its users call besides whole videos."""

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = False,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = 1.0,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Text embeddings, as every Stable Diffusion pipeline gives them.

        Args:
            prompt: P texts, or None where `prompt_embeds` are given.
            device: Where the text encoder runs.
            num_images_per_prompt: Number of copies of each embedding.
            do_classifier_free_guidance: Whether negative embeddings are wanted too.
            negative_prompt: One text, or one for each prompt; the empty text by default.
            prompt_embeds: Text embeddings (P, L, D) to use instead of `prompt`.
            negative_prompt_embeds: Text embeddings (P, L, D) to use instead of `negative_prompt`.
            lora_scale: Factor of the weights of the text encoder's LoRAs; None for 1.
            clip_skip: Number of layers to leave out at the text encoder's end.

        Returns:
            (P · num_images_per_prompt, L, D) twice; the second is None without guidance.
        """
        with self._step_turn():
            scale = 1.0 if lora_scale is None else lora_scale
            embeds, negative = self._conditioner(device, scale).encode(
                prompt, do_classifier_free_guidance, negative_prompt, prompt_embeds, negative_prompt_embeds, clip_skip
            )
        embeds = embeds.repeat_interleave(num_images_per_prompt, 0)
        return embeds, None if negative is None else negative.repeat_interleave(num_images_per_prompt, 0)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Clean latents z_0 (B, C, h, w), float32, of images (B, 3, H, W) in [0, 1]: the posterior mean, scaled."""
        with self._step_turn():
            return self._models().autoencoder.encode(images)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) in [0, 1], float32, of clean latents (B, C, h, w)."""
        with self._step_turn():
            return self._models().autoencoder.decode(latents)

    def predict_noise(
        self,
        latents: torch.Tensor,
        timestep: int,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
    ) -> torch.Tensor:
        """The UNet's noise, also where it predicts v; with negative embeddings it is guided by `guidance_scale`.

        Args:
            latents: The noisy latents, (B, C, h, w).
            timestep: The trained timestep to ask at.
            prompt_embeds: The text embeddings, (B, L, D).
            negative_prompt_embeds: The text embeddings that guidance leads away from, (B, L, D); None for no guidance.
            cross_attention_kwargs: Keyword arguments for the attention processors.

        Returns:
            ε, (B, C, h, w), float32.
        """
        with self._step_turn():
            denoiser = self._models(cross_attention_kwargs).denoiser
            denoiser.guidance_scale = self.guidance_scale
            with denoiser.with_lora(None, 1.0):  # which scales the user's adapters
                return denoiser.predict_noise(latents, timestep, prompt_embeds, negative_prompt_embeds)

    def place_frames(
        self,
        pair: PreparedPair,
        n_frames: int = 32,
        times: Sequence[float] | None = None,
        easing: str | Callable[[float], float] = "linear",
        importance: str = "agreement",
        motion: str = "rigid",
    ) -> tuple[float, ...]:
        """The δ of the frames asked for, each in (0, 1). For even spacing previews are looked at; no model runs.

        Args:
            pair: What `prepare` returned.
            n_frames: Number n of in-between frames.
            times: The δ of the frames, instead of `n_frames`.
            easing: How the frames are spread over time, as `__call__` takes it.
            importance: The name of the splat metric of the previews, as `__call__` takes it.
            motion: The way that things take in the previews, as `__call__` takes it.

        Raises:
            TypeError, ValueError: An argument is not what it may be.
        """
        video = VideoSettings(n_frames=n_frames, times=times, easing=easing)
        check_prepared(pair)
        _check_names(importance=importance, motion=motion)
        return place_frames(pair, video, importance, lambda: motion_paths(pair.flow, motion))

    def preview(
        self, pair: PreparedPair, times: torch.Tensor, importance: str = "agreement", motion: str = "rigid"
    ) -> torch.Tensor:
        """What frames would be if nothing were redrawn: the pair's clean latents, warped and averaged. No model runs.

        Args:
            pair: What `prepare` returned.
            times: The δ of each frame, (F,), in [0, 1].
            importance: The name of the splat metric, as `__call__` takes it.
            motion: The way that things take, as `__call__` takes it.

        Returns:
            Clean latents (F, C, h, w), for `decode_latents`; at 0 and 1 those of the two photos.

        Raises:
            TypeError, ValueError: An argument is not what it may be.
        """
        check_prepared(pair)
        _check_names(importance=importance, motion=motion)
        _check_times(times)
        return preview_pair(pair, times, importance, motion_paths(pair.flow, motion))

    def fuse(
        self,
        pair: PreparedPair,
        times: torch.Tensor,
        fusion: str = "two_level",
        importance: str = "agreement",
        motion: str = "rigid",
        predict_noise: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    ) -> FusedFrames:
        """Fuse the pair at step T for every δ. Source: DreamMover §3.3.

        Args:
            pair: What `prepare` returned.
            times: The δ of each frame, (F,), in [0, 1].
            fusion: How the pair is fused, as `__call__` takes it.
            importance: The name of the splat metric, as `__call__` takes it.
            motion: The way that things take, as `__call__` takes it.
            predict_noise: Function from latents (F, C, h, w) and a timestep to their noise ε; only
                "two_level_unwarped" asks it.

        Returns:
            The frames' latents z^δ_T and the levels they are made of.

        Raises:
            TypeError, ValueError: An argument is not what it may be.
        """
        check_prepared(pair)
        _check_names(fusion=fusion, importance=importance, motion=motion)
        _check_times(times)
        if fusion == "two_level_unwarped" and predict_noise is None:
            raise ValueError('`fusion` "two_level_unwarped" needs `predict_noise`, which is None')
        return fuse_pair(pair, times, fusion, importance, motion_paths(pair.flow, motion), predict_noise)

    def run_safety_checker(self, image: torch.Tensor) -> tuple[torch.Tensor, list[bool] | None]:
        """Black out what the safety checker flags, if there is one.

        Args:
            image: The pictures to check, (B, 3, H, W) in [0, 1], or uint8.

        Returns:
            The images, and which were flagged; None without a safety checker.
        """
        if self.safety_checker is None:
            return image, None
        pictures = [picture for frame in image.split(1) for picture in as_output(frame, "pil")]
        device, dtype = self._execution_device, self.safety_checker.dtype
        clip_input = self.feature_extractor(pictures, return_tensors="pt").pixel_values.to(device, dtype)
        with interruptible():
            return self.safety_checker(images=image, clip_input=clip_input)

    def fingerprint(self) -> str:
        """What decides the frames of given arguments, in short: all weights of UNet, VAE, text encoder, ControlNet and
        CLIP, the noise schedule, the scale of the latents, and FreeU where it is enabled.

        It is the same wherever the weights are held, offloaded or not, compiled or not, and in every precision that
        rounds none of them. A LoRA changes it while it acts: loaded and active, at its weight, or fused; loaded and
        disabled it does not. Every call reads every weight: seconds for Stable Diffusion 1.5 on one CPU core.

        Returns:
            64 hexadecimal digits.
        """
        with self._turn():
            return self._fingerprint(self._at_work)

    def pair_fingerprint(self) -> str:
        """What decides a prepared pair of given arguments, and the pair's LoRA: as `fingerprint`, but without
        ControlNet and CLIP, which act on frames only.

        Returns:
            64 hexadecimal digits, those of `fingerprint` if there is neither a ControlNet nor a CLIP.
        """
        with self._turn():
            return self._fingerprint(self._fingerprinted)

    def _fingerprint(self, models: dict[str, torch.nn.Module]) -> str:
        scale = None if self.vae is None else self.vae.config.scaling_factor
        blocks = () if self.unet is None else self.unet.up_blocks
        freeu = [getattr(block, name, None) for block in blocks for name in ("s1", "s2", "b1", "b2")]
        enabled = [freeu] if any(freeu) else []  # so that fingerprints without it are those of earlier versions
        settings = json.dumps([schedule_settings(self.scheduler), scale, *enabled], default=list)
        with interruptible():
            weights = fingerprint(models)
        return hashlib.sha256(f"{weights} {settings}".encode()).hexdigest()

    def save_pair(self, pair: PreparedPair, path: str | os.PathLike) -> None:
        """Write a prepared pair to one safetensors file, whole or not at all, together with the models' fingerprints.

        The fingerprints are those of now: save before LoRAs are loaded, fused or unloaded.

        Args:
            pair: what `prepare` returned.
            path: the file to write, which is replaced if it exists.
        """
        check_prepared(pair)
        with self._turn(), interruptible():
            found = fingerprints(self._fingerprinted)
        write_pair(pair, path, found)

    def load_pair(self, path: str | os.PathLike) -> PreparedPair:
        """Read a pair that `save_pair` wrote, for `render` on this pipeline's device; frames come out the same.

        UNet and VAE must be those it was saved with. With another text encoder, which only negative prompts still
        need, it loads with a warning.

        Args:
            path: the file to read.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is cut off, damaged or of another kind, its format version is unknown, or the UNet or
                the VAE are other ones.
        """
        pair, saved = read_pair(path, self._execution_device)
        with self._turn(), interruptible():
            found = fingerprints(self._fingerprinted)
        check_same_models(path, saved, found)
        if pair.lora is not None:
            try:
                check_pair_lora(self.unet, pair.lora)
            except (TypeError, ValueError) as error:
                raise ValueError(f"'{path}' is damaged: {error}") from error
        return pair.in_precision(self.unet.dtype)

    def _turn(self) -> Turn:
        """A turn for a whole call, which is refused inside another one."""
        return Turn(self._at_work.values(), self.unet)

    def _step_turn(self) -> Turn:
        """A turn for a single step, which a step callback may take too."""
        return Turn(self._at_work.values())

    @property
    def _fingerprinted(self) -> dict[str, torch.nn.Module]:
        models = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        return {name: model for name, model in models.items() if model is not None}

    @property
    def _at_work(self) -> dict[str, torch.nn.Module]:
        """All models that make frames; a prepared pair does not depend on ControlNet and CLIP."""
        others = {"controlnet": self.controlnet, "clip": self.clip}
        return self._fingerprinted | {name: model for name, model in others.items() if model is not None}


def _check_names(**given: str) -> None:
    """Raise ValueError unless each is a name that `DreamMoverPipeline.__call__` takes for that argument."""
    for name, value in given.items():
        arguments()[name].values.check(name, value)


def _check_times(times: object) -> None:
    """Raise TypeError or ValueError unless `times` is a tensor (F,) of numbers in [0, 1]."""
    if not isinstance(times, torch.Tensor) or times.ndim != 1:
        raise TypeError(f"`times` must be a tensor (F,), not {times!r}")
    if not ((times >= 0) & (times <= 1)).all():
        raise ValueError(f"`times` must lie in [0, 1], not {times.tolist()}")
