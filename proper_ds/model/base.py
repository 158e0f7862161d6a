"""The frozen base: loading, finding target modules, and logits at target positions only.

Knows transformers; every stage starts here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from proper_ds.errors import AdapterError
from proper_ds.files import digest_of
from proper_ds.model.lora import layer_of

T = TypeVar("T")
Tensor = torch.Tensor
_SAMPLE_BYTES = 4 << 20


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """A Hugging Face tokenizer. Raises AdapterError where the name or folder has none."""
    from transformers import AutoTokenizer

    return open_base(model, "tokenizer", lambda: AutoTokenizer.from_pretrained(model, revision=revision))


def load_base(model: str, revision: str | None, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """A frozen causal language model in evaluation mode.

    Raises:
        AdapterError: where the name or folder holds none, or where its logits are not simply its head on its last
            hidden states (see `check_head`).
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    given: dict[str, Any] = {"revision": revision, "dtype": dtype}
    lm = open_base(model, "model", lambda: AutoModelForCausalLM.from_pretrained(model, **given))
    lm.requires_grad_(False)
    lm.eval()
    check_head(lm)
    return lm.to(device)


def hidden_size(model: str, revision: str | None = None) -> int:
    """The width of a base's states, from its configuration."""
    from transformers import AutoConfig

    config = open_base(model, "model", lambda: AutoConfig.from_pretrained(model, revision=revision))
    return int(config.get_text_config().hidden_size)


def open_base(model: str, what: str, opened: Callable[[], T]) -> T:
    """`opened()`, its errors of a base that cannot be reached told as AdapterError."""
    try:
        return opened()
    except (OSError, ValueError) as error:
        raise AdapterError(_unreachable(model, what, error)) from None


def _unreachable(model: str, what: str, error: Exception) -> str:
    first = str(error).splitlines()[0][:200]
    if Path(model).is_absolute() and not Path(model).exists():
        first = "the folder does not exist"
    return (
        f"base.model {model!r}: no {what} could be loaded ({first}). Give a folder saved by save_pretrained, or a"
        " Hugging Face name that this machine can reach (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE), or use base.create."
    )


def backbone(lm: Any) -> nn.Module:
    """The model below the language-model head."""
    inner: nn.Module = lm.base_model
    return inner


def check_head(lm: Any) -> None:
    """Raise AdapterError unless logits = head(last hidden state), which target-only logits rely on."""
    ids = torch.arange(4, device=lm.device).unsqueeze(0) % lm.config.vocab_size
    with torch.no_grad():
        wanted = lm(input_ids=ids).logits
        found = lm.get_output_embeddings()(backbone(lm)(input_ids=ids).last_hidden_state)
    if not torch.allclose(wanted, found, rtol=1e-3, atol=1e-3):
        raise AdapterError(
            f"{type(lm).__name__} does more to its logits than apply its head (soft-capping or scaling);"
            " this is not supported: use another base"
        )


def attention_window(config: Any) -> int | None:
    """How many tokens some layer's attention looks back at most; None where all look back at everything."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    found = [size for size in (window, getattr(config, "attention_chunk_size", None)) if size is not None]
    return min(found, default=None)


def check_masks(lm: Any, setting: str) -> None:
    """Raise AdapterError unless two texts behind a shared beginning, told apart by a mask, are as each alone.

    Args:
        setting: the option that asks for such rows.
    """
    ids = torch.arange(3, 8, device=lm.device).unsqueeze(0) % lm.config.vocab_size  # beginning of 2, text of 2, of 1
    position_ids = torch.tensor([[0, 1, 2, 3, 2]], device=lm.device)
    seen = torch.ones(5, 5, dtype=torch.bool, device=lm.device).tril()
    seen[4, 2:4] = False
    mask = torch.zeros(1, 1, 5, 5, dtype=lm.dtype, device=lm.device).masked_fill_(~seen, torch.finfo(lm.dtype).min)
    whole = backbone(lm)
    try:
        with torch.no_grad():
            both = whole(input_ids=ids, position_ids=position_ids, attention_mask=mask, use_cache=False)[0][0]
            first = whole(input_ids=ids[:, :4], use_cache=False)[0][0]
            second = whole(input_ids=ids[:, [0, 1, 4]], use_cache=False)[0][0]
        close = 1e-3 if lm.dtype is not torch.bfloat16 else 5e-2
        fits = torch.allclose(both[:4], first, rtol=close, atol=close)
        fits = fits and torch.allclose(both[4], second[2], rtol=close, atol=close)
    except (TypeError, ValueError, RuntimeError, IndexError):
        fits = False
    if not fits:
        raise AdapterError(
            f"{type(lm).__name__} does not take 4-D attention masks with positions, which rows of several items need;"
            f" set {setting}=false"
        )


def linears_of(lm: nn.Module) -> dict[str, nn.Linear]:
    """All linear modules of a model by name, the output head left out."""
    head = lm.get_output_embeddings()  # type: ignore[operator]
    return {name: m for name, m in lm.named_modules() if isinstance(m, nn.Linear) and m is not head}


def find_targets(lm: nn.Module, target_modules: list[str], layers: Sequence[int] | None = None) -> dict[str, nn.Linear]:
    """The linear modules whose names end in one of `target_modules`, in model order (as PEFT matches them).

    Args:
        layers: only in these decoder layers; None for all.

    Raises:
        AdapterError: naming every target that matches nothing and the names that would; the same for layers.
    """
    linears = linears_of(lm)
    found = {
        name: module
        for name, module in linears.items()
        if any(name == target or name.endswith(f".{target}") for target in target_modules)
    }
    idle = [t for t in target_modules if not any(name == t or name.endswith(f".{t}") for name in found)]
    if idle:
        legal = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise AdapterError(
            f"target_modules {', '.join(idle)} match no linear module of {type(lm).__name__}; it has {', '.join(legal)}"
        )
    if layers is None:
        return found
    numbers = {name: layer_of(name) for name in found}
    unknown = sorted(set(layers) - set(numbers.values()))
    if unknown:
        has = sorted({n for n in numbers.values() if n is not None})
        raise AdapterError(
            f"lora.layers {unknown} have no such module in {type(lm).__name__}; layers with it are {has}"
        )
    return {name: module for name, module in found.items() if numbers[name] in layers}


def base_fingerprint(model: str, revision: str | None) -> str:
    """A digest that changes with the base: of a folder's configuration and samples of its weights, or of a hub name."""
    folder = Path(model)
    if not folder.is_dir():
        return digest_of(model, revision)
    parts: list[Any] = []
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".model", ".bin"):
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(_SAMPLE_BYTES)
                file.seek(max(0, size - _SAMPLE_BYTES))
                parts.append([path.name, size, digest_of(head.hex(), file.read(_SAMPLE_BYTES).hex())])
    return digest_of(parts)


def merge_lora(linear: nn.Linear, a_rD: Tensor, b_Er: Tensor, scaling: float) -> None:
    """`W <- W + scaling * B A`, in the weight's type, as PEFT's `merge_and_unload` does."""
    with torch.no_grad():
        delta = (b_Er.float() @ a_rD.float()) * scaling
        linear.weight.add_(delta.to(linear.weight.dtype).to(linear.weight.device))


def merging(
    read: Callable[[str, torch.Size, int, int], Tensor],
    loras: Mapping[str, tuple[Tensor, Tensor]],
    scaling: float,
) -> Callable[[str, torch.Size, int, int], Tensor]:
    """A reader of stretches of weights (see `BaseFiles.read`) that adds LoRAs as `merge_lora` does.

    Args:
        loras: (A [r, D], B [E, r]) by module.
    """

    def read_merged(name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        found = read(name, shape, start, stop)
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module not in loras:
            return found
        a_rD, b_Er = loras[module]
        width = shape[1]
        first, last = start // width, -(-stop // width)
        delta = (b_Er[first:last].float() @ a_rD.float()) * scaling
        return found + delta.flatten()[start - first * width : stop - first * width].to(found.dtype)

    return read_merged
