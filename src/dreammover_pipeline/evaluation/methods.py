# SPDX-License-Identifier: Apache-2.0
"""The methods that are evaluated: ours, ours with one part exchanged or left out, and baselines on the same models.

Each method takes an `EvaluationCase` and returns frames, (F, 3, H, W) in [0, 1] on the CPU, and the flow that they
were made with, which is None for a method without flow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..arguments import taken
from ..fields import backward_warp, cell_grid, upsampled_flow
from ..framing import unfit
from ..fusion import agreement_importance, fuse_high_level, photometric_importance
from ..paths import MotionPaths, motion_paths
from ..poses import pose_pair
from ..records import BidirectionalFlow, PreparedPair
from ..settings import PREPARING, PRESETS, RENDERING, PrepareSettings
from ..tiny.skeletons import poses_of
from .case import UNREPORTED, EvaluationCase, Result
from .ceilings import true_flow, true_flow_straight, true_path, true_splat, true_visibility, vae_of_truth
from .diffmorpher import diffmorpher
from .networks import dis_flow
from .rife import load_rife
from .suites import Pair
from .weights import weights_file

FITTED_EMBEDDING_STEPS = 200  # steps of the fit of embeddings in the method "noise_embeddings"
GUIDANCE = 2.0  # guidance scale of the method "noise_embeddings"
CANDIDATES_RANKED = 4  # number of candidates for a frame in the method "noise_candidates"


def ours(case: EvaluationCase) -> Result:
    """The pipeline with the settings of the case."""
    return case.render(case.prepared())


def paper(case: EvaluationCase) -> Result:
    """Ours as the paper has it: with every setting of the preset "paper"."""
    settings = PRESETS["paper"]
    return case.render(case.prepared(**taken(settings, *PREPARING)), **taken(settings, *RENDERING))


def no_penalty(case: EvaluationCase) -> Result:
    """Ours without the penalty that prefers near matches."""
    return case.render(case.prepared(distance_penalty=0))


def no_rest(case: EvaluationCase) -> Result:
    """Ours with no place taken to rest because it looks as well like itself."""
    return case.render(case.prepared(rest_tolerance=0))


def no_refinement(case: EvaluationCase) -> Result:
    """Ours with the flow of features alone, not refined on the photos."""
    return case.render(case.prepared(flow="features"))


def upsampled(case: EvaluationCase) -> Result:
    """Ours without the detail of the photos: the frames that diffusion makes, enlarged."""
    return case.render(case.prepared(), detail="upsampled")


def refined_by_diffusion(case: EvaluationCase) -> Result:
    """Ours, and what does not come from the photos gone over with the UNet at the frames' size."""
    return case.render(case.prepared(), detail="diffusion")


def no_hold(case: EvaluationCase) -> Result:
    """Ours without holding the layout while noise is high."""
    return case.render(case.prepared(), layout_hold=0)


def mean_flow(case: EvaluationCase) -> Result:
    """Ours with the flow smoothed by means of vectors, three times, instead of fitted similarities and refined."""
    return case.render(case.prepared(flow="features", flow_fit="mean", flow_smoothing=3))


def straight(case: EvaluationCase) -> Result:
    """Ours along straight paths, as in the paper, instead of rigid ones."""
    return case.render(case.prepared(), motion="straight")


def no_smoothing(case: EvaluationCase) -> Result:
    """Ours with the bare argmax: the flow is neither smoothed nor refined on the photos."""
    return case.render(case.prepared(flow="features", flow_smoothing=0))


def photometric(case: EvaluationCase) -> Result:
    """Ours with importance by brightness constancy instead of agreement of the flows."""
    return case.render(case.prepared(), importance="photometric")


def one_block(case: EvaluationCase) -> Result:
    """Ours with the features of the paper's up block alone."""
    return case.render(case.prepared(feature_block=1))


def shallow(case: EvaluationCase) -> Result:
    """Ours with a third of the inversion steps."""
    steps, step = (case.setting(name) for name in ("inversion_steps", "feature_step"))
    steps = max(1, steps // 3)
    return case.render(case.prepared(inversion_steps=steps, feature_step=min(step, steps)))


def dis(case: EvaluationCase) -> Result:
    """Ours with OpenCV's DIS flow between the two images instead of the matched flow."""
    first, last = case.working_images
    return case.render(case.with_flow(dis_flow(first, last), dis_flow(last, first)))


def direct(case: EvaluationCase) -> Result:
    """Ours with the noisy latents splatted and averaged as they are, without two levels."""
    return case.render(case.prepared(), fusion="direct")


def released_fusion(case: EvaluationCase) -> Result:
    """Ours with noise selected as the authors' released code selects it, without warping."""
    return case.render(case.prepared(), fusion="two_level_unwarped")


def no_attention(case: EvaluationCase) -> Result:
    """Ours without reference attention."""
    return case.render(case.prepared(), attention_blocks=())


def no_lora(case: EvaluationCase) -> Result:
    """Ours without a LoRA, neither in the inversion nor in the rendering."""
    return case.render(case.prepared(lora_steps=0))


def crossfade(case: EvaluationCase) -> Result:
    """A weighted mean of the two images, without any model."""
    delta = case.times.reshape(-1, 1, 1, 1)
    return torch.lerp(case.ends[0], case.ends[1], delta), None


def dis_warp(case: EvaluationCase) -> Result:
    """The two images warped along OpenCV's DIS flow and blended by time, without any model.

    frame(p) = (1 − δ) · first(p + δ B(p)) + δ · last(p + (1 − δ) F(p)), where F is the flow from the first image to
    the last and B the flow back, as if at δ the flow at a pixel were that of the images there. What lies beyond an
    image is its edge.
    """
    first, last = case.ends
    there, back = dis_flow(first, last), dis_flow(last, first)
    return torch.stack(
        [torch.lerp(_looked_up(first, t * back), _looked_up(last, (1 - t) * there), t) for t in case.pair.times]
    ), None


def rife(case: EvaluationCase) -> Result:
    """RIFE, a network trained to interpolate the frames of videos."""
    interpolate = load_rife(str(case.pipe._execution_device))
    return torch.stack([interpolate(*case.ends, time) for time in case.pair.times]), None


def latent_splat(case: EvaluationCase) -> Result:
    """The clean latents of the two images splatted, averaged and decoded, without diffusion."""
    pair = case.prepared()
    frames = case.pipe.preview(pair, case.times, case.importance, case.setting("motion"))
    return case.decode(frames), pair.flow


def pixel_splat(case: EvaluationCase) -> Result:
    """The pixels of the two images splatted and averaged, without a VAE and without diffusion.

    Pixels are in [−1, 1]; the paths of the matched flow, and where it is asked for its agreement, are upsampled
    bilinearly.
    """
    flow = case.prepared().flow
    paths = motion_paths(flow, case.setting("motion"))
    pixels = 2 * case.working_images - 1
    size = pixels.shape[-2:]
    if case.importance == "agreement":
        metric = F.interpolate(agreement_importance(flow).cpu(), size=size, mode="bilinear", align_corners=False)
    else:
        fine = BidirectionalFlow(*(upsampled_flow(part.cpu(), size) for part in (flow.forward, flow.backward)))
        metric = photometric_importance(pixels, fine)
    fine_paths = MotionPaths(lambda image, times: upsampled_flow(paths.displacements(image, times).cpu(), size))
    frames, _ = fuse_high_level(pixels, fine_paths, metric, case.times)
    return unfit((frames / 2 + 0.5).clamp(0, 1), case.canvas), flow


def noise(case: EvaluationCase) -> Result:
    """Wang and Golland's interpolation in noise, without flow, LoRA, fitted embeddings and the photos' detail."""
    return case.render(case.prepared(lora_steps=0), method="noise", detail="upsampled")[0], None


def noise_embeddings(case: EvaluationCase) -> Result:
    """Wang and Golland's interpolation in noise with embeddings that are fitted to the photos, and with guidance."""
    pair = case.prepared(lora_steps=0, embedding_steps=FITTED_EMBEDDING_STEPS)
    return case.render(pair, method="noise", detail="upsampled", guidance_scale=GUIDANCE)[0], None


def noise_poses(case: EvaluationCase) -> Result:
    """Wang and Golland's interpolation in noise, led by the true poses of both images through a ControlNet."""
    return case.render(_posed(case, case.prepared(lora_steps=0)), method="noise", detail="upsampled")[0], None


def noise_candidates(case: EvaluationCase) -> Result:
    """Wang and Golland's interpolation in noise, each frame the best of four by CLIP."""
    pair = case.prepared(lora_steps=0)
    return case.render(pair, method="noise", detail="upsampled", candidates=CANDIDATES_RANKED)[0], None


def poses(case: EvaluationCase) -> Result:
    """Ours, led by the true poses of both images through a ControlNet."""
    return case.render(_posed(case, case.prepared()))


def _posed(case: EvaluationCase, pair: PreparedPair) -> PreparedPair:
    """A prepared pair with the true poses of its scene."""
    ends = [poses_of(case.pair.motion, time)[0].tolist() for time in (0.0, 1.0)]
    sizes = [tuple(image.shape[-2:]) for image in case.pair.images]
    return replace(pair, poses=pose_pair(ends, sizes, case.canvas))


def noise_lora(case: EvaluationCase) -> Result:
    """Interpolation in noise with the pair's LoRA."""
    return case.render(case.prepared(), method="noise", detail="upsampled")[0], None


def morph(case: EvaluationCase) -> Result:
    """DiffMorpher's interpolation of everything, without flow, by one LoRA for each image."""
    settings = PrepareSettings.of(case.settings)
    images, prompt = case.working_images, case.pair.prompt
    return case.decode(diffmorpher(case.pipe, images, prompt, case.times, settings, case.seed, UNREPORTED)), None


@dataclass(frozen=True)
class Method:
    """A method of interpolation, and what it needs to know of a pair."""

    make: Callable[[EvaluationCase], Result]
    needs: str = ""  # "truth" or "motion" for a method that cannot do without that attribute of a pair
    weights: str = ""  # the name in `WEIGHTS` of weights that the method cannot do without
    component: str = ""  # the optional component of the pipeline that the method cannot do without

    @torch.no_grad()
    def __call__(self, case: EvaluationCase) -> Result:
        """The frames that the method makes of the case, and the flow that it used."""
        return self.make(case)

    def suits(self, pair: Pair) -> bool:
        """Whether the pair has what the method needs."""
        return not self.needs or getattr(pair, self.needs) is not None

    def require_weights(self) -> None:
        """Raise OSError if the method needs weights that are not there; the message says how to get them."""
        if self.weights:
            weights_file(self.weights)


METHODS = {
    "ours": Method(ours),
    "paper": Method(paper),
    "no_penalty": Method(no_penalty),
    "no_rest": Method(no_rest),
    "no_refinement": Method(no_refinement),
    "upsampled": Method(upsampled),
    "diffusion": Method(refined_by_diffusion),
    "no_hold": Method(no_hold),
    "no_smoothing": Method(no_smoothing),
    "mean_flow": Method(mean_flow),
    "straight": Method(straight),
    "photometric": Method(photometric),
    "one_block": Method(one_block),
    "shallow": Method(shallow),
    "true_flow": Method(true_flow, "motion"),
    "true_flow_straight": Method(true_flow_straight, "motion"),
    "true_path": Method(true_path, "motion"),
    "true_visibility": Method(true_visibility, "motion"),
    "dis_flow": Method(dis),
    "direct_fusion": Method(direct),
    "released_fusion": Method(released_fusion),
    "no_attention": Method(no_attention),
    "no_lora": Method(no_lora),
    "latent_splat": Method(latent_splat),
    "pixel_splat": Method(pixel_splat),
    "true_splat": Method(true_splat, "motion"),
    "noise": Method(noise),
    "noise_embeddings": Method(noise_embeddings),
    "noise_lora": Method(noise_lora),
    "noise_poses": Method(noise_poses, "motion", component="controlnet"),
    "noise_candidates": Method(noise_candidates, component="clip"),
    "poses": Method(poses, "motion", component="controlnet"),
    "diffmorpher": Method(morph),
    "crossfade": Method(crossfade),
    "dis_warp": Method(dis_warp),
    "rife": Method(rife, weights="rife"),
    "vae_of_truth": Method(vae_of_truth, "truth"),
}


def methods_left_out(components: Collection[str]) -> dict[str, str]:
    """The methods whose weights or components are not there, each with the reason.

    Args:
        components: Names of the optional components that the pipeline has.
    """
    found = {}
    for name, method in METHODS.items():
        if method.component and method.component not in components:
            found[name] = f"it needs --{method.component}"
        try:
            method.require_weights()
        except OSError as error:
            found[name] = str(error)
    return found


def _looked_up(image: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """An image (3, H, W) looked up where a flow (1, 2, H, W) in pixels points; beyond the image that is its edge."""
    h, w = image.shape[-2:]
    grid = cell_grid(h, w, flow)
    target = torch.minimum((grid + flow).clamp(min=0), torch.tensor([w - 1, h - 1]).reshape(1, 2, 1, 1))
    return backward_warp(image[None], target - grid)[0]
