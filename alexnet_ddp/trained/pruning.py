"""Nets whose least weights are zero, by torch.nn.utils.prune.

    sparse = prune(load_model("runs/alexnet_single"), amount=0.2)
    sparse.save(Path("sparse.safetensors"))          # init_from=sparse.safetensors sparsity=keep trains on

The zeros stand in ordinary tensors: they show what a net can do without, and save neither time nor space as they are.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from alexnet_ddp import config as recipes
from alexnet_ddp import dialect, tables
from alexnet_ddp.config import Config
from alexnet_ddp.errors import EXIT_FINISHED, EXIT_STOPPED, UserError
from alexnet_ddp.models import sparsity
from alexnet_ddp.models.fitting import last_layer
from alexnet_ddp.models.source import BEST, find
from alexnet_ddp.models.sparsity import Layer, Sparsity
from alexnet_ddp.models.weights import RECIPE, read_weights
from alexnet_ddp.trained.graph import refuse_graph
from alexnet_ddp.trained.model import Model, load_model

# weights   the smallest of all weights of all convolutions and linear layers, ranked together by magnitude
#           (Han et al. 2015, Learning both Weights and Connections; one threshold for the whole net)
# channels  in each layer the output channels whose weights have the smallest sum of magnitudes (Li et al. 2017, Pruning
#           Filters for Efficient ConvNets, section 3.1); not in the last one, whose outputs are the classes
Structure = Literal["weights", "channels"]


def prune(model: Model, *, amount: float, structure: Structure = "weights") -> Model:
    """A copy of the model in which this share of the weights, or of each layer's channels, is zero; the model stays.

    A channel's bias stays too: with its weights at zero it gives out a constant. Raises UserError for a share that
    isn't between 0 and 1, for one that leaves a layer no channel, and for a quantized or an exported net.
    """
    check_amount(amount)
    if model.quantization is not None:
        raise UserError(f"{model.where} is quantized ({model.quantization['scheme']}): prune the net that it was made "
                        "from, and quantize the result.")
    refuse_graph(model.net, where=model.where, done="pruned")
    net = copy.deepcopy(model.net).to(memory_format=torch.contiguous_format)  # torch's masks are views of one row
    named = dict(sparsity.layers(net))
    if not named:
        raise UserError(f"{model.name} has neither convolutions nor linear layers, and nothing else is pruned.")
    if structure == "weights":
        torch_prune.global_unstructured([(module, "weight") for module in named.values()],
                                        pruning_method=torch_prune.L1Unstructured, amount=amount)
    else:
        _prune_channels(net, named, amount=amount)
    for module in named.values():
        if torch_prune.is_pruned(module):
            torch_prune.remove(module, "weight")  # its mask goes, the zeros stay
    net = net.to(memory_format=torch.channels_last)
    share = sparsity.overall(sparsity.sparsity(net)).share
    facts = {"step": model.facts.get("step"), "top1": None, "model": model.name, "made_from": model.facts,
             "pruning": {"amount": amount, "structure": structure, "sparsity": share}}
    return replace(model, net=net, facts=facts, notes=[], where=f"{model.where}, pruned by {amount:g}")


def check_amount(amount: float) -> None:
    """Raises UserError unless it is a share between 0 and 1."""
    if not 0 < amount < 1:  # neither is nan
        raise UserError(f"--amount is the share of weights (with --structured of channels) that become zero, between 0 "
                        f"and 1, got {amount:g}. Example: --amount 0.2")


def _prune_channels(net: nn.Module, named: dict[str, Layer], *, amount: float) -> None:
    last = last_layer(net)[0].rpartition(".")[0]
    for name, module in named.items():
        if name == last:
            continue
        channels = module.weight.shape[0]
        if round(amount * channels) == channels:
            raise UserError(f"--amount {amount:g} would leave none of the {channels} channels of {name}. Prune less.")
        torch_prune.ln_structured(module, "weight", amount=amount, n=1, dim=0)


# --- training on ------------------------------------------------------------------------------------------------


def tuning(path: str, overrides: Sequence[str]) -> Config:
    """The recipe by which a pruned net is trained on: of its own name, beginning with RUNS/NAME-start.safetensors.

    Raises UserError for a recipe that doesn't hold, or that sets what pruning sets.
    """
    given = {".".join(recipes.parse_override(text)[0]) for text in overrides}
    if mine := sorted(given & {"init_from", "sparsity"}):
        raise UserError(f"{', '.join(mine)}: prune --finetune sets that itself. Leave it out.")
    tree = recipes.apply_overrides(dialect.read_yaml(path), overrides)
    if "name" not in given:
        tree["name"] = f"{tree.get('name') or Path(path).stem}-pruned"
    start = Path(str(tree.get("runs", "runs"))) / f"{tree['name']}-start.safetensors"
    config = recipes.build({**tree, "init_from": str(start), "sparsity": "keep"})
    there = config.run_dir / RECIPE
    if there.is_file() and dialect.read_yaml(there).get("init_from") != str(start):
        raise UserError(f"{config.run_dir} is a run that did not begin with a net pruned by --finetune. Give the one "
                        f"that trains the pruned net on a name of its own: name={config.name}_2")
    return config


def tune(model: Model, path: str, overrides: Sequence[str], *, flags: Sequence[str] = ()) -> tuple[int, Model | None]:
    """Trains the pruned net on, in processes of its own, to the end or a stop; the same call goes on.

    Returns the exit code and, where it is 0, the trained net (of the run's best weights). `flags` are `train`'s. Raises
    UserError, also where another net was begun with under that name.
    """
    from alexnet_ddp.seeds import Queue

    config = tuning(path, overrides)
    assert config.init_from is not None
    start = Path(config.init_from)
    if start.is_file():
        there, mine = read_weights(str(start)).tensors, model.tensors()
        if there.keys() != mine.keys() or any(not torch.equal(there[name], mine[name].cpu()) for name in mine):
            raise UserError(f"{start} holds another net than this pruning gives: the run {config.name} began with it. "
                            f"Give this one a name of its own: name={config.name}_2")
    else:
        start.parent.mkdir(parents=True, exist_ok=True)
        model.save(start)
    words = [_override("name", config.name), _override("init_from", str(start)), "sparsity=keep"]
    queue = Queue().install()
    try:
        code = queue.run(["train", path, *overrides, *words, *flags])
    finally:
        queue.restore()
    if code or queue.signal:  # one that came as training ended stops what comes after it
        return code or EXIT_STOPPED, None
    run = config.run_dir
    tuned = load_model(str(run) if (run / BEST).is_file() else f"{run}@last", device=model.device)
    tuned.facts["pruning"] = {**model.facts["pruning"],
                              "sparsity": sparsity.overall(sparsity.sparsity(tuned.net)).share}
    return code, tuned


def _override(key: str, value: str | None) -> str:
    """key=value that is read as this text, were it `2012` or `a #b`: JSON's strings are YAML's too. Pure."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


# --- the command ------------------------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    """`alexnet-ddp prune`. Raises UserError."""
    from alexnet_ddp.trained import command, packed_weights, shrinkage

    parser = command.parser("prune", "A net whose least weights are zero: its accuracy on data.val, size and latency "
                            "beside those of the net as it is, and after training on.",
                            overrides="as in a recipe, such as data.val=/data/val; with --finetune of CONFIG")
    parser.add_argument("--amount", type=float, required=True, metavar="SHARE", help="between 0 and 1, such as 0.2")
    parser.add_argument("--structured", action="store_true", help="whole output channels of each layer, the last one "
                        "left out, instead of single weights")
    parser.add_argument("--finetune", metavar="CONFIG", help="train the pruned net on by this recipe, its zeros kept")
    parser.add_argument("--nproc-per-node", "--nproc_per_node", metavar="N|auto", help="--finetune: on N ranks")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the result: a .safetensors file, a MODEL of "
                        "its own")
    shrinkage.add_seconds(parser)
    options = parser.parse_intermixed_args(words)
    check_amount(options.amount)
    device = shrinkage.one_process("prune", options.device)
    if options.out is not None:
        packed_weights.check_path(options.out)
    if options.nproc_per_node is not None and options.finetune is None:
        raise UserError("--nproc-per-node goes with --finetune: the rest takes one process.")
    overrides = list(options.overrides)
    if options.finetune is not None:  # of CONFIG are how it is trained on, and on what
        config = tuning(options.finetune, overrides)
        bare = find(options.model).kind in ("safetensors", "pickle") and read_weights(options.model).recipe is None
        told = ("model.", "data.val=", *(("augment.", "evaluate.") if bare else ()))  # nobody else says how it sees
        overrides = [text for text in overrides if text.startswith(told)]
        if not any(text.startswith("data.val=") for text in overrides):
            overrides.append(_override("data.val", config.data.val))
    model = load_model(options.model, overrides, device=device)
    shrinkage.check_held_out(model)  # with --finetune hours before it is needed
    result = prune(model, amount=options.amount, structure="channels" if options.structured else "weights")
    print(f"{model.where}: {'channels' if options.structured else 'weights'} pruned by {options.amount:g}", flush=True)
    command.tell_notes(model.notes)
    models = [("as it is", model), ("pruned", result)]
    if options.finetune is not None:
        flags = [] if options.nproc_per_node is None else ["--nproc-per-node", options.nproc_per_node]
        code, tuned = tune(result, options.finetune, options.overrides, flags=flags)
        if tuned is None:
            if code == EXIT_STOPPED:
                print("alexnet-ddp: stopped; the same command goes on from there", file=sys.stderr, flush=True)
            return code
        models.append(("trained on", tuned))
        result = tuned
    measured = shrinkage.measure(models, seconds=options.seconds)
    if (after := measured[-1].evaluation) is not None:
        result.facts["top1"] = after.top1
    print("\n".join(["", shrinkage.table(measured), "", *shrinkage.conditions(measured, models), "",
                     sparsity_table(sparsity.sparsity(result.net)), "",
                     "zeros stand in ordinary tensors: by themselves they save neither time nor space"]))
    shrinkage.keep(result, options.out)
    return EXIT_FINISHED


def sparsity_table(found: list[Sparsity]) -> str:
    """Markdown: zeros among the weights, by layer and of all. Pure."""
    rows = [["layer", "weights", "zero", "%"]]
    rows += [[each.name, f"{each.weights:,}", f"{each.zeros:,}", f"{each.share:.2%}".rstrip("%")]
             for each in [*found, sparsity.overall(found)]]
    return tables.markdown(rows)
