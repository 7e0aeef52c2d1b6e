"""The nets: four AlexNets of our own and every classifier of torchvision, by name."""

from alexnet_ddp.models.zoo import create_model

__all__ = ["create_model"]
