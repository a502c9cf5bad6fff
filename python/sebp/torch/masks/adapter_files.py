# SPDX-License-Identifier: Apache-2.0
"""Adapters as files: those of PEFT's SHiRA, with what PEFT does not save.

A folder holds ``adapter_model.safetensors`` and ``adapter_config.json``. For a layer NAME the
former has the tensors

- ``base_model.model.NAME.shira_weight``: float32, k, what is added to the base;
- ``base_model.model.NAME.shira_indices``: int32, 2 x k, rows and columns;
- ``base_model.model.NAME.sebp_values``: k, what the elements are then, bit for bit; not PEFT's,
  which passes it over.

Its header's entry "sebp" is a text of JSON with the shape of each weight and the digest of the
base's. PEFT's own files have neither.
"""

import importlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from .adapter_layer import AdapterLayer

_TENSORS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_PARTS = ("shira_weight", "shira_indices", "sebp_values")
_VERSION = 1
_MOST_ROWS = 2**31 - 1


def _safetensors() -> ModuleType:
    try:
        importlib.import_module("safetensors.torch")
        return importlib.import_module("safetensors")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "files of adapters need safetensors, which is not installed: pip install safetensors",
            name=error.name,
        ) from error


def _rank_of(layers: Mapping[str, AdapterLayer]) -> int:
    """Return the r of PEFT's SHiRA, which trains r (N + K) elements of each layer; 0 if none is."""
    ranks = set()
    for layer in layers.values():
        if not layer.is_linear or layer.shape is None:
            return 0
        count, unit = layer.delta.numel(), sum(layer.shape)
        ranks.add(count // unit if count % unit == 0 else 0)
    return ranks.pop() if len(ranks) == 1 else 0


def _config_of(layers: Mapping[str, AdapterLayer], mask: str, rank: int) -> dict[str, object]:
    """Return the contents of the file that tells how to load the other one."""
    if rank == 0:
        # A name that PEFT does not know, so that it says so.
        return {"peft_type": "SEBP_SPARSE_MASK", "mask_type": mask}
    names = "|".join(re.escape(name) for name in layers)
    return {
        "peft_type": "SHIRA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "mask_type": mask,
        "random_seed": None,
        "target_modules": f"(?:{names})",
        "fan_in_fan_out": False,
        "init_weights": True,
        "modules_to_save": None,
    }


def write_adapter(folder: str | os.PathLike, layers: Mapping[str, AdapterLayer], mask: str) -> bool:
    """Write an adapter's files, and make the folder where it is missing.

    Returns
    -------
    bool
        Whether PEFT can load them: where all layers are ``nn.Linear``, with r (N + K) elements each
        for one r.

    Raises
    ------
    OSError
        If they cannot be written. Files that were there before are then as they were.
    ValueError
        If one could not be read again: a value or a difference overflows float32.
    """
    _safetensors()
    save = importlib.import_module("safetensors.torch").save_file
    tensors, about = {}, {}
    for name, layer in layers.items():
        try:
            layer.check()
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        if layer.indices.max() > _MOST_ROWS:
            raise ValueError(f"{name}: its weight has more rows or columns than the files can tell")
        parts = [layer.delta, torch.from_numpy(layer.indices.astype(np.int32)), layer.values]
        for part, tensor in zip(_PARTS, parts, strict=True):
            if tensor is not None:
                tensors[f"{_PREFIX}{name}.{part}"] = tensor.contiguous()
        if layer.digest is not None:
            shape = list(layer.shape)
            about[name] = {"shape": shape, "base": layer.digest, "is_linear": layer.is_linear}
    metadata = {"format": "pt"}
    if about:
        described = {"version": _VERSION, "mask": mask, "layers": about}
        metadata["sebp"] = json.dumps(described, sort_keys=True)
    rank = _rank_of(layers)
    config = json.dumps(_config_of(layers, mask, rank), indent=2) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_both(
        folder,
        {
            _TENSORS: lambda path: save(tensors, path, metadata),
            _CONFIG: lambda path: path.write_text(config),
        },
    )
    return rank > 0


def _write_both(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files beside their places, and put them there once all are written."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as beside:
        for name, write in writers.items():
            write(Path(beside) / name)
        for name in writers:
            (Path(beside) / name).replace(folder / name)


def read_adapter(folder: str | os.PathLike) -> tuple[dict[str, AdapterLayer], str]:
    """Read an adapter's files, ours or those of PEFT's SHiRA.

    Returns
    -------
    dict of str to AdapterLayer
        By the names of the layers.
    str
        Which mask it is.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        If they are of another kind of adapter, damaged, or hold more than a mask's elements.
    """
    library, folder = _safetensors(), Path(folder)
    try:
        config = json.loads((folder / _CONFIG).read_text())
        kind = config["peft_type"]
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder / _CONFIG} is not the configuration of an adapter: {error!r}"
        ) from None
    if kind not in ("SHIRA", "SEBP_SPARSE_MASK"):
        raise ValueError(f"{folder / _CONFIG} is of an adapter of kind {kind}, not SHIRA")
    path = folder / _TENSORS
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with library.safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get("sebp", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (library.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    try:
        return _layers_of(tensors, described), str(config.get("mask_type"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _layers_of(
    tensors: dict[str, torch.Tensor], described: Mapping[str, object] | None
) -> dict[str, AdapterLayer]:
    """Make layers of what a file holds; raise ValueError where it is not valid."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix(_PREFIX).rpartition(".")
        if not key.startswith(_PREFIX) or part not in _PARTS or not name:
            raise ValueError(f"it holds {key}, which is no part of a mask")
        found.setdefault(name, {})[part] = tensor
    if not found:
        raise ValueError("it holds no layers")
    about = _descriptions(described, set(found))
    layers = {}
    for name, parts in found.items():
        if not {"shira_weight", "shira_indices"} <= set(parts):
            raise ValueError(f"{name} lacks its values or indices")
        indices = parts["shira_indices"]
        if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 2:
            raise ValueError(
                f"the indices of {name} are of {indices.dtype}, not integers in two rows"
            )
        if indices.shape[0] != 2:
            raise ValueError(f"the indices of {name} are in {indices.shape[0]} rows, not two")
        one = about.get(name)
        layer = AdapterLayer(
            indices.numpy().astype(np.int64),
            parts["shira_weight"],
            parts.get("sebp_values"),
            None,
            None if one is None else tuple(one["shape"]),
            None if one is None else one["base"],
            True if one is None else one["is_linear"],
        )
        try:
            layer.check()
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        if (layer.values is None) != (layer.digest is None):
            raise ValueError(f"{name} has either values without a base, or a base without values")
        layers[name] = layer
    return layers


def _descriptions(described: object, names: set[str]) -> dict[str, dict[str, object]]:
    """Return what the header tells of each layer; raise ValueError where it is not valid."""
    if described is None:
        return {}
    try:
        version, layers = described["version"], dict(described["layers"])
        if version != _VERSION:
            raise ValueError(f"its header is of version {version}, not {_VERSION}")
        for one in layers.values():
            rows, cols = one["shape"]
            if not (isinstance(rows, int) and isinstance(cols, int) and rows > 0 and cols > 0):
                raise TypeError(f"shape {one['shape']}")
            if not (isinstance(one["base"], str) and isinstance(one["is_linear"], bool)):
                raise TypeError("base or is_linear")
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"its header is not valid: {error!r}") from None
    if set(layers) != names:
        raise ValueError("its header tells of other layers than it holds")
    return layers
