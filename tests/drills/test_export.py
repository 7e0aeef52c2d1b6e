"""Drill: every AlexNet at its full width, and a net of torchvision's, keep their logits in every format.

About three minutes and 4 GB of memory.
"""

from pathlib import Path

import pytest
import torch

from alexnet_ddp import load_model
from alexnet_ddp.models import create_model
from alexnet_ddp.trained.export import SUFFIXES, Format, export
from alexnet_ddp.trained.exported import Precision

pytestmark = pytest.mark.drill

OURS = ("alexnet_single", "alexnet_paper", "alexnet_bn", "alexnet_torchvision")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("form", list(SUFFIXES))
@pytest.mark.parametrize("name", [*OURS, "torchvision:resnet18"])
def test_full_width(name: str, form: Format, precision: Precision, tmp_path: Path) -> None:
    """fp32 below 1e-4, fp16 below 1e-2 of the largest logit, at batch 1, 2 and 7 and image size 224."""
    if name in OURS:
        model = load_model(name)
    else:  # its weights from a file: torchvision's own would come from the network
        torch.manual_seed(0)
        torch.save(create_model(name).state_dict(), tmp_path / "weights.pth")
        model = load_model(tmp_path / "weights.pth", [f"model.name={name}"])
    done = export(model, tmp_path / f"net{SUFFIXES[form]}", format=form, precision=precision, batch=None)
    print(f"{name} {form} {precision}: {done.bytes / 1e6:.1f} MB, {done.parity}")
    assert done.parity.difference < (1e-4 if precision == "fp32" else 1e-2 * max(1.0, done.parity.largest))
    done.path.unlink()  # a quarter of a gigabyte
