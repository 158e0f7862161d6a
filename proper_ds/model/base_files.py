"""A base as its files: the model without weights, and any stretch of any weight read from safetensors.

For bases that are loaded in parts (ZeRO 3): each rank reads what it keeps. `training/context.py` calls it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open

from proper_ds.errors import AdapterError

Tensor = torch.Tensor

_MEND = "Load it whole, with ZeRO 0, 1 or 2 in distributed.deepspeed, or save it anew with save_pretrained."


def empty_base(model: str, revision: str | None, dtype: torch.dtype) -> Any:
    """A frozen causal language model in evaluation mode whose parameters lie on torch's meta device.

    Buffers that are computed (rotary frequencies) have their values, in the type that `load_base` gives them.

    Raises:
        AdapterError: where the name or folder holds no model, or one that is quantised.
        OSError, ValueError: from transformers, where it cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(model, revision=revision)
    if getattr(config, "quantization_config", None) is not None:
        raise AdapterError(f"base.model {model!r} is quantised, which cannot be loaded in shards. {_MEND}")
    with no_init_weights(), torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    lm.tie_weights()
    for module in lm.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
    lm.initialize_weights()  # computes the buffers; on parameters of the meta device it has no effect
    lm.requires_grad_(False)
    return lm.eval()


def num_parameters(model: str, revision: str | None) -> int:
    """How many numbers a base has; nothing but its configuration is read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, revision=revision))
    lm.tie_weights()
    return sum(parameter.numel() for parameter in lm.parameters())


class BaseFiles:
    """The safetensors files of a base, opened one at a time.

    Args:
        model: a folder, or a Hugging Face name, which is resolved as `from_pretrained` does.
        dtype: what is read is cast to it.

    Raises:
        AdapterError: where it has no safetensors files.
    """

    def __init__(self, model: str, revision: str | None, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        single = _resolve(model, revision, "model.safetensors")
        index = None if single is not None else _resolve(model, revision, "model.safetensors.index.json")
        self._file_of: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        if single is not None:
            with safe_open(single, "pt") as file:
                self._file_of = dict.fromkeys(file.keys(), single)
        elif index is not None:
            names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: _resolve(model, revision, name) for name in sorted(set(names.values()))}
            lost = [name for name, path in files.items() if path is None]
            if lost:
                raise AdapterError(f"base.model {model!r}: its index names {lost[0]}, which is not there")
            self._file_of = {key: found for key, name in names.items() if (found := files[name]) is not None}
        else:
            raise AdapterError(f"base.model {model!r} has no safetensors files, which loading in shards needs. {_MEND}")

    def __enter__(self) -> BaseFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].__exit__(None, None, None)
            self._open = None

    def fill_buffers(self, lm: Any) -> None:
        """Read the buffers that are stored, whole."""
        for name, buffer in lm.named_buffers():
            if name in self._file_of:
                buffer.copy_(self.read(name, buffer.shape, 0, buffer.numel()).view(buffer.shape))

    def check(self, lm: Any) -> None:
        """Raise AdapterError unless every parameter of `lm` is in the files under its name; reads no weights."""
        lost = [name for name, _ in lm.named_parameters() if name not in self._file_of]
        if lost:
            raise AdapterError(
                f"base.model {self._model!r}: {len(lost)} parameters of {type(lm).__name__}, such as {lost[0]}, are in"
                f" no file under that name, so that it cannot be loaded in shards. {_MEND}"
            )

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Numbers `start` to `stop` of a tensor laid out flat, [stop - start].

        Only the rows that hold them are read.

        Raises:
            AdapterError: where the file holds another shape.
        """
        path = self._file_of[name]
        if self._open is None or self._open[0] != path:
            self._close()
            self._open = path, safe_open(path, "pt").__enter__()
        part = self._open[1].get_slice(name)
        if tuple(part.get_shape()) != tuple(shape):
            raise AdapterError(
                f"base.model {self._model!r}: {name} has shape {tuple(part.get_shape())} in {path.name}, the model's"
                f" configuration makes it {tuple(shape)}"
            )
        if not shape:
            whole: Tensor = self._open[1].get_tensor(name)
            return whole.reshape(1)[start:stop].to(self._dtype)
        width = math.prod(shape[1:])
        first = start // width
        rows: Tensor = part[first : math.ceil(stop / width)]
        return rows.flatten()[start - first * width : stop - first * width].to(self._dtype)


def _resolve(model: str, revision: str | None, name: str) -> Path | None:
    from transformers.utils import cached_file

    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.exists() else None
    found = cached_file(model, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found is not None else None
