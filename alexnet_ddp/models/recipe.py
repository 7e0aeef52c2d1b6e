"""The net that a recipe asks for."""

from torch import nn

from alexnet_ddp import determinism
from alexnet_ddp.config import Config
from alexnet_ddp.models.recompute import recompute_blocks
from alexnet_ddp.models.zoo import OPTIONS, create_model


def create_for(config: Config, *, on_gpu: bool) -> nn.Module:
    """`create_model` with a recipe's options, on torch's default device; it is to train on a GPU or not.

    Raises UserError for what `create_model` refuses, for a net that has no blocks where memory.checkpoint=blocks, and
    for one that can't repeat its bits where deterministic=true.
    """
    model = config.model
    options = {option: getattr(model, option) for option in OPTIONS}
    net = create_model(model.name, image_size=config.augment.size, **options)
    determinism.check_layers(net, name=model.name, deterministic=config.deterministic, on_gpu=on_gpu)
    if config.memory.checkpoint == "blocks":
        recompute_blocks(net, name=model.name)
    return net
