"""What only a GPU can show; run by `make gpu`, skipped elsewhere. Everything goes through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import harness
from alexnet_ddp.data import raw
from alexnet_ddp.data.decoding import views
from alexnet_ddp.data.loader import Slot, SlotPool
from alexnet_ddp.data.randomness import CROP_DRAWS, key, uniform
from alexnet_ddp.determinism import raising_layers
from alexnet_ddp.models import create_model
from alexnet_ddp.models.dropout import dropout_mask
from alexnet_ddp.models.lrn import local_response_norm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

VISIBLE = {"CUDA_VISIBLE_DEVICES": "0"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    harness.make_images(folder / "train", samples=64)
    harness.make_images(folder / "val", samples=40, seed=1)
    return folder


def train(folder: Path, pictures: Path, name: str, *words: str) -> harness.Result:
    recipe = harness.tiny_recipe(folder, train=pictures / "train", val=pictures / "val", device="cuda", amp="bf16",
                                 deterministic=True, model__width=0.25)
    return harness.run(["train", str(recipe), f"name={name}", *words], world=1, environment=VISIBLE)


def test_deterministic_resume_is_bit_equal(tmp_path: Path, pictures: Path) -> None:
    """On CUDA with deterministic=true a run killed after a step ends in the bits of one that never was."""
    train(tmp_path, pictures, "whole").check()
    for step in (1, 4, 7):
        name = f"killed{step}"
        killed = train(tmp_path, pictures, name, "fault.kind=kill", f"fault.step={step}")
        assert killed.codes == [-9], killed.output
        train(tmp_path, pictures, name).check()
        assert harness.final_files(tmp_path / "runs" / name) == harness.final_files(tmp_path / "runs/whole")
        assert harness.metrics(tmp_path / "runs" / name) == harness.metrics(tmp_path / "runs/whole")


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_precisions_train(tmp_path: Path, pictures: Path, amp: str) -> None:
    """Each precision trains on CUDA to a finite loss without a skipped update (fp16's scaler may skip its first)."""
    train(tmp_path, pictures, amp, f"amp={amp}").check()
    last = [record for record in harness.metrics(tmp_path / "runs" / amp) if record["kind"] == "train"][-1]
    assert np.isfinite(last["loss"]) and (amp == "fp16" or last["skipped"] == 0)


def test_step_never_waits_for_the_device(tmp_path: Path, pictures: Path) -> None:
    """Between two logging steps the host makes no synchronising call: torch's sync debug mode would raise."""
    result = train(tmp_path, pictures, "nosync", "log.sync_debug=true", "log.steps=4")
    result.check()
    assert json.loads((tmp_path / "runs/nosync/state.json").read_text())["status"] == "finished"


def test_adamw_and_the_mean_of_the_weights(tmp_path: Path, pictures: Path) -> None:
    """AdamW's and the mean's update never wait for the device, and a killed run of theirs ends in the same bits."""
    words = ["log.sync_debug=true", "optim.name=adamw", "optim.lr=0.002", "optim.decay_on=weights", "ema.decay=0.9"]
    train(tmp_path, pictures, "whole", *words).check()
    assert train(tmp_path, pictures, "killed", *words, "fault.kind=kill", "fault.step=4").codes == [-9]
    train(tmp_path, pictures, "killed", *words).check()
    assert harness.final_files(tmp_path / "runs/killed") == harness.final_files(tmp_path / "runs/whole")


@pytest.mark.parametrize("policy", ["randaugment", "trivial"])
@pytest.mark.parametrize("channels", [1, 3])
def test_no_augmentation_waits_for_the_device(tmp_path: Path, pictures: Path, policy: str, channels: int) -> None:
    """Nor does any operation of a policy, erasing, mixup or CutMix, under deterministic algorithms; and a run that is
    killed on the way ends in the bits of one that never was."""
    words = ["log.sync_debug=true", f"augment.policy={policy}", "augment.erasing=0.5", "augment.mixup=0.4",
             "augment.cutmix=1", f"model.in_channels={channels}", "epochs=3"]
    train(tmp_path, pictures, "whole", *words).check()
    assert train(tmp_path, pictures, "killed", *words, "fault.kind=kill", "fault.step=4").codes == [-9]
    train(tmp_path, pictures, "killed", *words).check()
    assert harness.final_files(tmp_path / "runs/killed") == harness.final_files(tmp_path / "runs/whole")


@pytest.mark.parametrize("policy", ["randaugment", "trivial"])
def test_a_policy_s_pixels_don_t_depend_on_the_batch(policy: str) -> None:
    """On CUDA, too, an image comes out of a policy with the same bits alone and in a batch, and nearly always with the
    CPU's: all but one pixel in a thousand, which lie half-way between two."""
    from alexnet_ddp.data.policy import Policy
    from alexnet_ddp.data.randomness import draw
    from alexnet_ddp.sections import AugmentSection

    section = AugmentSection(policy=policy, size=224)  # type: ignore[arg-type]
    draws = draw(np.arange(96), seed=0, epoch=0, flip=0.0, rotation=0.0, color_jitter=(0, 0, 0, 0), pca_lighting=0.0,
                 policy_ops=2).policy
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (96, 224, 224, 3), dtype=np.uint8))
    made = Policy(section, device=torch.device("cuda"))
    together = made(images.cuda(), draws)
    for row in range(0, 96, 5):
        assert torch.equal(made(images[row:row + 1].cuda(), draws[row:row + 1])[0], together[row])
    on_cpu = Policy(section, device=torch.device("cpu"))(images, draws)
    assert (together.cpu() != on_cpu).float().mean() < 1e-3


@pytest.mark.parametrize("crop", ["random", "random_resized"])
@pytest.mark.parametrize("channels", [1, 3])
def test_records_in_the_gpu_s_memory(tmp_path: Path, pictures: Path, crop: str, channels: int) -> None:
    """data.cache=gpu trains without a synchronising call, and ends in the bits of a run that sends every record."""
    words = ["data.stored=raw73", "data.assignment=owner", f"augment.crop={crop}", f"model.in_channels={channels}",
             "log.sync_debug=true"]
    train(tmp_path, pictures, "sent", *words).check()
    train(tmp_path, pictures, "kept", *words, "data.cache=gpu").check()
    assert harness.final_files(tmp_path / "runs/kept") == harness.final_files(tmp_path / "runs/sent")


def test_raw_views_are_the_cpu_s() -> None:
    """Raw records cropped and resized on CUDA show what the CPU shows: cuts to the bit, resized ones within 1/255."""
    random = np.random.default_rng(0)
    records = torch.from_numpy(random.integers(0, 256, (40, 96, 96, 3), dtype=np.uint8))
    draws = uniform(key(np.arange(40)), CROP_DRAWS)
    for most, shown in ((0, views.random_crop_all(96, 96, size=84, draws=draws)),
                        (1, views.random_resized_all(96, 96, size=84, draws=draws, scale=(0.08, 1.0),
                                                     ratio=(0.75, 4 / 3)))):
        for channels in (1, 3):
            cpu = raw.show(records, shown, size=84, channels=channels)
            cuda = raw.show(records.cuda(), shown, size=84, channels=channels)
            assert (cuda.cpu().int() - cpu.int()).abs().max() <= most


def test_dropout_masks_are_the_cpu_ones() -> None:
    """Keyed dropout gives the same mask on CUDA and on the CPU."""
    rows = torch.arange(1000, dtype=torch.int64) * 4_000_037 % 2**32
    for layer in (0, 1):
        there = dropout_mask(rows.cuda(), units=999, p=0.5, layer=layer).cpu()
        assert torch.equal(there, dropout_mask(rows, units=999, p=0.5, layer=layer))


def test_lrn_on_cuda_repeats_its_bits_and_agrees_with_the_cpu() -> None:
    """LRN's forward and backward on CUDA are deterministic, and equal to the CPU's to rounding."""
    results = []
    for device in ("cuda", "cuda", "cpu"):
        torch.manual_seed(0)
        x = torch.randn(4, 96, 13, 13).to(device).requires_grad_()
        y = local_response_norm(x)
        y.square().sum().backward()
        assert x.grad is not None
        results.append((y.detach().cpu(), x.grad.cpu()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][0], results[2][0])
    torch.testing.assert_close(results[0][1], results[2][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["alexnet_single", "alexnet_torchvision"])
def test_nets_run_under_deterministic_algorithms(name: str) -> None:
    """Forward and backward of our nets, full width, raise nothing under torch.use_deterministic_algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        net = create_model(name).cuda()
        net(torch.randn(2, 3, 224, 224, device="cuda")).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_slot_is_not_reused_before_its_copy() -> None:
    """Pinned slots handed back with their copy's event are only taken again after it: 200 rounds of real copies."""
    pool = SlotPool(2, rows=64, shape=(224, 224, 3), pin=True)
    arrived: list[tuple[int, torch.Tensor]] = []
    for turn in range(200):
        slot = pool.take()
        assert isinstance(slot, Slot)
        slot.images.fill_(turn)
        copy = slot.images.to("cuda", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        pool.give_back(slot, event)
        arrived.append((turn, copy.amin().float() + copy.amax().float()))
    assert all(float(total) == 2 * turn for turn, total in arrived)


@pytest.mark.parametrize("name", ["alexnet_paper", "alexnet_bn", "torchvision:squeezenet1_1"])
def test_recomputed_blocks_move_no_bit(tmp_path: Path, pictures: Path, name: str) -> None:
    """On CUDA too, deterministic, memory.checkpoint=blocks ends in the bits of the run that keeps its activations."""
    own = ["model.width=1.0"] if name.startswith("torchvision:") else []
    for kept in ("none", "blocks"):
        train(tmp_path, pictures, kept, f"model.name={name}", f"memory.checkpoint={kept}", *own).check()
    assert harness.final_files(tmp_path / "runs/none") == harness.final_files(tmp_path / "runs/blocks")


@pytest.mark.parametrize(("name", "raises"), [("torchvision:vgg11", True), ("torchvision:resnet18", False)])
def test_refused_nets_are_those_that_raise(name: str, raises: bool) -> None:
    """What determinism refuses raises in its backward on CUDA, and what it lets through doesn't."""
    net = create_model(name, num_classes=10).cuda()
    torch.use_deterministic_algorithms(True)
    try:
        loss = net(torch.randn(2, 3, 224, 224, device="cuda")).sum()
        if raises:
            with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
                loss.backward()
        else:
            loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(raising_layers(net)) is raises
