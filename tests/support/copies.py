# SPDX-License-Identifier: Apache-2.0
"""Copies of small models, of which every test gets its own."""

import copy

import torch

PLAIN = (bool, int, float, str, type(None), tuple)


def copied_model(model: torch.nn.Module) -> torch.nn.Module:
    """What `copy.deepcopy` makes of a model of which no part occurs twice, in a fifth of the time."""
    new = type(model).__new__(type(model))
    for name, value in vars(model).items():
        new.__dict__[name] = _copied(name, value)
    return new


def _copied(name: str, value: object) -> object:
    """A copy of what a module has as an attribute."""
    if name in ("_modules", "_parameters"):
        copied = copied_model if name == "_modules" else _parameter
        return {key: None if part is None else copied(part) for key, part in value.items()}
    if isinstance(value, dict) and not value:
        return type(value)()
    return value if isinstance(value, PLAIN) else copy.deepcopy(value)


def _parameter(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
