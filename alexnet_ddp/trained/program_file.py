"""Program files: .pt2, of torch.export, looked through before torch opens them.

torch.export.load unpickles without limits what it finds in some places of such a file (torch 2.14: torch/export/
pt2_archive/_package.py, _load_state_dict and _load_constants; _export/serde/serialize.py, deserialize_torch_artifact),
and unpickling runs code. A plain net has nothing there but tensors.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from alexnet_ddp.errors import UserError

CODE = ("custom_obj_", "opaque_obj_", "serialized_")  # objects, and the layout of torch 2.7, which was pickled whole
CONFIGS = {"_weights_config.json": "data/weights/", "_constants_config.json": "data/constants/"}  # where theirs lie


def refuse_code(path: Path) -> None:
    """Raises UserError where opening the file could run code from it, and where it isn't whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_names(path, archive.namelist())
        # torch.export.load has this reader, and the other one where this one fails; it asks for names without case.
        reader = torch._C.PyTorchFileReader(str(path))
        _refuse_names(path, reader.get_all_records())
        _refuse_pickles(path, reader)
    except UserError:
        raise
    except Exception as error:  # torn archives raise what they like
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise UserError(f"{path} is no whole program of torch.export: {why}.") from None


def _refuse_names(path: Path, names: Sequence[str]) -> None:
    folded = [name.casefold().replace("\\", "/") for name in names]
    if len(set(folded)) < len(folded):
        raise UserError(f"{path} holds a file twice, and readers may differ in which one they take.")
    for name in folded:
        parts = name.split("/")
        if any(part.startswith(CODE) or part == "aotinductor" for part in parts):
            raise UserError(_code(path, parts[-1]))


def _code(path: Path, what: str) -> str:
    return (f"{path} holds more than a graph and tensors ({what}), which only running code from the file could bring "
            "back. Open only what you trust; export the net anew with alexnet-ddp export.")


def _refuse_pickles(path: Path, reader: Any) -> None:
    """Whatever would be unpickled without limits is unpickled here with them: tensors, and nothing else."""
    pickles = []
    for name in reader.get_all_records():
        if "/sample_inputs/" in f"/{name.casefold()}" or name.casefold().endswith(".pt"):
            pickles.append(name)
        for folder in (folder for ending, folder in CONFIGS.items() if name.casefold().endswith(ending)):
            for entry in json.loads(reader.get_record(name))["config"].values():
                if entry["path_name"].startswith(CODE):
                    raise UserError(_code(path, entry["path_name"]))
                if entry.get("use_pickle"):
                    pickles.append(os.path.join(folder, entry["path_name"]))
    if any("/weights/" in f"/{name.casefold()}" for name in pickles):  # of int8 nets: tensors of torchao's own classes
        from alexnet_ddp.trained import quantization

        quantization.load_torchao()
    for name in pickles:
        if not (data := reader.get_record(name)):
            continue
        try:
            torch.load(BytesIO(data), map_location="cpu", weights_only=True)
        except Exception:  # a word of the pickle that isn't allowed, or no pickle at all
            raise UserError(_code(path, name)) from None
