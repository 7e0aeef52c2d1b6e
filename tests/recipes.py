"""Ways to move weights, by what makes them differ: rows of the tests of exact resume and of world-size freedom.

The quick tests take `COVERING`, whose two rows hold something of everything; the drills take all.
"""

from __future__ import annotations

from typing import Any

# Changes of harness.tiny_recipe by dotted key. Some of what follows from the step alone would hide an error in another.
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"schedule__name": "constant"},
    "step": {"schedule__name": "step", "schedule__step_epochs": 0.7},
    "multistep": {"schedule__name": "multistep", "schedule__milestones": [0.9, 1.5], "schedule__gamma": 0.5},
    "exponential": {"schedule__name": "exponential", "schedule__gamma": 0.6},
    "cosine": {"schedule__name": "cosine", "schedule__eta_min": 0.001},
    "polynomial": {"schedule__name": "polynomial", "schedule__power": 2.0},
    "one_cycle": {"schedule__name": "one_cycle"},
}
ADAMW: dict[str, Any] = {"optim__name": "adamw", "optim__lr": 0.002, "optim__weight_decay": 0.05}
WAYS: dict[str, dict[str, Any]] = {
    "without momentum": {"optim__momentum": 0.0},
    "nesterov": {"optim__nesterov": True},
    "decay on weights": {"optim__decay_on": "weights", "optim__weight_decay": 0.05},
    "adamw": ADAMW,
    "adamw, decay on weights, fp16": {**ADAMW, "optim__decay_on": "weights", "amp": "fp16"},
    "smoothing": {"label_smoothing": 0.1},
    "mean": {"ema__decay": 0.9},
    "mean every 3 steps": {"ema__decay": 0.8, "ema__steps": 3},
    "mean, batch norm": {"ema__decay": 0.9, "model__name": "torchvision:resnet18", "model__width": 1.0,
                         "augment__size": 32, "micro_batch": 6, "global_batch": 12, "data__limit": 46},
}
COVERING: dict[str, dict[str, Any]] = {
    "adamw, mean, one_cycle, smoothing": {**ADAMW, **SCHEDULES["one_cycle"], "ema__decay": 0.9, "ema__steps": 2,
                                          "label_smoothing": 0.1},
    "nesterov, polynomial, decay on weights": {**WAYS["nesterov"], **WAYS["decay on weights"],
                                               **SCHEDULES["polynomial"]},
}
