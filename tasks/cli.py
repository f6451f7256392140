"""From a command line to recipes. Imports Hydra, never torch: all that is wrong is said before anything starts."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from budgeted.cells import undamaged
from budgeted.errors import UserError, nearest
from budgeted.files import read_json
from budgeted.recipe import Config, Recipe, known_key, resolve, same_types, validate
from budgeted.schedules import SCHEDULES
from tasks import compat, layouts, weights, zoo

log = logging.getLogger("budgeted")

CONF = Path(__file__).resolve().parent.parent / "conf"
GROUPS = ("task", "schedule", "budget", "optimizer")
MODES = ("train", "plan", "status", "report", "check", "prepare", "probe")
SAID_BY_DATA = ("task.samples", "task.val_samples", "task.classes")
NEED_A_RUN = ("refined", "replay")  # schedules made from an earlier run: glob(*) leaves them out
# Hydra answers these itself; nothing of ours runs.
HYDRA_FLAGS = (
    "--help",
    "-h",
    "--hydra-help",
    "--version",
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--shell-completion",
    "-sc",
)


def as_hydra_reads(arguments: Sequence[str]) -> list[str]:
    """Options first, as argparse stops at the second row of words; ~/ in a value as the folder that it means."""
    words = [
        f"{k}{sep}{os.path.expanduser(v)}" if v.startswith("~/") else a
        for a in arguments
        for k, sep, v in [a.partition("=")]
    ]
    return sorted(words, key=lambda word: word not in ("-m", "--multirun"))


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise UserError, in one line, for what is wrong with a command line."""
    if any(a.split("=")[0] in HYDRA_FLAGS for a in arguments):
        return
    unknown = [a for a in arguments if a.startswith("-") and a not in ("-m", "--multirun")]
    if unknown:
        raise UserError(f"{unknown[0]}: no such option; -m for a sweep, --help, and key=value for all else")
    multirun = any(a in ("-m", "--multirun") for a in arguments)
    overrides = parse(a for a in arguments if not a.startswith("-"))
    if {"budget", "budget.amount"} <= {o.key_or_group for o in overrides}:
        raise UserError("budget= and budget.amount= are both given: one of them")
    for override in overrides:
        _check(override, multirun)
    # The cells of a sweep are checked by the sweeper, each as a whole; here what Hydra composes before it.
    words = tuple(o.input_line or "" for o in overrides if not o.is_sweep_override())
    mode = next((str(o.value()) for o in reversed(overrides) if o.key_or_group == "mode"), "train")
    if multirun:
        configuration(words)
    elif mode in ("train", "plan", "probe"):
        recipe(words)
    else:
        _validated(words)
    _refuse_what_hydra_refuses([o.input_line or "" for o in overrides], multirun)


def _refuse_what_hydra_refuses(words: list[str], multirun: bool) -> None:
    """Compose once as Hydra will: a + too many or too few, an unknown launcher and the like, in one line."""
    try:
        _loader().load_configuration("config", words, RunMode.MULTIRUN if multirun else RunMode.RUN)
    except (HydraException, OmegaConfBaseException, AssertionError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError("; ".join(line for line in lines if "object_type" not in line)[:300]) from None


def parse(arguments: Iterable[str]) -> list[Override]:
    """Hydra's reading of `key=value` words. Raises UserError for one it cannot read."""
    return [_parsed(argument) for argument in arguments]


@functools.cache
def _parsed(argument: str) -> Override:
    if "=" not in argument and not argument.startswith("~"):
        raise UserError(f"{argument}: not an option; write key=value, e.g. task=imagenet_tiny budget=10%")
    try:  # parse_overrides, unlike parse_override, lets glob(*) see the options
        return OverridesParser.create(config_loader=_loader()).parse_overrides([argument])[0]
    except (HydraException, ValueError):
        raise UserError(
            f"{argument[:200]}: cannot be read; quote a value that holds a comma, bracket, space or ="
        ) from None


def _check(override: Override, multirun: bool) -> None:
    """What can be told of one override without composing."""
    key = override.key_or_group
    if key == "hydra/launcher" and isinstance(override.value(), str):
        _check_launcher(str(override.value()))
    if _is_hydras(override):
        return
    if override.is_delete():
        raise UserError(f"{override.input_line}: nothing of the configuration can be deleted")
    if key == "sweep" and not multirun:
        raise UserError(f"sweep={override.value()}: a sweep needs -m: python run.py -m sweep={override.value()}")
    if key in SAID_BY_DATA:
        raise UserError(f"{key}: says what data the recipe is for; data.root and data.subset choose what is trained on")
    if key == "sweep" and override.is_sweep_override():
        raise UserError(f"{override.input_line}: one sweep at a time")
    if key in (*GROUPS, "sweep"):
        for value in _values(override):
            _check_option(key, value)
    if key == "mode" and override.is_sweep_override():
        raise UserError(f"{override.input_line}: one mode at a time")
    if key == "mode" and str(override.value()) not in MODES:
        raise UserError(f"mode={override.value()}: no such mode; {nearest(str(override.value()), MODES)}")
    if override.is_sweep_override() and not multirun:
        raise UserError(f"{override.input_line}: several values need -m: python run.py -m '{override.input_line}'")


def _check_launcher(name: str) -> None:
    _loader()  # registers the launchers of Hydra's plugins
    theirs = (option.removesuffix(".yaml") for option in ConfigStore.instance().repo["hydra"]["launcher"])
    known = {*options("hydra/launcher"), *theirs}
    if name not in known:
        raise UserError(f"hydra/launcher={name}: no such launcher; {nearest(name, known)}")


def _check_option(group: str, value: Any) -> None:
    name, found = str(value), options(group)
    if name in found or (group == "sweep" and value is None):
        return
    if group == "budget":
        near = f"budget={name}%" if f"{name}%" in found else f"budget.amount={name}"
        near += "" if near.endswith("%") or name[-1:].isalpha() else "%"
        raise UserError(f"budget={name}: no such option; write {near} (options: {', '.join(found)})")
    if group == "schedule" and name in SCHEDULES:
        raise UserError(f"schedule={name}: conf/schedule/{name}.yaml is missing; its first line is `name: {name}`")
    raise UserError(f"{group}={name}: no such {group}; {nearest(name, found)}")


def _values(override: Override) -> list[Any]:
    if not override.is_sweep_override():
        return [override.value()]
    try:
        return list(override.sweep_iterator())
    except HydraException as error:
        raise UserError(f"{override.input_line}: {str(error).splitlines()[0]}") from None


def _is_hydras(override: Override) -> bool:
    return override.key_or_group.split(".")[0].split("/")[0] == "hydra"


@functools.cache
def options(group: str) -> tuple[str, ...]:
    """The options of a config group; budgets in their order."""
    names = [p.stem for p in (CONF / group).glob("*.yaml")]
    return tuple(sorted(names, key=lambda n: (float(n[:-1]), "") if n.endswith("%") else (0.0, n)))


def help_text() -> str:
    """What --help prints. Hydra's own listing of the groups takes half a second."""
    template = OmegaConf.load(CONF / "config.yaml").hydra.help.template
    groups = (*GROUPS, "sweep", "hydra/launcher")
    return template.replace(
        "$APP_CONFIG_GROUPS", "\n".join(f"  {g}: {', '.join(options(g))}" for g in groups if options(g))
    )


# -- one cell -----------------------------------------------------------------------------------------------


def recipe(overrides: tuple[str, ...]) -> Recipe:
    """The recipe of one cell from its words. Raises UserError for anything wrong with it."""
    parsed = [o for o in parse(overrides) if not _is_hydras(o)]
    choices = {o.key_or_group: str(o.value()) for o in parsed if o.key_or_group in GROUPS}
    return _recipe(configuration(overrides), choices)


def recipe_of(cfg: Any, choices: Mapping[str, str | None]) -> Recipe:
    """The recipe of the configuration that Hydra composed for a job, with its choice of group options."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    plain["optimizer"] = _fitting(plain["optimizer"])
    return _recipe(plain, {g: str(choices[g]) for g in GROUPS if choices.get(g)})


def _validated(overrides: tuple[str, ...]) -> Config:
    """The configuration of one cell, its values checked but nothing looked up on disk."""
    choices = {o.key_or_group: str(o.value()) for o in parse(overrides) if o.key_or_group in GROUPS}
    cfg = configuration(overrides)
    _check_values(cfg, _assembled(tuple(sorted(choices.items()))))
    return cfg


def _check_values(cfg: Config, named: Config) -> None:
    validate(cfg)
    same_types(cfg, named)
    for group in ("task", "schedule", "optimizer"):
        if cfg[group]["name"] != named[group]["name"]:  # the parts of it that go with the name are not here
            raise UserError(f"{group}.name={cfg[group]['name']}: write {group}={cfg[group]['name']}")


def _recipe(cfg: Config, choices: Mapping[str, str]) -> Recipe:
    _check_values(cfg, _assembled(tuple(sorted(choices.items()))))
    # A cell's directory says task, schedule and budget: another optimizer departs from it like any other value.
    named = _assembled(tuple(sorted((k, v) for k, v in choices.items() if k != "optimizer")))
    if cfg["schedule"].get("run") == "???":
        raise UserError(f"schedule={cfg['schedule']['name']}: needs schedule.run=DIR, the directory of an earlier run")
    own = cfg["optimizer"].get("lr")
    if own is not None and cfg["task"]["lr"] != named["task"]["lr"]:
        name = cfg["optimizer"]["name"]
        raise UserError(
            f"task.lr={cfg['task']['lr']}: is the rate of sgd; with optimizer={name} set optimizer.lr ({own})"
        )
    if cfg["mode"] in ("train", "probe"):
        _check_model(json.dumps({k: v for k, v in cfg.items() if k not in ("seed", "schedule", "budget")}))
        _check_out(cfg["out"])
    data = _nominal(cfg) if cfg["mode"] in ("plan", "status") else None
    if data is None:
        data = _inspect(cfg["task"]["name"], str(cfg["data"]["root"]), cfg["data"]["subset"], cfg["task"]["adapter"])
    found = resolve(cfg, named, data)
    if cfg["mode"] == "train":
        found.cell.refuse_other_result()
        found.refuse_other_data()
    return found


@functools.cache
def _check_out(out: str) -> None:
    """Raise UserError where no folder of runs can be made."""
    path = Path(out).absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    if not there.is_dir():
        raise UserError(f"out={out}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"out={out}: {there} may not be written to")


@functools.cache
def _check_model(parts: str) -> None:
    """What can be told of a model and its weights without importing torch; an absent package is named later.

    `parts`: the configuration as JSON, without what most cells of a sweep differ in.
    """
    cfg = json.loads(parts)
    adapter, model = cfg["task"]["adapter"], cfg["task"]["model"]
    if adapter == "detection":
        zoo.check(cfg)
    elif adapter == "segmentation":
        if importlib.util.find_spec("mmseg"):
            compat.mmseg_config(model)
    elif (known := compat.model_names(adapter)) and model not in known:
        raise UserError(f"task.model={model}: no such model; {nearest(model, known)}")
    weights.address(cfg)


def _nominal(cfg: Config) -> layouts.Data | None:
    """The data that the recipe is for, where they are not here: enough to price a cell, not to train it."""
    task, root, subset = cfg["task"], Path(str(cfg["data"]["root"])).expanduser(), cfg["data"]["subset"]
    if root.is_dir():
        return None
    samples, held = task.get("samples"), task.get("val_samples")
    if samples is None:
        samples, held = _counted(str(cfg["out"]), task["name"]) or (None, held)
    if samples is None and task["full"].endswith("it"):
        samples = subset or task["batch_size"]
    if samples is None:
        return None
    classes = tuple(str(k) for k in range(task["classes"] or 0))
    return layouts.Data(task["name"], root, min(samples, subset or samples), held or 0, classes)


@functools.cache
def _counted(out: str, task: str) -> tuple[int, int] | None:
    """(training, validation) samples of the largest copy of a task's data that its runs and probes under `out` had."""
    found: list[tuple[int, int]] = []
    for path in [*Path(out).glob(f"{task}/*/*/*/result.json"), *Path(out).glob("probe/*.json")]:
        result = read_json(path) or {}
        whole, data = path.name != "result.json" or undamaged(result), result.get("data")
        if whole and result.get("task") == task and isinstance(data, dict):
            train, held = data.get("n_train"), data.get("n_val")
            if type(train) is int and type(held) is int and min(train, held) > 0:
                found.append((train, held))
    return max(found, default=None)


@functools.cache
def _inspect(task: str, root: str, subset: int | None, adapter: str) -> layouts.Data:
    return layouts.inspect({"task": {"name": task, "adapter": adapter}, "data": {"root": root, "subset": subset}})


def configuration(overrides: tuple[str, ...]) -> Config:
    """The composed configuration as plain values, equal to what Hydra hands to a job for the same words."""
    parsed = [o for o in parse(overrides) if not _is_hydras(o)]
    choices = {o.key_or_group: str(o.value()) for o in parsed if o.key_or_group in GROUPS}
    cfg = _copied(_assembled(tuple(sorted(choices.items()))))
    interpolated = False
    for override in parsed:
        key = override.key_or_group
        if key in (*GROUPS, "sweep"):
            continue
        known_key(key, cfg)
        *sections, last = key.split(".")
        node = cfg
        for section in sections:
            node = node.setdefault(section, {})
        if isinstance(node.get(last), dict) and node[last]:
            raise UserError(
                f"{override.input_line}: {key} is a section; set one of {', '.join(f'{key}.{k}' for k in node[last])}"
            )
        node[last] = override.value()
        interpolated |= "${" in str(node[last])
    if interpolated:
        try:
            cfg = OmegaConf.to_container(OmegaConf.create(cfg), resolve=True)  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            raise UserError(str(error).splitlines()[0]) from None
    return cfg


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value


@functools.cache
def _assembled(choices: tuple[tuple[str, str], ...]) -> Config:
    """A configuration from its groups, each composed once: a thousand cells need a few dozen compositions."""
    chosen = dict(choices)
    cfg = dict(_composed(tuple(f"{g}={chosen[g]}" for g in ("task", "optimizer") if g in chosen)))
    for group in ("schedule", "budget"):
        if group in chosen:
            cfg[group] = _composed((f"{group}={chosen[group]}",))[group]
    for group in GROUPS[:2]:
        if group in chosen and not isinstance(cfg[group].get("name"), str):
            raise UserError(f"conf/{group}/{chosen[group]}.yaml: lacks its name; its first line is `name: ...`")
    return {**cfg, "optimizer": _fitting(cfg["optimizer"])}


def _fitting(optimizer: Config) -> Config:
    """Without what a recipe says of another optimizer: kinetics wants Nesterov's momentum, where there is one."""
    path = CONF / "optimizer" / f"{optimizer['name']}.yaml"
    return {k: v for k, v in optimizer.items() if k in _keys(path)} if path.exists() else optimizer


@functools.cache
def _keys(path: Path) -> frozenset[str]:
    return frozenset(str(key) for key in OmegaConf.load(path))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> Config:
    try:
        cfg = _loader().load_configuration("config", list(overrides), RunMode.RUN)
    except yaml.YAMLError as error:
        raise UserError(
            f"{' '.join(overrides)}: its file in conf/ is no YAML: {' '.join(str(error).split())}"
        ) from None
    plain: Any = {k: v for k, v in OmegaConf.to_container(cfg, resolve=False).items() if k != "hydra"}  # type: ignore[union-attr]
    return plain


@functools.cache
def _loader() -> ConfigLoaderImpl:
    Plugins.instance()  # registers the sweeper and the launchers that config.yaml names
    launchers = ConfigStore.instance().repo["hydra"]["launcher"]
    for name in options("hydra/launcher"):  # Hydra warns of a preset that has the name of a plugin's own
        launchers.pop(f"{name}.yaml", None)
    return ConfigLoaderImpl(create_config_search_path(str(CONF)))


# -- many cells ---------------------------------------------------------------------------------------------


def expand(arguments: Sequence[str]) -> list[tuple[str, ...]]:
    """The words of every cell of a sweep, in order; a cell that is asked for twice comes once."""
    parsed = parse(arguments)
    for override in parsed:
        _check(override, multirun=True)
    given = {o.key_or_group for o in parsed}
    words: list[str] = []
    for override in parsed:
        line = override.input_line or ""
        if override.key_or_group == "schedule" and override.value_type == ValueType.GLOB_CHOICE_SWEEP:
            line = _without_unusable(override, "schedule.run" in given)
        words.append(line)
    try:
        batches = BasicSweeper.split_arguments(parse(words), None)
    except HydraException as error:
        raise UserError(str(error).splitlines()[0]) from None
    jobs = list(dict.fromkeys(tuple(job) for job in batches[0]))
    if not jobs:
        raise UserError(f"{' '.join(arguments)}: the sweep has no cell")
    return jobs


def _without_unusable(override: Override, has_run: bool) -> str:
    names = [str(v) for v in override.sweep_iterator()]
    if not names:
        raise UserError(f"{override.input_line}: matches no schedule; known: {', '.join(options('schedule'))}")
    kept = [n for n in names if has_run or n not in NEED_A_RUN]
    left_out = sorted(set(names) - set(kept))
    if left_out:
        log.warning("%s leaves out %s, which need schedule.run=DIR", override.input_line, " and ".join(left_out))
    return f"schedule={','.join(kept)}"


def recipes(jobs: Sequence[tuple[str, ...]]) -> list[Recipe]:
    """The recipes of a sweep's cells. Raises UserError for the first cell that has anything wrong."""
    return [recipe(job) for job in jobs]


def embedded_data(cfg: Config) -> None:
    """Write a tiny task's generated data, where it is not there yet."""
    from tasks import tiny

    tiny.ensure(cfg)
