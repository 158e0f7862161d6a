"""The compared methods as data: which prompts, which stages and which gates stand behind each row of the report.

Every method answers through the same prompt builder and predictor; only these switches differ. A run lists methods by
name in `evaluation.methods`, and changes or adds some under `recipes`. docs/methods.md explains each.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from proper_ds.data.recipe import PromptRecipe
from proper_ds.errors import Problem
from proper_ds.model.presets import preset_of
from proper_ds.run_folder import in_lane
from proper_ds.section import problems_of

if TYPE_CHECKING:
    from proper_ds.config import RunConfig

Gates = Literal["user", "lora", "joint"]
Kind = Literal["model", "floor", "PPlug", "PLoRA", "merged"]

PLAIN = PromptRecipe()
RAG = PromptRecipe(retriever="bm25")
PAG = PromptRecipe(profile="built-in")
PAG_RAG = PromptRecipe(retriever="bm25", profile="built-in")


@dataclass(frozen=True)
class Method:
    """One row of the report.

    Attributes:
        says: one line for the report.
        kind: `floor`: no language model; `PPlug`, `PLoRA`, `merged`: the stages and the answering of these; `model`:
            the base with what the other switches put on it.
        recipe: how its prompts are made, for training as for answering.
        population: the population LoRA is merged into the base.
        preset: the group experts of this preset are on, or None.
        user_lora: each user's own LoRA is on.
        gates: which router mixes the experts: user-aware (stage 2), LoRA-aware (stage 3.2), or one that was trained
            together with users' adapters.
        prior: the user's own labels weigh the answers of a closed label set.
    """

    name: str
    says: str
    kind: Kind = "model"
    recipe: PromptRecipe = PLAIN
    population: bool = False
    preset: str | None = None
    user_lora: bool = False
    gates: Gates = "user"
    prior: bool = False

    @property
    def lane(self) -> str:
        """The lane that its stages belong to; "" for plain prompts."""
        return self.recipe.lane

    @property
    def adapter_set(self) -> str | None:
        """The set of user adapters behind it, trained user by user (stage 3.1), or None."""
        if self.kind == "merged":
            return "OPPU"
        if not self.user_lora:
            return None
        return self.preset or "OPPU"

    @property
    def joint_set(self) -> str | None:
        """The set of adapters that were trained on together with the router, if they were; others keep 3.1's."""
        return f"{self.preset}-joint" if self.gates == "joint" else None

    @property
    def own_set(self) -> str | None:
        """The set of adapters that answers, or None."""
        return self.joint_set or self.adapter_set

    @property
    def router(self) -> str | None:
        """The preset whose LoRA-aware router answers, or None."""
        return self.preset if self.user_lora and self.gates == "lora" else None

    @property
    def level_stage(self) -> str:
        """The stage, within the lane, whose group level answers; only for methods with a preset."""
        assert self.preset is not None, f"{self.name} has no groups"
        if self.joint_set is not None:
            return f"store/{self.joint_set}"
        return f"{'router' if self.router else 'group'}/{self.preset}"

    @property
    def pplug(self) -> str | None:
        """The stage of a learned user token, or None."""
        if self.kind != "PPlug":
            return None
        return "pplug/population" if self.population else "pplug/base"

    @property
    def prior_stage(self) -> str | None:
        """The stage, within the lane, of its label prior, or None."""
        return f"prior/{self.preset or 'population'}" if self.prior else None

    @property
    def without_prior(self) -> Method:
        """The method whose answers the prior weighs."""
        return replace(self, prior=False)

    @property
    def stages(self) -> list[str]:
        """Full names of the stages that it answers with, in order; those before them are theirs to name."""
        if self.kind == "floor":
            return ["prepared"]
        found = ["tokens"]
        found += ["population"] if self.population else []
        found += [f"group/{self.preset}"] if self.preset else []
        found += [f"store/{self.adapter_set}"] if self.adapter_set else []
        found += [f"router/{self.router}"] if self.router else []
        found += [f"store/{self.joint_set}"] if self.joint_set else []
        found += ["embeddings", self.pplug] if self.pplug else []
        found += ["plora"] if self.kind == "PLoRA" else []
        found += ["features"] if self.kind == "merged" else []
        found += [self.prior_stage] if self.prior_stage else []
        return [in_lane(name, self.lane) for name in found]


def _proper(
    name: str, says: str, preset: str = "proper", gates: Gates = "lora", recipe: PromptRecipe = PLAIN
) -> Method:
    return Method(name, says, recipe=recipe, population=True, preset=preset, user_lora=True, gates=gates)


METHODS = {
    method.name: method
    for method in (
        Method("own-habit", "the user's own most frequent label, median score or usual length; no model", "floor"),
        Method("words", "a linear bag of words that ignores the user; no language model", "floor"),
        Method("words+own", "words with the user's own label counts, or mean offset; no language model", "floor"),
        Method("base", "the frozen base, no adapter"),
        Method("base+RAG", "the frozen base, the user's own items that resemble the question before it", recipe=RAG),
        Method("population", "one LoRA over everybody's data (stage 1)", population=True),
        Method("RAG", "population with the user's own items found by BM25", recipe=RAG, population=True),
        Method(
            "RAG-recent", "the same with the newest items", recipe=PromptRecipe(retriever="recency"), population=True
        ),
        Method("RAG-random", "the same with random items", recipe=PromptRecipe(retriever="random"), population=True),
        Method("PAG", "population with a summary of the user in words", recipe=PAG, population=True),
        Method("PAG+RAG", "population with summary and items found by BM25", recipe=PAG_RAG, population=True),
        Method("PPlug", "one learned user token before the input, base frozen", "PPlug"),
        Method("PPlug+population", "the same on the population model", "PPlug", population=True),
        Method("PLoRA", "one shared LoRA with a user vector in its rank space", "PLoRA", population=True),
        Method("merged", "adapters of the most similar training users merged, nothing trained", "merged", PLAIN, True),
        Method("OPPU", "one LoRA per user on the population model, without groups", population=True, user_lora=True),
        Method("OPPU+RAG", "OPPU with items found by BM25", recipe=RAG, population=True, user_lora=True),
        Method("OPPU+PAG", "OPPU with a summary of the user", recipe=PAG, population=True, user_lora=True),
        Method("population+prior", "population, weighed by the user's own labels", population=True, prior=True),
        Method("group", "experts with user-aware gates (stage 2, preset proper)", population=True, preset="proper"),
        Method("group+prior", "group, weighed by the user's own labels", population=True, preset="proper", prior=True),
        Method("group-released", "the same, released mathematics", population=True, preset="proper-released"),
        _proper("proper", "one LoRA per user on the groups, LoRA-aware gates"),
        _proper("proper-released", "the same with the released mathematics", "proper-released"),
        _proper("proper-joint", "proper with stages 3.1 and 3.2 trained on together", gates="joint"),
        _proper("proper-user-gates", "proper before stage 3.2: user-aware gates", gates="user"),
        _proper("proper-released-user-gates", "proper-released before stage 3.2", "proper-released", "user"),
        _proper("proper+RAG", "proper with items found by BM25", recipe=RAG),
        _proper("proper+PAG", "proper with a summary of the user", recipe=PAG),
    )
}

ADAPTER_SETS = tuple(dict.fromkeys(method.adapter_set for method in METHODS.values() if method.adapter_set))
"""Names of all sets of users' adapters, which every lane has of its own."""


FLOORS = tuple(name for name, method in METHODS.items() if method.kind == "floor")
"""Methods without a language model: what every other one must beat."""


@dataclass(frozen=True)
class LaneNeeds:
    """What the methods of one lane need trained, in order.

    Attributes:
        presets: group stages.
        adapter_sets: user stages: `OPPU` or a preset.
        answering: those of them whose adapters answer for their own users; others' are only merged from.
        routers: LoRA-aware routers, by preset.
        joints: LoRA-aware routers that are trained together with users' adapters, by preset.
        pplugs: stages of learned user tokens.
        starts: learned starts of users' LoRAs, by adapter set.
        priors: stages of label priors.
    """

    recipe: PromptRecipe
    population: bool
    presets: tuple[str, ...]
    adapter_sets: tuple[str, ...]
    answering: tuple[str, ...]
    routers: tuple[str, ...]
    joints: tuple[str, ...]
    pplugs: tuple[str, ...]
    plora: bool
    merged: bool
    starts: tuple[str, ...]
    priors: tuple[str, ...]

    def stages(self, user_vector: Literal["encoder", "table"]) -> list[str]:
        """Full names of the stages of this lane, in order."""
        encoders = any(preset_of(preset, user_vector).user_vector == "encoder" for preset in self.presets)
        found = ["profiles"] if self.recipe.profile == "model" else []
        found += ["tokens"]
        found += ["population"] if self.population else []
        found += ["features"] if encoders or self.merged else []
        found += ["embeddings"] if self.pplugs else []
        found += [*self.pplugs, *(["plora"] if self.plora else [])]
        found += [f"group/{name}" for name in self.presets] + [f"start/{name}" for name in self.starts]
        found += [f"store/{name}" for name in self.adapter_sets]
        found += [f"router/{name}" for name in self.routers] + [f"store/{name}-joint" for name in self.joints]
        found += self.priors
        return [in_lane(name, self.recipe.lane) for name in found]


@dataclass(frozen=True)
class Needs:
    """What a list of methods needs.

    Attributes:
        lanes: in the order of the methods, the plain one first where it is needed.
        floors: methods without a language model.
    """

    lanes: tuple[LaneNeeds, ...]
    floors: tuple[str, ...]

    @property
    def population(self) -> bool:
        """Whether any method answers with a population LoRA."""
        return any(lane.population for lane in self.lanes)

    @property
    def presets(self) -> tuple[str, ...]:
        """Group stages of all lanes."""
        return _once([name for lane in self.lanes for name in lane.presets])

    @property
    def adapter_sets(self) -> tuple[str, ...]:
        """User stages of all lanes, without their lanes."""
        return _once([name for lane in self.lanes for name in lane.adapter_sets])

    @property
    def routers(self) -> tuple[str, ...]:
        """LoRA-aware routers of all lanes, by preset."""
        return _once([name for lane in self.lanes for name in lane.routers])

    @property
    def joints(self) -> tuple[str, ...]:
        """Jointly trained routers of all lanes, by preset."""
        return _once([name for lane in self.lanes for name in lane.joints])

    @property
    def starts(self) -> tuple[str, ...]:
        """Learned starts of users' LoRAs of all lanes, by adapter set."""
        return _once([name for lane in self.lanes for name in lane.starts])

    @property
    def pplugs(self) -> tuple[str, ...]:
        """Stages of learned user tokens."""
        return _once([name for lane in self.lanes for name in lane.pplugs])

    @property
    def plora(self) -> bool:
        """Whether any method is PLoRA."""
        return any(lane.plora for lane in self.lanes)

    @property
    def priors(self) -> tuple[str, ...]:
        """Stages of label priors of all lanes."""
        return _once([name for lane in self.lanes for name in lane.priors])

    @property
    def merged(self) -> bool:
        """Whether any method merges the adapters of similar users."""
        return any(lane.merged for lane in self.lanes)


def methods_of(config: RunConfig) -> list[Method]:
    """The methods of a run, in its order; recipes of the run change or add some. Unknown names are left out."""
    known = all_methods(config)
    return [known[name] for name in config.evaluation.methods if name in known]


def all_methods(config: RunConfig) -> dict[str, Method]:
    """Every method that a run may list: the shipped ones, and those that its `recipes` make of them.

    Recipes that are wrong are left out; `checks.py` says what is wrong with them.
    """
    found = dict(METHODS)
    for name, recipe in config.recipes.items():
        like = METHODS.get(recipe.like or name)
        changed = changed_recipe(like, recipe.prompt)[0] if like is not None else None
        if like is not None and changed is not None:
            says = like.says if changed == like.recipe else f"{like.name} under prompts {changed.lane or 'as they are'}"
            found[name] = replace(like, name=name, recipe=changed, says=says)
    return found


def changed_recipe(like: Method, prompt: dict[str, Any]) -> tuple[PromptRecipe | None, list[Problem]]:
    """A method's recipe with some keys changed, or what is wrong with them."""
    try:
        return PromptRecipe.model_validate(like.recipe.model_dump() | prompt), []
    except ValidationError as error:
        return None, [problem for _, problem in problems_of(PromptRecipe, error)]


def needs_of(config: RunConfig) -> Needs:
    """The stages behind a run's methods, each once, in the order of the methods."""
    return needs_of_methods(methods_of(config), config.learned_sets)


def stages_of(config: RunConfig) -> list[str]:
    """Full names of all stages that a run of these methods has, in order; some may have been done elsewhere."""
    lanes = [name for lane in needs_of(config).lanes for name in lane.stages(config.group.user_vector)]
    return ["prepared", "base", *lanes, *(f"predictions/{method.name}" for method in methods_of(config))]


def needs_of_methods(methods: Sequence[Method], learned: Collection[str] = ()) -> Needs:
    """The same for methods at hand; `learned` are the adapter sets that start from a learned adapter."""
    asked = [method for method in methods if method.kind != "floor"]
    lanes = sorted(_once([method.lane for method in asked]), key=bool)  # the plain one first
    return Needs(
        tuple(_lane_needs([method for method in asked if method.lane == lane], learned) for lane in lanes),
        tuple(method.name for method in methods if method.kind == "floor"),
    )


def _lane_needs(methods: list[Method], learned: Collection[str]) -> LaneNeeds:
    sets = _once([method.adapter_set for method in methods])
    return LaneNeeds(
        recipe=methods[0].recipe,
        population=any(method.population for method in methods),
        presets=_once([method.preset for method in methods]),
        adapter_sets=sets,
        answering=_once([method.adapter_set for method in methods if method.user_lora]),
        routers=_once([method.router for method in methods]),
        joints=_once([method.preset for method in methods if method.gates == "joint"]),
        pplugs=_once([method.pplug for method in methods]),
        plora=any(method.kind == "PLoRA" for method in methods),
        merged=any(method.kind == "merged" for method in methods),
        starts=tuple(name for name in sets if name in learned),
        priors=_once([method.prior_stage for method in methods]),
    )


def _once(values: Sequence[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for value in values if value is not None))
