"""What the address of the page holds: picture, question, plans, patches chosen by hand.

A page that is loaded again, or opened by somebody else, shows the same. An uploaded picture is not
in the address; there its name is `upload`.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

from . import limits

UPLOAD = "upload"  # stands for a picture that is not in the address


@dataclass(frozen=True)
class State:
    """The choices that a visitor has made. Nothing in it is checked against a model."""

    picture: str  # name of a bundled picture, or UPLOAD
    question: str
    plans: tuple[str, ...] = ()
    patches: str = ""  # list of patches that are kept by hand; empty: all, and no plan by hand
    new_tokens: int | str = 48  # text as it was given, if it was not checked
    budgets: bool = False  # whether each plan is asked at several budgets, too


def write_query(state: State) -> str:
    """The part of the address from the "?" on."""
    pairs = [("picture", state.picture), ("question", state.question)]
    pairs += [("plan", plan) for plan in state.plans]
    pairs += [("patches", state.patches)] if state.patches else []
    pairs += [("tokens", str(state.new_tokens)), ("budgets", str(int(state.budgets)))]
    return "?" + urlencode(pairs, safe=":=,/-")


def read_query(query: str, default: State, pictures: tuple[str, ...]) -> State:
    """The state in an address. What it leaves out is the default's; plans and patches are not.

    Raises ValueError, in one sentence, for entries that do not exist, for values out of their
    limits, and for pictures that are not among `pictures`.
    """
    query = query.removeprefix("?")
    if not query:
        return default
    if len(query) > limits.MAX_LINK:
        raise ValueError(
            f"this address has {len(query)} characters after the ?, but may have "
            f"{limits.MAX_LINK}; make a new one on the page"
        )
    entries: dict[str, list[str]] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        entries.setdefault(name, []).append(value)
    for name, values in entries.items():
        if name not in ("picture", "question", "plan", "patches", "tokens", "budgets"):
            raise ValueError(
                f"this address has {limits.shorten(name)}, but may have picture, question, plan, "
                "patches, tokens and budgets; make a new one on the page"
            )
        if name != "plan" and len(values) > 1:
            raise ValueError(f"this address has {name} {len(values)} times; give it once")
    single = {name: values[0] for name, values in entries.items()}
    picture = single.get("picture", default.picture)
    if picture not in (*pictures, UPLOAD):
        raise ValueError(
            f"there is no picture {limits.shorten(picture)}; there are {', '.join(pictures)}"
        )
    tokens = single.get("tokens", str(default.new_tokens))
    number = int(tokens) if tokens.isascii() and tokens.isdigit() and len(tokens) < 9 else tokens
    budgets = single.get("budgets", str(int(default.budgets)))
    if budgets not in ("0", "1"):
        raise ValueError(f"budgets={limits.shorten(budgets)} must be 0 or 1")
    question = single.get("question", default.question)
    if len(question) > limits.MAX_QUESTION:
        limits.check_question(question)  # says so
    return State(
        picture,
        question,
        limits.split_plans("\n".join(entries.get("plan", []))),
        single.get("patches", "")[: limits.MAX_PATCHES],
        limits.check_new_tokens(number),
        budgets == "1",
    )
