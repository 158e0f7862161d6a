"""Group and user stages through the whole model, against a transcription of the equations written to be read.

The transcription (methods.md 1.4 to 1.6; docs/methods.md for `proper`) knows one user, one sequence, one token and one
expert at a time. How a level keeps its weights is known to `Held` and `fill` alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import takewhile

import pytest
import torch
from torch.nn import functional

from proper_ds.data.batches import collate
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.base import find_targets
from proper_ds.model.config import FEED_FORWARD, LoraSettings
from proper_ds.model.groups import GroupLevel, GroupSizes
from proper_ds.model.lora import LoraLayout, SlotBuffers
from proper_ds.model.presets import PRESETS
from proper_ds.model.routing import Rows
from proper_ds.training.group_module import GroupModule
from proper_ds.training.rank_batch import RankBatch
from tests.fakes import random_examples, tiny_llama

N, FEATURES, USER_VECTOR, NUM_USERS = 5, 7, 4, 6
SETTINGS = LoraSettings(r=2, lora_alpha=4.0, target_modules=FEED_FORWARD)
S = SETTINGS.lora_alpha / SETTINGS.r
STAGES = ("2", "3.1", "3.2")
LOW, HIGH = 1 / (math.e**2 + 4), math.e**2 / (math.e**2 + 4)
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-6}


@dataclass
class Held:
    """One module's weights: experts A_i [r, D] and B_i [E, r], routers, and its own rows of the user tables."""

    A: torch.Tensor
    B: torch.Tensor
    W_x: torch.Tensor | None
    W_u: torch.Tensor | None
    W_l: torch.Tensor | None
    table: torch.Tensor | None

    @classmethod
    def of(cls, level, name):
        mixture = level.by_module()[name]
        router = mixture.router
        inner = getattr(router, "user_router", router)
        found = [getattr(inner, "token", None), getattr(inner, "user", None), getattr(router, "lora", None)]
        experts, table = mixture.experts, None
        if level.user_table is not None:  # all modules' rows side by side
            widths = {shape.name: shape.in_features for shape in level.layout.modules}
            first = sum(width for _, width in takewhile(lambda pair: pair[0] != name, widths.items()))
            table = level.user_table.weight[:, first : first + widths[name]]
        return cls(experts.lora_A, experts.lora_B, *found, table)


def fill(level, seed=1, spread=0.15):
    """Every weight at random, so that all experts have an effect and gates differ by user and token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in level.named_parameters():
            wide = spread if "lora_A" in name or "lora_B" in name else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * wide)


# ---- the transcription ----


def softmax(logits):
    parts = [math.exp(float(v) - max(map(float, logits))) for v in logits]
    return [part / sum(parts) for part in parts]


def user_vector(encoder, features):
    """z_u of `proper`: W_2 gelu(W_1 (f - mean) / std + b)."""
    normal = (features - encoder.mean) / encoder.std
    return encoder.outer @ functional.gelu(encoder.inner @ normal + encoder.inner_bias)


@dataclass
class Plain:
    """An adapted linear module, for the one user it is set to.

    Attributes:
        omega: the mean gates of the last sequence.
    """

    base: torch.nn.Linear
    held: Held
    preset: str
    stage: str
    line: int
    z: torch.Tensor | None
    A_u: torch.Tensor | None
    B_u: torch.Tensor | None
    omega: list[float] | None = None

    def gates(self, x, o):
        held = self.held
        if self.preset == "proper-released":
            if self.stage == "3.2":
                return softmax([w @ o for w in held.W_l])
            p_x = softmax([w @ x for w in held.W_x])
            p_u = softmax([w @ held.table[self.line] for w in held.W_u])
            return softmax([a + b for a, b in zip(p_x, p_u, strict=True)])
        logits = [held.W_x[i] @ x + held.W_u[i] @ self.z for i in range(N)]
        if self.stage == "3.2":
            length = torch.sqrt((o * o).mean() + 1e-8)
            logits = [logit + held.W_l[i] @ (o / length) for i, logit in enumerate(logits)]
        return softmax(logits)

    def token(self, x, sums):
        y = self.base(x)
        o = None if self.A_u is None else S * (self.B_u @ (self.A_u @ x))
        gates = self.gates(x, o)
        factor = 1 / N if self.preset == "proper-released" else 1.0
        for i in range(N):
            sums[i] += gates[i]
            y = y + factor * gates[i] * S * (self.held.B[i] @ (self.held.A[i] @ x))
        return y if o is None else y + o

    def __call__(self, x_1TD):
        sums = [0.0] * N
        y = torch.stack([self.token(x, sums) for x in x_1TD[0]])
        self.omega = [total / len(y) for total in sums]
        return y.unsqueeze(0)


def plain_constraint(modules):
    """The off-diagonal sum of |omega omega^T|, mean over modules."""
    total = 0.0
    for module in modules:
        total += sum(abs(module.omega[i] * module.omega[j]) for i in range(N) for j in range(N) if i != j)
    return total / len(modules)


@dataclass
class Setting:
    """A level on a model, its users, and the same as a transcription."""

    preset: str
    stage: str
    dtype: torch.dtype

    def __post_init__(self):
        lm = tiny_llama(dtype=self.dtype)
        targets = find_targets(lm, FEED_FORWARD)
        self.layout = LoraLayout.of(targets, SETTINGS)
        proper = self.preset == "proper"
        sizes = {"feature_size": FEATURES, "user_vector_size": USER_VECTOR} if proper else {"num_users": NUM_USERS}
        self.level = GroupLevel(self.layout, PRESETS[self.preset], GroupSizes(N, **sizes), 0)
        if self.stage == "3.2":
            self.level.add_lora_routers(0)
        self.level.to(self.dtype)
        fill(self.level)
        self.model = PersonalModel(lm, targets)
        self.users = SlotBuffers(self.layout, NUM_USERS, self.dtype, "cpu", trainable=False)
        generator = torch.Generator().manual_seed(5)
        rows = torch.randn(self.users.weights_SP.shape, generator=generator, dtype=torch.float64) * 0.2
        self.users.weights_SP.copy_(rows)
        self.features = torch.randn(NUM_USERS, FEATURES, generator=generator, dtype=torch.float64).to(self.dtype)
        if self.stage != "2":
            self.model.attach_users(self.users.modules())
        self.examples = [random_examples(1, user, seed=3, longest=12)[0] for user in range(NUM_USERS)]

    def module(self, constraint_weight=0.05, balance_weight=0.0):
        return GroupModule(self.model, self.level, 0.0, constraint_weight, balance_weight)

    def batch(self, users):
        batch = collate([self.examples[user] for user in users])
        index = torch.tensor(users)
        rows = Rows(slot_R=index if self.stage != "2" else None)
        counts = (len(batch.target_K), len(users))
        known_R = torch.ones(len(users), dtype=torch.bool)
        return RankBatch(batch, 1.0, *counts, rows, self.features[index], known_R, line_R=index + 1)

    def set_rows(self, made):
        """As GroupModule does before a forward pass."""
        if self.level.encoder is not None:
            made.rows.user_RU = self.level.encoder(made.features_RF, made.known_R)
        else:
            made.rows.user_RU = self.level.user_table(made.line_R)
        self.model.set_rows(made.rows)

    def plain(self, user):
        """(loss of each target, the constraint, the modules) of one user's sequence."""
        lm = tiny_llama(dtype=self.dtype)
        z = user_vector(self.level.encoder, self.features[user]) if self.level.encoder is not None else None
        own = {name: (a[user], b[user]) for name, a, b in self.layout.views(self.users.weights_SP)}
        found = []
        for name, linear in find_targets(lm, FEED_FORWARD).items():
            a, b = own[name] if self.stage != "2" else (None, None)
            args = (self.preset, self.stage, user + 1, z, a, b)
            module = Plain(torch.nn.Linear(*linear.weight.T.shape, bias=False), Held.of(self.level, name), *args)
            module.base.weight = linear.weight
            linear.forward = module
            found.append(module)
        example = self.examples[user]
        with torch.no_grad():
            logits = lm(input_ids=torch.from_numpy(example.ids)[None]).logits[0].log_softmax(-1)
        places = range(example.num_prompt, len(example.ids))
        losses = [-float(logits[t - 1, int(example.ids[t])]) for t in places]
        return losses, plain_constraint(found), found


CASES = [(preset, stage) for preset in PRESETS for stage in STAGES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("preset", "stage"), CASES)
def test_gates_and_outputs_of_every_module_equal_the_equations(preset, stage, dtype):
    setting = Setting(preset, stage, dtype)
    for user in (0, 3):
        _, _, modules = setting.plain(user)
        made = setting.batch([user])
        made.rows.gates = {}
        setting.model.attach_groups(setting.level.by_module())
        setting.set_rows(made)
        generator = torch.Generator().manual_seed(user)
        for (name, adapted), plain in zip(setting.model.adapted.items(), modules, strict=True):
            x = torch.randn(1, 3, plain.base.in_features, generator=generator, dtype=torch.float64).to(dtype)
            with torch.no_grad():
                found, wanted = adapted(x), plain(x)
            assert (found - wanted).abs().max() <= CLOSE[dtype] * max(1.0, float(wanted.abs().max())), name
            gates = setting.model.rows.gates[name][0].mean(0).tolist()
            assert gates == pytest.approx(plain.omega, abs=CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("preset", "stage"), CASES)
def test_the_loss_of_a_mixed_batch_equals_each_user_alone_in_the_transcription(preset, stage, dtype):
    setting = Setting(preset, stage, dtype)
    users = [4, 0, 2]
    alone = [setting.plain(user) for user in users]
    losses = [loss for found, _, _ in alone for loss in found]
    wanted = sum(losses) / len(losses)
    constraint = sum(value for _, value, _ in alone) / len(users)
    module = setting.module()
    with torch.no_grad():
        loss, numbers = module(setting.batch(users))
        batch = setting.batch(users).batch
        each = setting.model.target_losses(batch.ids_RT, batch.row_K, batch.position_K, batch.target_K)
    close = CLOSE[dtype]
    assert each.tolist() == pytest.approx(losses, abs=close, rel=close)
    assert float(numbers["constraint"]) / len(users) == pytest.approx(constraint, abs=1e-6)  # logged in fp32
    weight = 1.0 if preset == "proper-released" else 0.05
    assert float(loss) == pytest.approx(wanted + weight * constraint, abs=close)
    if preset == "proper-released" and stage != "3.2":
        assert 0.548 <= constraint <= 0.800


@pytest.mark.parametrize(("preset", "stage"), CASES)
def test_the_transcription_tells_users_and_stages_apart(preset, stage):
    """Otherwise the comparisons above could pass with users mixed up, or without any effect of the experts."""
    setting = Setting(preset, stage, torch.float64)
    one, other = setting.plain(0), setting.plain(1)
    assert one[2][0].omega != pytest.approx(other[2][0].omega, abs=1e-3)
    setting.examples[1] = setting.examples[0]
    assert setting.plain(1)[0] != pytest.approx(one[0], abs=1e-4)
    for module in setting.level.by_module().values():
        module.experts.lora_B.data.zero_()
    assert setting.plain(0)[0] != pytest.approx(one[0], abs=1e-3)


def gradients(setting, users, **weights):
    """By name, of the routers, the encoder and the experts."""
    setting.level.zero_grad(set_to_none=False)
    loss, _ = setting.module(**weights)(setting.batch(users))
    loss.backward()
    return {name: p.grad.clone() for name, p in setting.level.named_parameters() if p.grad is not None}


def some_places(level):
    """(name, parameter, place) of a few numbers of every kind of parameter that gates depend on."""
    for name, parameter in level.named_parameters():
        first_or_last = "layers|0|mlp|gate" in name or "layers|1|mlp|down" in name
        if ("router" in name and first_or_last) or name in ("encoder.outer", "encoder.inner", "encoder.inner_bias"):
            yield name, parameter, parameter.numel() // 2


@pytest.mark.parametrize("stage", ["2", "3.2"])
def test_the_gradient_of_propers_constraint_is_that_of_finite_differences(stage):
    setting = Setting("proper", stage, torch.float64)
    users = [0, 4]
    on, off = (gradients(setting, users, constraint_weight=weight) for weight in (1.0, 0.0))

    def value():
        return sum(setting.plain(user)[1] for user in users) / len(users)

    step, checked, largest = 1e-4, 0, 0.0
    for name, parameter, place in some_places(setting.level):
        flat = parameter.data.view(-1)
        kept = flat[place].item()
        flat[place] = kept + step
        above = value()
        flat[place] = kept - step
        below = value()
        flat[place] = kept
        slope = (above - below) / (2 * step)
        found = float((on[name] - off[name]).view(-1)[place])
        assert found == pytest.approx(slope, abs=1e-8), name
        checked, largest = checked + 1, max(largest, abs(slope))
    assert checked >= 7
    assert largest > 1e-4, "a constraint without gradient would pass"


@pytest.mark.parametrize("stage", ["2", "3.2"])
def test_the_released_constraint_has_no_gradient(stage):
    setting = Setting("proper-released", stage, torch.float64)
    users = [0, 4]
    found = gradients(setting, users)
    setting.level.zero_grad()
    batch = setting.batch(users).batch
    setting.set_rows(setting.batch(users))
    losses = setting.model.target_losses(batch.ids_RT, batch.row_K, batch.position_K, batch.target_K)
    losses.mean().backward()
    for name, parameter in setting.level.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(found[name], parameter.grad, rtol=0, atol=1e-12), name
    assert any(gradient.abs().max() > 1e-6 for name, gradient in found.items() if "router" in name)


@pytest.mark.parametrize("spread", [0.01, 1.0, 1000.0])
def test_released_gates_and_constraint_keep_their_bounds_and_reach_them(spread):
    setting = Setting("proper-released", "2", torch.float64)
    module = setting.module()
    for name, mixture in setting.level.by_module().items():
        router = mixture.router
        for parameter in (router.token, router.user):
            parameter.data *= spread
        if spread > 100:  # token and user agree on expert 0, as far as numbers go
            router.token.data[0] *= 0
            router.token.data[1:] = -spread * torch.ones_like(router.token.data[1:])
            router.user.data[0] = spread * Held.of(setting.level, name).table.data[1]
            router.user.data[1:] = 0
    made = setting.batch([0])
    with torch.no_grad():
        _, numbers = module(made)
        constraint = float(numbers["constraint"])
        gates = torch.cat([g.flatten() for g in made.rows.gates.values()])
    assert gates.min() >= LOW - 1e-12
    assert gates.max() <= HIGH + 1e-12
    assert 0.548 <= constraint <= 0.800 + 1e-7
    if spread < 0.1:
        assert constraint == pytest.approx(0.8, abs=1e-3)
    if spread > 100:
        assert gates.max() == pytest.approx(HIGH, abs=1e-9)
        assert gates.min() == pytest.approx(LOW, abs=1e-9)
