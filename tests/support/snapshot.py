# SPDX-License-Identifier: Apache-2.0
"""Everything about a UNet that a call must leave as it was."""

import torch


def snapshot(unet: torch.nn.Module) -> dict:
    """Modules, hooks, processors, adapters, flags and weights, in a form two of which can be compared by `==`."""
    state = {}
    for name, module in unet.named_modules():
        state[name] = {
            "class": type(module),
            "id": id(module),
            "training": module.training,
            "hooks": [
                list(getattr(module, kind).values())
                for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            ],
            "processor": id(getattr(module, "processor", None)),
            "checkpointing": getattr(module, "gradient_checkpointing", None),
            "adapters": [
                getattr(module, attribute, None)
                for attribute in ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
            ],
        }
    for name, parameter in unet.named_parameters():
        state[f"{name} (parameter)"] = {
            "requires_grad": parameter.requires_grad,
            "dtype": parameter.dtype,
            "grad": parameter.grad,
            "bits": parameter.detach().clone().flatten().view(torch.uint8).tolist()
            if parameter.numel() < 5000
            else float(parameter.detach().double().sum()),
        }
    adapters = sorted(unet.peft_config) if hasattr(unet, "peft_config") else None
    return state | {"peft": adapters, "has_peft": bool(unet._hf_peft_config_loaded)}
