# SPDX-License-Identifier: Apache-2.0
"""What the networks learn from, and which of them is kept."""

from dreammover_pipeline.tiny import stages, validation


def test_correspondence_decides_only_among_networks_of_low_noise_error():
    def row(error, share):
        return {f"eps_mse_{t}": error for t in validation.NOISE_STEPS} | {"recast_up1_pck.1": share}

    history, kept = [], None
    for new, is_kept in (
        (row(1.00, 50), True),
        (row(0.50, 40), True),  # the one kept is far above the lowest error now
        (row(0.49, 30), False),
        (row(0.52, 45), True),  # within a tenth
        (row(0.60, 90), False),  # not within
    ):
        history.append(new)
        assert stages.UnetStage.better(new, kept, history) == is_kept
        kept = new if is_kept else kept
