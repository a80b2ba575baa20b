"""Visual-token pruning: the registry of methods, and plans as text.

Grammar: `name:option=value,option=value`, several joined by `+`. Lists are written 8/16/24. Presets
stand for a plan whose numbers a paper or its code states; options behind a preset's name replace
that option in the method of the preset that has it. On the command line a name may also be
FILE.py:Class, a method of the user's own (own.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from .asking import at_work, check_stages
from .base import Context, Keep, Method, Plan
from .baselines import Grid, Pool, Random, TextOnly, Uniform
from .cdpruner import CDPruner
from .cls_attention import FasterVLM, HiRED
from .dart import DART
from .divprune import DivPrune
from .fastv import FastV
from .fitprune import FitPrune
from .hiprune import HiPrune
from .holov import HoloV
from .prumerge import PruMerge, PruMergePlus
from .pyramiddrop import PyramidDrop
from .simignore import Simignore
from .sparsevlm import SparseVLM
from .tome import ToMe
from .trim import TRIM
from .user_methods import SPEC, load_file_method
from .visionzip import VisionZip
from .vispruner import VisPruner
from .vscan import VScan
from .vtw import VTW

__all__ = [
    "METHODS",
    "PRESETS",
    "Context",
    "Keep",
    "Method",
    "Plan",
    "Preset",
    "load_file_method",
    "parse_plan",
    "parse_plan_with_files",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        FastV,
        Simignore,
        SparseVLM,
        PyramidDrop,
        VTW,
        DART,
        FitPrune,
        VisionZip,
        PruMerge,
        PruMergePlus,
        FasterVLM,
        HiRED,
        VisPruner,
        DivPrune,
        TRIM,
        CDPruner,
        HoloV,
        HiPrune,
        VScan,
        ToMe,
        Random,
        Uniform,
        Grid,
        Pool,
        TextOnly,
    )
}


@dataclass(frozen=True)
class Preset:
    """A plan by name. tokens, focus: what the processor is asked for (tokens: if released=1)."""

    plan: str
    source: str
    focus: str | None = None
    tokens: str | None = None


PRESETS: dict[str, Preset] = {
    "simignore-7b": Preset(
        "simignore:keep=452,step=1,i_index=1,mode=mask,until=5+fastv:layer=5,keep=144",
        "released ScienceQA script for LLaVA-1.5-7B, inference_sqa_llava_7b.py",
        focus="options",
        tokens="simignore",
    ),
    "simignore-13b": Preset(
        "simignore:keep=451,step=2,i_index=0,mode=mask,until=4+fastv:layer=4,keep=144",
        "released ScienceQA script for LLaVA-1.5-13B, inference_sqa_llava_13b.py",
        focus="options-lettered",
        tokens="simignore",
    ),
    **{
        f"sparsevlm-{budget}": Preset(
            f"sparsevlm:layers=3/7/16,keep={keep}", f"list of {budget} in the released score.py"
        )
        for budget, keep in {
            192: "300/200/110",
            128: "303/110/36",
            96: "238/48/26",
            64: "66/30/17",
        }.items()
    },
    "visionzip-64": Preset(
        "visionzip:dominant=54,contextual=10", "README of the released code, for 64 tokens"
    ),
    "visionzip-128": Preset(
        "visionzip:dominant=108,contextual=20",
        "128 tokens, split as the README's 54 + 10; the split itself is not in the released code",
    ),
    "visionzip-192": Preset(
        "visionzip:dominant=162,contextual=30",
        "192 tokens, split as the README's 54 + 10; the split itself is not in the released code",
    ),
    "divprune-56": Preset("divprune:keep=0.098", "the paper's ratio: 56 of 576 tokens"),
    "vscan-64": Preset(
        "vscan:keep=96,layer=16,final=32", "released scripts: 64 tokens in the mean over 32 layers"
    ),
}


def parse_plan(plan: str | Mapping[str, Any] | None) -> Plan:
    """Read a plan: text, None (nothing is pruned), or FastV's `fastv_config` dict unchanged.

    Unknown names and options, and values of the wrong kind, raise ValueError and list what exists.
    """
    if plan is None:
        return Plan()
    if isinstance(plan, Mapping):
        return _fastv_config(plan)
    if not isinstance(plan, str):
        raise ValueError(f"a plan is a string, a fastv_config dict or None, not {plan!r}")
    return _read(plan.strip(), files=False)


def parse_plan_with_files(plan: str) -> Plan:
    """The same for text that a person typed: FILE.py:Class and FILE.py:Class:options run that file.

    For the command line alone, never for text from elsewhere.
    """
    return _read(plan.strip(), files=True)


def _read(text: str, files: bool) -> Plan:
    if not text or text == "none":
        return Plan(text=text)
    methods: list[Method] = []
    tokens = focus = None
    for part in text.split("+"):
        if own := SPEC.fullmatch(part.strip()):
            if not files:
                raise ValueError(
                    f"{part.strip()}: a method in a file is code; only the command line runs it, "
                    "with --prune"
                )
            cls = load_file_method(f"{own['file']}:{own['cls']}")
            if cls.name in METHODS or cls.name in PRESETS:
                raise ValueError(f"{own['file']}: {cls.name!r} is here already; name it otherwise")
            with at_work(cls):
                method = _make(cls, _options(cls.name, own["options"] or ""))
            check_stages(method)
            methods.append(method)
            continue
        if part.strip().endswith(".py"):
            raise ValueError(f"{part.strip()}: which class? write FILE.py:Class")
        name, _, rest = part.strip().partition(":")
        options = _options(name, rest)
        if name in PRESETS:
            preset = PRESETS[name]
            made = _from_preset(name, preset, options)
            methods += made
            focus = preset.focus or focus
            if any(getattr(m, "released", False) for m in made):
                tokens = preset.tokens or tokens
        else:
            methods.append(_method(name, options))
    return Plan(tuple(methods), tokens, focus, text)


def option_fields(method: type[Method]) -> dict[str, dataclasses.Field[Any]]:
    """The options a method takes, by name, its own first."""
    fields = [f for f in dataclasses.fields(method) if f.metadata.get("option", True)]
    own = {f.name for f in dataclasses.fields(Method)}
    mine = vars(method).get("__annotations__", {})
    return {f.name: f for f in sorted(fields, key=lambda f: (f.name in own, f.name not in mine))}


def _options(name: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        key, equals, value = (s.strip() for s in item.partition("="))
        if not (key and equals and value):
            raise ValueError(f"{name}: {item!r} is not option=value")
        if key in options:
            raise ValueError(f"{name}: option {key!r} is given twice")
        options[key] = value
    return options


def _method(name: str, options: Mapping[str, str]) -> Method:
    if name not in METHODS:
        known = ", ".join([*METHODS, *PRESETS])
        raise ValueError(f"no pruning method {name!r}; there are: {known}")
    return _make(METHODS[name], options)


def _make(cls: type[Method], options: Mapping[str, str]) -> Method:
    name, fields, hints = cls.name, option_fields(cls), get_type_hints(cls)
    values: dict[str, Any] = {}
    for given, text in options.items():
        key = cls.aliases.get(given, given)
        if key not in fields:
            known = ", ".join([*fields, *cls.aliases])
            raise ValueError(f"{name} has no option {given!r}; it has: {known}")
        if key in values:
            same = sorted(o for o in options if cls.aliases.get(o, o) == key)
            raise ValueError(f"{name}: {' and '.join(same)} are the same option; give one")
        values[key] = _value(f"{name}: {given}={text}", text, hints[key], fields[key])
    for clash in cls.either:
        if len(both := sorted(clash & values.keys())) > 1:
            raise ValueError(f"{name}: {' and '.join(both)} say the same; give one")
    missing = [
        key for key, f in fields.items() if f.default is dataclasses.MISSING and key not in values
    ]
    if missing:
        raise ValueError(f"{name} needs {missing[0]}=, for example {name}:{missing[0]}=0.5")
    return cls(**values)


def _value(what: str, text: str, hint: Any, field: dataclasses.Field[Any]) -> Any:
    """One option's value by the type of its field."""
    choices = field.metadata.get("choices")
    kinds = _kinds(hint)
    if choices:
        if text not in choices:
            raise ValueError(f"{what}: must be one of {', '.join(choices)}")
        return text
    if str in kinds:
        return text
    if bool in kinds:
        if text not in ("0", "1"):
            raise ValueError(f"{what}: must be 0 or 1")
        return text == "1"
    items = text.split("/") if Ellipsis in kinds else [text]
    numbers = [_number(what, item, float in kinds) for item in items]
    return tuple(numbers) if Ellipsis in kinds else numbers[0]


def _kinds(hint: Any) -> set[Any]:
    """The plain types in an annotation; an Ellipsis among them: a list."""
    parts = get_args(hint)
    return set().union(*map(_kinds, parts)) if parts else {hint}


def _number(what: str, text: str, fraction: bool) -> int | float:
    if re.fullmatch(r"-?\d{1,9}", text, re.ASCII):
        return int(text)
    if fraction and re.fullmatch(r"-?(\d{1,9}\.\d*|\.\d+)", text, re.ASCII):
        return float(text)
    allowed = "a whole number, or a share such as 0.5" if fraction else "a whole number"
    raise ValueError(f"{what}: must be {allowed}")


def _from_preset(name: str, preset: Preset, options: Mapping[str, str]) -> list[Method]:
    parts = []
    for part in preset.plan.split("+"):
        method, _, rest = part.partition(":")
        parts.append((method, _options(method, rest)))
    for key, value in options.items():
        owners = [
            (method, given)
            for method, given in parts
            if METHODS[method].aliases.get(key, key) in option_fields(METHODS[method])
        ]
        if len(owners) != 1:
            known = sorted({k for m, _ in parts for k in option_fields(METHODS[m])})
            why = (
                f"{' and '.join(m for m, _ in owners)} both have it"
                if owners
                else f"it has: {', '.join(known)}"
            )
            raise ValueError(f"{name}: {key}: {why}; the long form is {preset.plan}")
        method, given = owners[0]
        full = METHODS[method].aliases.get(key, key)
        for clash in METHODS[method].either:  # another way to say it takes the first one's place
            if full in clash:
                for other in clash - {full} - options.keys():
                    given.pop(other, None)
        given[full] = value
    return [_method(method, given) for method, given in parts]


def _fastv_config(config: Mapping[str, Any]) -> Plan:
    """The dict of FastV's Hugging Face demo."""
    known: dict[str, Any] = {
        "use_fastv": bool,
        "fastv_k": int,
        "fastv_r": (int, float),
        "image_token_start_index": int,
        "image_token_length": int,
    }
    for key, value in config.items():
        if key not in known:
            raise ValueError(f"fastv_config has no {key!r}; it has: {', '.join(known)}")
        if not isinstance(value, known[key]) or (isinstance(value, bool) != (key == "use_fastv")):
            raise ValueError(f"fastv_config: {key}={value!r} is of the wrong kind")
    if not config.get("use_fastv", True):
        return Plan()
    missing = [key for key in known if key not in config and key != "use_fastv"]
    if missing:
        raise ValueError(f"fastv_config needs {', '.join(missing)}")
    k, r = config["fastv_k"], float(config["fastv_r"])
    window = (config["image_token_start_index"], config["image_token_length"])
    return Plan((FastV(layer=k, r=r, window=window),), text=f"fastv:k={k},r={r}")
