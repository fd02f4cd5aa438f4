"""The config of an experiment: a YAML file, `key=value` overrides, and every error at once.

The static part is a set of pydantic models; the options of a dataset, scenario or algorithm are
checked against its registry entry. Nothing below this layer sees a config object.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmllm.algorithms import ALGORITHMS, make_algorithm
from fedmllm.algorithms.aggregation import AGGREGATIONS, make_aggregation, with_aggregation
from fedmllm.algorithms.base import Aggregation, Algorithm, check_enough
from fedmllm.data import DATASETS
from fedmllm.errors import UserError, unknown
from fedmllm.models import MODELS
from fedmllm.models.components import POLICIES, make_policy
from fedmllm.models.features import MEMORY_BYTES
from fedmllm.report.loading import config_digest
from fedmllm.scenarios import SCENARIOS, SETTINGS, assign, check_options

# sections whose options come from a registry: (section, registry, what it lists, default name)
NAMED: tuple[tuple[str, Mapping[str, Any], str, str], ...] = (
    ("data", DATASETS, "dataset", "memes"),
    ("scenario", SCENARIOS, "scenario", "aligned"),
    ("algorithm", ALGORITHMS, "algorithm", "fedavg"),
    ("aggregation", AGGREGATIONS, "aggregation", "mean"),
    ("trained", POLICIES, "policy of what is trained", "paper"),
)
# `scenario: missing` is short for `scenario: {name: missing}`
SHORTHAND = ("model", "partition", "data", "scenario", "algorithm", "aggregation", "trained")
HASH_KEY = "config_sha256"
CONDITION_NAMES: Any = ("both", "image_withheld", "text_withheld", "neither")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain numbers and booleans: `3:7` is a string (in 1.1 it is 187), `1e-3` a
    number, `no` a string."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.endswith((":null", ":merge"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _rule, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_rule), list(_first))


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(_Section):
    """Which multimodal LLM. `name` is a registry name or, with `path`, any label.

    dtype: auto is bfloat16 where a CUDA device computes in it, and float32 elsewhere; the result of
    a run in one process says which (`hardware`).
    quantization: nf4 reads the decoder's linear layers in 4 bit (QLoRA; package bitsandbytes).
    gradient_checkpointing: less memory for more time, same numbers. remote_code: the path again,
    word for word, of a model whose own code may be run.
    feature_cache: disk keeps what the frozen tower makes of image files for later runs, below the
    user's cache folder, at most feature_cache_gb (10^9 bytes) for all models. feature_memory_gb: of
    it in main memory, of each process. drop_tower: all images pass the frozen tower first, and it
    leaves memory; auto: on an accelerator, if what it makes of them all is kept.
    """

    name: str = "embedded"
    path: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    quantization: Literal["none", "nf4"] = "none"
    gradient_checkpointing: bool = False
    remote_code: str | None = None
    feature_cache: Literal["memory", "disk"] = "memory"
    feature_cache_gb: float = Field(20.0, gt=0)
    feature_memory_gb: float = Field(MEMORY_BYTES / 1e9, gt=0)
    drop_tower: Literal[False, True, "auto"] = False


class LoraSection(_Section):
    """LoRA on the q, k, v and o projections of every layer of the language model."""

    rank: int = Field(8, ge=1)
    alpha: int = Field(8, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)


class PartitionSection(_Section):
    """How the training samples are shared out among the clients."""

    name: Literal["dirichlet", "even"] = "dirichlet"
    clients: int = Field(10, ge=1)
    alpha: float = Field(0.5, gt=0)


class TrainingSection(_Section):
    """Rounds and local training; the defaults are the paper's except where the model is tiny.

    long_text: whether a sample of more than max_length tokens is refused or its text shortened.
    clients_at_once: clients of a cohort that share a forward pass, micro_batch samples of each.
    """

    rounds: int = Field(25, ge=0)
    clients_per_round: int = Field(2, ge=1)
    local_epochs: int = Field(1, ge=1)
    batch_size: int = Field(8, ge=1)
    micro_batch: int = Field(8, ge=1)
    clients_at_once: int = Field(1, ge=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.1, ge=0)
    warmup: float = Field(0.01, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, ge=0)
    max_length: int = Field(1200, ge=8)
    long_text: Literal["refuse", "shorten"] = "refuse"


_FROZEN = (None, "frozen")
_HUGE = 1e6  # a weight above it is a slip, and float32 ends at 3e38
_SWITCH = {  # a key of the strategy section that means nothing while another is off
    **dict.fromkeys(("w", "weight", "edge_layers"), "mu"),
    **dict.fromkeys(("prototype_loss", "temperature", "momentum"), "prototypes"),
    "distillation_target": "distillation",
    **dict.fromkeys(("mixtures", "evidence"), "recombine"),
}


class StrategySection(_Section):
    """The strategies but for the prompt, which is `prompt: agnostic` (docs/strategies.md).

    Adaptive regularisation: mu (0: off), w, weight (how w differs between parties), edge_layers (s;
    null: a seventh of the layers). Parties' profiles: epsilon (null: no noise), aggregation and
    sampling (above 0: less of the parties that diverge; 0: off). Alignment: prototypes,
    prototype_loss, temperature, momentum; distillation, distillation_target; views; incomplete.
    Composition of epochs: recombine and resample, shares of samples that lack a modality;
    mixtures, images in one (0: none); evidence, standard errors above chance at which a modality
    may be filled in (0: any may). Tests: fusion.
    """

    mu: float = Field(0.0, ge=0, le=_HUGE)
    w: float = Field(0.1, ge=0, le=_HUGE)
    weight: Literal["fixed", "scenario", "profile"] = "fixed"
    edge_layers: int | None = Field(None, ge=0)
    epsilon: float | None = Field(None, ge=1e-6)
    aggregation: float = Field(0.0, ge=-20, le=20)
    sampling: float = Field(0.0, ge=-20, le=20)
    prototypes: float = Field(0.0, ge=0, le=_HUGE)
    prototype_loss: Literal["cosine", "squared", "contrastive"] = "cosine"
    temperature: float = Field(0.1, gt=0)
    momentum: float = Field(0.5, ge=0, lt=1)
    distillation: float = Field(0.0, ge=0, le=_HUGE)
    distillation_target: Literal["logits", "hidden"] = "logits"
    views: float = Field(0.0, ge=0, le=_HUGE)
    incomplete: float = Field(1.0, ge=0, le=_HUGE)
    recombine: float = Field(0.0, ge=0, le=1)
    resample: float = Field(0.0, ge=0, le=1)
    mixtures: int = Field(0, ge=0)
    evidence: float = Field(0.0, ge=0, le=100)
    fusion: float = Field(0.0, ge=0, le=1)

    @property
    def uses_profiles(self) -> bool:
        """Whether parties send their profiles."""
        return self.weighs_by_profile or bool(self.aggregation or self.sampling or self.fusion)

    @property
    def weighs_by_profile(self) -> bool:
        """Whether the server sends each party its weight of the regularisation."""
        return bool(self.mu and self.weight == "profile")

    @property
    def uses_views(self) -> bool:
        """Whether masked views of samples are trained on."""
        return bool(self.distillation or self.views)


class EvaluationSection(_Section):
    """When and on what the global adapter is tested.

    every: rounds between tests on the way (0: none). limit: samples of those tests. The final
    adapter is tested on all test samples under each of `conditions`. held_out: the share of each
    party's own samples that it does not train on and tests the final adapter on. drift: measure how
    far the updates of a round, and whole and masked test samples in the model, lie apart.
    """

    every: int = Field(5, ge=0)
    limit: int | None = Field(None, ge=1)
    conditions: tuple[Literal["both", "image_withheld", "text_withheld", "neither"], ...] = Field(
        CONDITION_NAMES, min_length=1
    )
    batch_size: int = Field(64, ge=1)
    held_out: float = Field(0.0, ge=0, lt=1)
    drift: bool = False


class Config(_Section):
    """One experiment. `data`, `scenario`, `algorithm`, `aggregation` and `trained` carry their own
    options."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    title: str = ""
    seed: int = Field(0, ge=0)
    topology: Literal["federated", "centralised", "local", "zero-shot"] = "federated"
    prompt: Literal["plain", "agnostic"] = "plain"
    threads: int = Field(1, ge=1)
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    trained: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    partition: PartitionSection = PartitionSection()
    scenario: dict[str, Any] = Field(default_factory=dict)
    algorithm: dict[str, Any] = Field(default_factory=dict)
    aggregation: dict[str, Any] = Field(default_factory=dict)
    training: TrainingSection = TrainingSection()
    strategy: StrategySection = StrategySection()
    evaluation: EvaluationSection = EvaluationSection()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides and check everything.

    Raises `UserError` that lists all problems, each with what is allowed.
    """
    file = Path(path)
    raw = read_yaml(file)
    raw.setdefault("name", file.stem)
    raw.pop(HASH_KEY, None)  # a run's own config.yaml can be run again
    return make_config(raw, overrides, source=str(file))


def read_yaml(file: Path, kind: str = "config") -> dict[str, Any]:
    """A mapping from a YAML file. Raises `UserError` that names the file, line and fault."""
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        near = _nearest_file(file)
        raise UserError(f"{kind} {str(file)!r} does not exist{near}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{kind} {str(file)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}, column {where.column + 1}" if where else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise UserError(f"{kind} {str(file)!r} is not valid YAML{line}: {problem}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{kind} {str(file)!r} must be a mapping of keys to values")
    try:
        json.dumps(raw, default=str, skipkeys=True)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{kind} {str(file)!r} has a value that holds itself: {error}") from error
    return raw


def make_config(
    raw: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "config"
) -> Config:
    """Check a mapping (with overrides applied) and return the resolved config."""
    config, problems = check_config(raw, overrides)
    if config is None:
        listed = "\n".join(f"  - {line}" for line in problems)
        count = len(problems)
        raise UserError(f"{source}: {count} problem{'s' * (count > 1)}\n{listed}")
    return config


def check_config(
    raw: Mapping[str, Any], overrides: Sequence[str] = ()
) -> tuple[Config | None, list[str]]:
    """The resolved config and no problem, or None and every problem once."""
    merged, problems = _with_overrides(raw, overrides)
    for section in SHORTHAND:
        if isinstance(merged.get(section), str):
            merged[section] = {"name": merged[section]}
    merged, more = _with_setting(merged)
    problems += more
    config: Config | None = None
    try:
        config = Config.model_validate_json(json.dumps(merged, default=str))
    except ValidationError as error:
        problems += [_explain(item, merged) for item in error.errors()]
    chosen = {}
    for section, registry, kind, default in NAMED:
        chosen[section], lines = _options(section, merged.get(section), registry, kind, default)
        problems += lines
    _weigh_alike(chosen, merged)
    if config is not None:
        config = config.model_copy(update=chosen)
        problems += _combinations(config) if all(chosen.values()) else []
    return (None, list(dict.fromkeys(problems))) if problems else (config, [])


def config_hash(config: Config) -> str:
    """SHA-256 of what decides the numbers, as it stands in every result."""
    return config_digest(config.model_dump(mode="json"))


def options_of(section: Mapping[str, Any]) -> dict[str, Any]:
    """A named section's own options: all of it but the name."""
    return {key: value for key, value in section.items() if key != "name"}


# -- problems ----------------------------------------------------------------------------------


def _with_overrides(
    raw: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    merged: dict[str, Any] = json.loads(json.dumps(dict(raw), default=str))
    problems = []
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or not key:
            problems.append(f"override {item!r} must read key=value, e.g. training.rounds=5")
            continue
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            problems.append(f"override {item!r}: the value is not valid YAML")
            continue
        problems += _put(merged, key.split("."), value, item)
    return merged, problems


def _put(tree: dict[str, Any], path: list[str], value: Any, item: str) -> list[str]:
    """Set a nested key."""
    for part in path[:-1]:
        if part in SHORTHAND and isinstance(tree.get(part), str):
            tree[part] = {"name": tree[part]}
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            return [f"override {item!r}: {part!r} is not a section"]
    tree[path[-1]] = value
    return []


def _with_setting(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Expand `setting: missing-b0.5`, one of the paper's twelve, into scenario and alpha."""
    if "setting" not in raw:
        return raw, []
    raw = dict(raw)
    name = raw.pop("setting")
    if not isinstance(name, str) or name not in SETTINGS:
        return raw, [unknown("setting", name, SETTINGS)]
    partition = raw.get("partition") or {}
    if "scenario" in raw or (isinstance(partition, dict) and "alpha" in partition):
        return raw, [
            f"setting {name!r} fixes the scenario and partition.alpha: give either the setting "
            "or those keys, not both"
        ]
    found = SETTINGS[name]
    raw["scenario"] = {"name": found.scenario, **found.options}
    raw["partition"] = {**(partition if isinstance(partition, dict) else {}), "alpha": found.alpha}
    return raw, []


def _options(
    section: str, given: Any, registry: Mapping[str, Any], kind: str, default: str
) -> tuple[dict[str, Any], list[str]]:
    """Check a section whose options come from a registry entry; fill in the defaults."""
    if not isinstance(given, dict | None):
        return {}, [f"{section}: {given!r} is not a section: give {section}: {{name: {default}}}"]
    given = {"name": default, **(given or {})}
    if not isinstance(given["name"], str) or given["name"] not in registry:
        return {}, [f"{section}.name: {unknown(kind, given['name'], registry)}"]
    allowed = registry[given["name"]].options
    full = {"name": given["name"], **allowed}
    problems = []
    for key, value in given.items():
        if key == "name":
            continue
        if key not in allowed:
            what = f"option of {kind} {given['name']}"
            hint = unknown(what, key, allowed) if allowed else f"{given['name']} has no options"
            problems.append(f"{section}.{key}: {hint}")
        elif section != "scenario" and not _same_type(value, allowed[key]):
            problems.append(
                f"{section}.{key}: {value!r} is not {_type_words(allowed[key])}, as "
                f"{allowed[key]!r} is"
            )
        else:
            number = isinstance(allowed[key], float) and isinstance(value, int)
            full[key] = float(value) if number else value
    if section == "scenario" and not problems:  # scenarios check their own values
        try:
            check_options(full["name"], options_of(full))
        except UserError as error:
            problems.append(f"scenario: {error}")
    return full, problems


def _weigh_alike(chosen: Mapping[str, dict[str, Any]], given: Mapping[str, Any]) -> None:
    """An aggregation that counts all clients alike: the algorithm's weighting says so, unless the
    user says otherwise (which is a problem)."""
    own = given.get("algorithm") or {}
    alike = chosen["aggregation"].get("name", "mean") != "mean"
    if alike and "weighting" in chosen["algorithm"] and "weighting" not in own:
        chosen["algorithm"]["weighting"] = "uniform"


def _same_type(value: Any, default: Any) -> bool:
    if default is None:
        return value is None or isinstance(value, str | int | float | list)
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(default, tuple | list):
        return isinstance(value, list)
    return isinstance(value, type(default))


def _type_words(default: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    return names.get(type(default), "a list")


def _explain(item: Any, raw: Mapping[str, Any]) -> str:
    """One pydantic error in the project's words: where, what was given, what is allowed."""
    path = [str(part) for part in item["loc"]]
    where = ".".join(path)
    if item["type"] == "extra_forbidden":
        allowed = _fields_at(path[:-1])
        hint = _near(path[-1], allowed)
        section = f"{'.'.join(path[:-1])} takes" if path[:-1] else "an experiment takes"
        return f"{where}: unknown key; {section} {', '.join(allowed)}{hint}"
    if item["type"] == "missing":
        return f"{where}: is needed"
    message = item["msg"].removeprefix("Input ").replace("should be", "must be")
    given = item["input"]
    near = ""
    if item["type"] == "literal_error" and isinstance(given, str):
        expected = str(item["ctx"]["expected"])
        near = _near(given, [w.strip("' ") for w in expected.replace(" or ", ", ").split(",")])
    return f"{where}: {given!r} {message}{near}"


def _near(given: str, allowed: Sequence[str]) -> str:
    match = difflib.get_close_matches(given, allowed, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _fields_at(path: Sequence[str]) -> list[str]:
    model: Any = Config
    for part in path:
        model = model.model_fields[part].annotation
    names = list(model.model_fields)
    return [*names, "setting"] if model is Config else names


def _combinations(config: Config) -> list[str]:
    """Values that are each fine and together are not."""
    problems = []
    training, clients = config.training, config.partition.clients
    ready = DATASETS[config.data["name"]].ready  # how many parties there are, the files say
    if config.model.path is None and config.model.name not in MODELS:
        problems.append(
            f"model.name: {unknown('model', config.model.name, MODELS)}; or give model.path"
        )
    if config.topology == "federated" and training.clients_per_round > clients and not ready:
        problems.append(
            f"training.clients_per_round: {training.clients_per_round} of {clients} clients "
            f"cannot be sampled: at most {clients}, or raise partition.clients"
        )
    if config.model.path is not None and config.model.name in MODELS:
        problems.append(
            f"model.name: the model at model.path needs a name of its own, not "
            f"{config.model.name!r}, e.g. model.name=mine"
        )
    if training.micro_batch > training.batch_size:
        problems.append(
            f"training.micro_batch: {training.micro_batch} is more than training.batch_size "
            f"{training.batch_size}: the step's samples cannot fill it"
        )
    try:  # draws nothing of weight: who holds what by name alone
        assign(
            config.scenario["name"],
            [str(client) for client in range(clients)],
            options=options_of(config.scenario),
            seed=config.seed,
        )
    except UserError as error:
        problems += [] if ready else [f"scenario: {error}"]
    try:
        make_policy(config.trained["name"], **options_of(config.trained))
    except UserError as error:
        problems.append(f"trained: {error}")
    try:
        algorithm = make_algorithm(
            config.algorithm["name"], num_clients=clients, **options_of(config.algorithm)
        )
        problems += _aggregation_problems(config, algorithm)
    except UserError as error:
        problems.append(f"algorithm: {error}")
    if config.topology != "federated" and config.algorithm["name"] != "fedavg":
        problems.append(
            f"algorithm.name: topology {config.topology} has nothing to aggregate, so "
            f"{config.algorithm['name']} would do nothing: leave fedavg or choose "
            "topology federated"
        )
    problems += _strategy_problems(config)
    if config.evaluation.limit is not None and config.evaluation.limit < 2:
        problems.append("evaluation.limit: at least 2 samples are needed for a metric")
    return problems


def _aggregation_problems(config: Config, algorithm: Algorithm) -> list[str]:
    """What does not go with an aggregation that counts all clients alike, and rounds too small."""
    name = config.aggregation["name"]
    try:
        aggregation = make_aggregation(**config.aggregation)
        with_aggregation(algorithm, aggregation)
    except UserError as error:
        return [f"aggregation: {error}"]
    if name == "mean":
        return []
    if config.topology != "federated":
        return [
            f"aggregation.name: topology {config.topology} has nothing to aggregate, so {name} "
            "would do nothing: leave mean or choose topology federated"
        ]
    problems = []
    if algorithm.weighting == "samples":
        problems.append(
            f"algorithm.weighting: aggregation {name} counts all clients alike, since a client's "
            "number of samples is a claim of its own: leave it out or set uniform"
        )
    for key in ("aggregation", "prototypes"):
        if getattr(config.strategy, key):
            problems.append(f"strategy.{key}: {_NOT_ALIKE[key].format(name=name)}")
    return problems + _too_small(config, aggregation)


_NOT_ALIKE = {
    "aggregation": "it weighs updates by what parties state of themselves, and aggregation {name} "
    "counts them alike: leave one of the two off (strategy.sampling goes with it)",
    "prototypes": "class prototypes are means of what parties send, of which aggregation {name} "
    "protects none: leave one of the two off",
}


def _too_small(config: Config, aggregation: Aggregation) -> list[str]:
    size = config.training.clients_per_round
    try:
        check_enough(aggregation, size, f"training.clients_per_round is {size}")
    except UserError as error:
        return [f"aggregation: {error}"]
    return []


def _strategy_problems(config: Config) -> list[str]:
    """Keys of the strategy that would do nothing, which is never what was meant."""
    strategy, plain, problems = config.strategy, StrategySection(), []
    given = [key for key in type(strategy).model_fields if _differs(strategy, plain, key)]
    for key in given:
        switch = _SWITCH.get(key)
        if switch and not getattr(strategy, switch):
            problems.append(f"strategy.{key}: does nothing without strategy.{switch}: set that too")
    if config.topology == "zero-shot" and given:
        problems.append(
            f"strategy.{given[0]}: topology zero-shot trains nothing: leave the strategy out"
        )
        return problems
    shared = ("mu", "aggregation", "sampling", "mixtures", "evidence", "fusion")
    for key in shared if config.topology != "federated" else ():
        if getattr(strategy, key):
            problems.append(
                f"strategy.{key}: topology {config.topology} has no parties that could differ: "
                "leave it at 0 or choose topology federated"
            )
    if strategy.epsilon is not None and not strategy.uses_profiles:
        problems.append(
            "strategy.epsilon: no party sends a profile to add noise to: set strategy.mu with "
            "strategy.weight=profile, strategy.aggregation, strategy.sampling or strategy.fusion, "
            "or leave it null"
        )
    if strategy.mixtures == 1:
        problems.append("strategy.mixtures: a mixture of 1 image is that image: give 2 or more")
    trains = [key for key in ("connector", "vision") if config.trained.get(key) not in _FROZEN]
    if strategy.mixtures and trains:
        problems.append(
            f"strategy.mixtures: with trained.{trains[0]} image features change each round and "
            "cannot be given once: leave one of the two off"
        )
    if config.evaluation.drift and config.topology == "local":
        problems.append(
            "evaluation.drift: parties that train alone have no common adapter to drift from: "
            "leave it out or choose topology federated"
        )
    return problems


def _differs(section: StrategySection, plain: StrategySection, key: str) -> bool:
    return bool(getattr(section, key) != getattr(plain, key))


def _nearest_file(file: Path) -> str:
    names = [p.name for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
    near = difflib.get_close_matches(file.name, names, n=1)
    return f" (did you mean {str(file.parent / near[0])!r}?)" if near else ""
