"""The two presets of PROPER as data: which mathematics the group and router stages use.

`proper-released` is the released code's (github callanwu/PROPER at 214b35a, peft/tuners/lora.py lines 387-428);
`proper` is what the paper describes (arXiv 2503.01303) and what scale needs. Read by model, training and methods.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Preset:
    """Switches of the group mathematics.

    Attributes:
        gate: `summed`: softmax of token logits plus user logits; `double_softmax`: softmax over the sum of the two
            softmaxes, as released.
        divide_by_experts: multiply the experts' sum by 1/N, as released.
        constraint_gradient: whether the constraint loss reaches the weights; the released one does not.
        user_vector: `encoder`: one vector from the user's history, shared by all modules; `table`: a learned row per
            user, shared by all modules or, as released, with a part for each module as wide as the module's input.
        lora_gate: `residual`: the LoRA-aware term is added to the user-aware logits, so stage 3.2 starts where 3.1
            ended; `replace`: the user-aware gate is thrown away, as released.
        token_gate: whether the user-aware gates depend on the token, too; `summed` ones need not.
    """

    name: str
    gate: Literal["summed", "double_softmax"]
    divide_by_experts: bool
    constraint_gradient: bool
    user_vector: Literal["encoder", "table"]
    lora_gate: Literal["residual", "replace"]
    token_gate: bool = True


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("proper", "summed", False, True, "encoder", "residual"),
        Preset("proper-released", "double_softmax", True, False, "table", "replace"),
    )
}


def preset_of(
    name: str,
    user_vector: Literal["encoder", "table"],
    divide_by_experts: bool = False,
    gate: Literal["tokens_and_user", "user"] = "tokens_and_user",
) -> Preset:
    """The preset called `name`; the rest is what `proper` is to use (the released one has its own)."""
    found = PRESETS[name]
    if found.gate == "double_softmax":
        return found
    token_gate = gate == "tokens_and_user"
    return replace(found, user_vector=user_vector, divide_by_experts=divide_by_experts, token_gate=token_gate)
