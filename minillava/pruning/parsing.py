"""Plans as text: `name:option=value,option=value`, several methods joined by `+`.

Lists are written 8/16/24, whole numbers in a row also 7-12. A preset stands for a plan whose
numbers a paper or its code states; options after a preset's name replace that option in the method
of the preset that has it. On the command line a name may also be FILE.py:Class, a user's own method
(user_methods.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from types import NoneType
from typing import Any, get_args, get_type_hints

from .average import AveragePlan
from .base import Method, Plan
from .fastv import FastV
from .registry import METHODS, PRESETS, Preset
from .user_methods import SPEC, load_file_method


def parse_plan(plan: str | Mapping[str, Any] | None) -> Plan:
    """Read a plan: text, None (nothing is pruned), or FastV's `fastv_config` dict unchanged.

    Raises ValueError, which lists what exists, for unknown names and options and for values of the
    wrong kind.
    """
    if plan is None:
        return Plan()
    if isinstance(plan, Mapping):
        return read_fastv_config(plan)
    if not isinstance(plan, str):
        raise ValueError(f"a plan is a string, a fastv_config dict or None, not {plan!r}")
    return read_plan(plan.strip(), run_files=False)


def parse_plan_with_files(plan: str) -> Plan:
    """Read a plan that a person typed: FILE.py:Class and FILE.py:Class:options run that file.

    This is for commands only, never for text from elsewhere.
    """
    return read_plan(plan.strip(), run_files=True)


def option_fields(method: type[Method]) -> dict[str, dataclasses.Field[Any]]:
    """The options a method takes, by name, those of its own class first."""
    common = {f.name for f in dataclasses.fields(Method)}
    own = vars(method).get("__annotations__", {})
    fields = dataclasses.fields(method)
    return {f.name: f for f in sorted(fields, key=lambda f: (f.name in common, f.name not in own))}


def aliases(method: type[Method]) -> dict[str, str]:
    """Second spellings of options: alias -> name."""
    fields = option_fields(method).values()
    return {f.metadata["alias"]: f.name for f in fields if f.metadata.get("alias")}


def exclusive_options(method: type[Method]) -> list[tuple[str, str]]:
    """Pairs of options of which only one may be given."""
    pairs = [
        (name, other)
        for name, field in option_fields(method).items()
        for other in field.metadata.get("instead_of", ())
    ]
    strengths = {method.strength, *(p for pair in pairs if method.strength in pair for p in pair)}
    return pairs + [("average", name) for name in sorted(strengths)]


# ---------------------------------------------------------------- text -> methods


def read_plan(text: str, run_files: bool) -> Plan:
    if not text or text == "none":
        return Plan(text=text)
    made: list[tuple[Method, float | None]] = []  # methods, each with its average= or None
    tokens = focus = None
    for part in map(str.strip, text.split("+")):
        if found := SPEC.fullmatch(part):
            if not run_files:
                raise ValueError(
                    f"{part}: a method in a file is code; only the command line runs it, "
                    "with --prune"
                )
            cls = load_file_method(f"{found['file']}:{found['cls']}")
            if cls.name in METHODS or cls.name in PRESETS:
                raise ValueError(
                    f"{found['file']}: the name {cls.name!r} is taken; give the method another one"
                )
            made.append(make_method(cls, read_options(cls.name, found["options"] or "")))
            continue
        if part.endswith(".py"):
            raise ValueError(f"{part}: which class? write FILE.py:Class")
        name, _, rest = part.partition(":")
        options = read_options(name, rest)
        if name not in PRESETS:
            made.append(find_method(name, options))
            continue
        expanded = expand_preset(name, PRESETS[name], options)
        made += expanded
        focus = PRESETS[name].focus or focus
        if any(getattr(method, "released", False) for method, _ in expanded):
            tokens = PRESETS[name].tokens or tokens
    methods = tuple(method for method, _ in made)
    averages = [average for _, average in made if average is not None]
    if averages:
        return AveragePlan(methods, tokens, focus, text, average=averages[0])
    return Plan(methods, tokens, focus, text)


def read_options(name: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        key, equals, value = (s.strip() for s in item.partition("="))
        if not (key and equals and value):
            raise ValueError(f"{name}: {item!r} is not option=value")
        if key in options:
            raise ValueError(f"{name}: option {key!r} is given twice")
        options[key] = value
    return options


def find_method(name: str, options: Mapping[str, str]) -> tuple[Method, float | None]:
    if name not in METHODS:
        known = ", ".join([*METHODS, *PRESETS])
        raise ValueError(f"no pruning method {name!r}; there are: {known}")
    return make_method(METHODS[name], options)


def make_method(cls: type[Method], options: Mapping[str, str]) -> tuple[Method, float | None]:
    """The method with these options, and the average that it is to reach, if one is given."""
    name, fields, hints, names = cls.name, option_fields(cls), get_type_hints(cls), aliases(cls)
    values: dict[str, Any] = {}
    for given, text in options.items():
        key = names.get(given, given)
        if key == "average":
            values[key] = read_number(f"{name}: average={text}", text, fraction=True)
            continue
        if key not in fields:
            known = ", ".join([*fields, "average", *names])
            raise ValueError(f"{name} has no option {given!r}; it has: {known}")
        if key in values:
            same = sorted(o for o in options if names.get(o, o) == key)
            raise ValueError(f"{name}: {' and '.join(same)} are the same option; give one")
        choices = fields[key].metadata.get("choices", ())
        values[key] = read_value(f"{name}: {given}={text}", text, hints[key], choices)
    for a, b in exclusive_options(cls):
        if a in values and b in values:
            both = " and ".join(sorted((a, b)))
            raise ValueError(f"{name}: {both} say the same; give one")
    missing = [
        key for key, f in fields.items() if f.default is dataclasses.MISSING and key not in values
    ]
    if "average" in values and cls.strength in fields:
        default = fields[cls.strength].default
        if Ellipsis in plain_types(hints[cls.strength]):  # something valid: average= sets it
            values[cls.strength] = (1.0,) * len(values.get("layers", fields["layers"].default))
        elif default in (None, dataclasses.MISSING):
            values[cls.strength] = 1.0
        missing = [key for key in missing if key != cls.strength]
    if missing:
        kinds = plain_types(hints[missing[0]])
        value = "3/7-12" if Ellipsis in kinds else "0.5" if float in kinds else "16"
        raise ValueError(f"{name} needs {missing[0]}=, for example {name}:{missing[0]}={value}")
    average = values.pop("average", None)
    return cls(**values), average


def read_value(what: str, text: str, hint: Any, choices: tuple[str, ...]) -> Any:
    """One option's value, by the type of its field."""
    kinds = plain_types(hint)
    if not kinds <= OPTION_TYPES or len(kinds - {NoneType, Ellipsis, int}) > 1:
        raise ValueError(
            f"{what}: its field is annotated {hint}; the text of a plan can be read for int, float,"
            " str, bool, each also with `| None`, tuple[int, ...] and tuple[float, ...]"
        )
    if choices and text not in choices:
        raise ValueError(f"{what}: must be one of {', '.join(choices)}")
    if str in kinds:
        return text
    if bool in kinds:
        if text not in ("0", "1"):
            raise ValueError(f"{what}: must be 0 or 1")
        return text == "1"
    if Ellipsis not in kinds:
        return read_number(what, text, float in kinds)
    items = text.split("/")
    if float in kinds:
        return tuple(read_number(what, item, fraction=True) for item in items)
    return tuple(number for item in items for number in read_range(what, item))


LONGEST_RANGE = 100_000  # all patches of many images
OPTION_TYPES = frozenset((int, float, str, bool, NoneType, Ellipsis))


def plain_types(hint: Any) -> set[Any]:
    """The plain types in an annotation; an Ellipsis among them stands for a list."""
    parts = get_args(hint)
    return set().union(*map(plain_types, parts)) if parts else {hint}


def read_number(what: str, text: str, fraction: bool) -> int | float:
    if re.fullmatch(r"-?\d{1,9}", text, re.ASCII):
        return int(text)
    if fraction and re.fullmatch(r"-?(\d{1,9}\.\d*|\.\d+)", text, re.ASCII):
        return float(text)
    allowed = "a whole number, or a share such as 0.5" if fraction else "a whole number"
    raise ValueError(f"{what}: must be {allowed}")


def read_range(what: str, text: str) -> Iterable[int]:
    """A whole number, or several in a row: 7-12."""
    found = re.fullmatch(r"(\d{1,9})-(\d{1,9})", text, re.ASCII)
    if found is None:
        return (int(read_number(what, text, fraction=False)),)
    first, last = map(int, found.groups())
    if not 0 <= last - first <= LONGEST_RANGE:
        raise ValueError(f"{what}: {text} must ascend, by {LONGEST_RANGE} at most")
    return range(first, last + 1)


def expand_preset(
    name: str, preset: Preset, options: Mapping[str, str]
) -> list[tuple[Method, float | None]]:
    """The methods of a preset, with options replaced in the one method that has them."""
    parts = []
    for part in preset.plan.split("+"):
        part_name, _, rest = part.partition(":")
        parts.append((METHODS[part_name], read_options(part_name, rest)))
    for key, value in options.items():
        owners = [
            (method, given)
            for method, given in parts
            if key == "average" or aliases(method).get(key, key) in option_fields(method)
        ]
        if len(owners) != 1:
            known = sorted({k for m, _ in parts for k in option_fields(m)})
            why = (
                f"{' and '.join(m.name for m, _ in owners)} both have it"
                if owners
                else f"it has: {', '.join(known)}"
            )
            raise ValueError(f"{name}: {key}: {why}; the long form is {preset.plan}")
        method, given = owners[0]
        full = aliases(method).get(key, key)
        for pair in exclusive_options(method):  # another way to say it replaces the preset's
            if full in pair:
                for other in set(pair) - {full} - options.keys():
                    given.pop(other, None)
        given[full] = value
    return [make_method(method, given) for method, given in parts]


# ---------------------------------------------------------------- methods -> text


def write_plan(plan: Plan) -> str:
    """The text of an equal plan, with presets and average= solved; "none" without methods."""
    return "+".join(map(write_method, plan.methods)) or "none"


def write_method(method: Method) -> str:
    cls = METHODS.get(method.name, type(method))
    if not isinstance(method, cls):  # FastVWindow is written as fastv, a user's method is not
        cls = type(method)
    name = f"{method.file}:{type(method).__name__}" if method.file else method.name
    fields, common = option_fields(cls), {f.name for f in dataclasses.fields(Method)}
    values = {key: getattr(method, key) for key in fields}
    replaced = {
        other
        for key, f in fields.items()
        if values[key] is not None
        for other in f.metadata.get("instead_of", ())
    }
    options = [
        f"{key}={write_value(value)}"
        for key, value in values.items()
        if key not in replaced and value is not None
        # numbers are written even if they are the default, since a reader looks for them
        if value != fields[key].default or not (key in common or isinstance(value, str | bool))
    ]
    return f"{name}:{','.join(options)}" if options else name


def write_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{Decimal(str(value)):f}"  # 0.00005, not 5e-05
    if not isinstance(value, tuple):
        return str(int(value) if isinstance(value, bool) else value)
    runs: list[list[Any]] = []
    for item in value:  # numbers in a row are written as a range
        if runs and isinstance(item, int) and item == runs[-1][-1] + 1:
            runs[-1].append(item)
        else:
            runs.append([item])
    return "/".join(
        f"{run[0]}-{run[-1]}" if len(run) > 3 else "/".join(map(write_value, run)) for run in runs
    )


def name_plan(plan: Plan) -> str:
    """A plan as it was written, with what an average= or a preset in it stands for; an object that
    was made in Python in full."""
    names = {part.partition(":")[0].strip() for part in plan.text.split("+")}
    if not plan.text or "average=" in plan.text or names & PRESETS.keys():
        return f"{plan.text} = {write_plan(plan)}".removeprefix(" = ")
    return plan.text


# ---------------------------------------------------------------- FastV's own dict


@dataclass(frozen=True)
class FastVWindow(FastV):
    """FastV with the window of image tokens that its dict states, checked against the prompt."""

    window: tuple[int, int] = (0, 0)  # first image token, number of image tokens

    name = "fastv"

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        super().check(n_layers, n_tokens, starts)
        if [self.window] != [(start, n_tokens) for start in starts]:
            found = ", ".join(f"{s}..{s + n_tokens - 1}" for s in starts)
            start, length = self.window
            raise ValueError(
                f"fastv_config: image_token_start_index={start}, image_token_length={length} is "
                f"{start}..{start + length - 1}, but the prompt's image tokens are {found}"
            )


def read_fastv_config(config: Mapping[str, Any]) -> Plan:
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
    return Plan((FastVWindow(layer=k, r=r, window=window),), text=f"fastv:k={k},r={r}")
