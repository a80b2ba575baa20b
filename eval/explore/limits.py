"""What the page accepts. Every check raises ValueError with one sentence, which the page shows."""

from __future__ import annotations

import re
from dataclasses import fields

from minillava import parse_plan
from minillava.app.command import MAX_LINE, cut_middle, is_out_of_memory
from minillava.pruning.base import Plan
from minillava.pruning.hand import Hand

MAX_UPLOAD = 16 << 20  # bytes of a file
MAX_PIXELS = 25_000_000  # of an uploaded picture: 100 MB while it is decoded
MAX_UPLOADS = 16  # files that are held for all sessions together: 256 MiB
UPLOAD_LIFE = 3600.0  # seconds that an unused file is held, if its session's end is not noticed
CLAIM_SECONDS = 60.0  # in which a session has to use a file that was uploaded
MAX_WAITING = 8  # requests that wait for the model; further ones are refused
MAX_SESSIONS = 64  # of which the server remembers anything; the oldest is forgotten first
MAX_BODY = 1 << 20  # bytes of any other request
MAX_LINK = 8000  # characters of the part of an address after the "?"
MAX_QUESTION = 2000  # characters
MAX_PLANS = 4  # beside the unpruned model and the patches chosen by hand
MAX_PLAN = 400  # characters
MAX_PATCHES = 4000  # characters of a list of patches; every second one of 24 x 24 needs 1,100
MAX_NEW_TOKENS = 128


def check_question(question: str) -> str:
    """The question without blanks around it."""
    question = question.strip()
    if not question:
        raise ValueError("there is no question; type one")
    if len(question) > MAX_QUESTION:
        raise ValueError(
            f"the question has {len(question)} characters, but may have {MAX_QUESTION}; shorten it"
        )
    return question


def check_new_tokens(value: object) -> int:
    if isinstance(value, float) and value.is_integer():  # from a field for numbers
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_NEW_TOKENS:
        raise ValueError(
            f"{shorten(value)} new tokens: must be a whole number from 1 to {MAX_NEW_TOKENS}"
        )
    return value


def check_number(what: str, value: object, low: float, high: float) -> float:
    if not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{what} is {shorten(value)}, but must be from {low} to {high}")
    return float(value)


def split_plans(text: str) -> tuple[str, ...]:
    """The plans that are typed one per line, without empty lines and repetitions."""
    plans = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if len(plans) > MAX_PLANS:
        raise ValueError(f"there are {len(plans)} plans, but may be {MAX_PLANS}; remove some")
    for plan in plans:
        if len(plan) > MAX_PLAN:
            raise ValueError(
                f"the plan {shorten(plan)} has {len(plan)} characters, but may have {MAX_PLAN}; "
                "shorten it"
            )
    return plans


def read_plan(text: str) -> Plan:
    """Read one plan. It can neither run code nor name a file or a URL: methods in files are refused
    by parse_plan, and methods with an option that names weights here."""
    plan = parse_plan("" if text == "none" else text)
    for method in plan.methods:
        if any(field.name == "clip" for field in fields(method)):
            raise ValueError(
                f"{method.name} reads CLIP weights from a file or the network, which this page "
                "does not do; use python -m minillava.generate --prune"
            )
    return plan


def check_patches(text: str, n_patches: int) -> tuple[int, ...]:
    """The numbers in a list of patches such as 3/7-12, ascending."""
    text = text.replace(" ", "")
    if not text:
        raise ValueError("no patch is kept; keep at least one, or use the plan text-only")
    if len(text) > MAX_PATCHES:
        raise ValueError(f"the list of patches has {len(text)} characters; at most {MAX_PATCHES}")
    if not re.fullmatch(r"[0-9][0-9/-]*", text):
        raise ValueError(f"patches={shorten(text)} must be numbers, for example 3/7-12")
    (hand,) = parse_plan(f"hand:patches={text}").methods
    assert isinstance(hand, Hand)
    hand.check(1, n_patches, (0,))
    return tuple(sorted(hand.patches))


def describe_error(error: BaseException) -> str | None:
    """One sentence for a mistake of the user or for full memory; None: a fault of the program."""
    if is_out_of_memory(error):
        return "out of memory; use a shorter question, a smaller picture or fewer plans"
    if not isinstance(error, ValueError):
        return None
    return cut_middle(" ".join(str(error).split()), MAX_LINE)


def shorten(value: object) -> str:
    """A value in a message: as Python writes it, at most 80 characters."""
    return cut_middle(repr(value), 80)


def list_limits() -> str:
    """The limits in words, for the page."""
    return (
        f"A picture may have {MAX_UPLOAD >> 20} MiB and {MAX_PIXELS // 10**6} million pixels; a "
        f"question {MAX_QUESTION} characters; there may be {MAX_PLANS} plans and {MAX_NEW_TOKENS} "
        f"new tokens. At most {MAX_WAITING} requests wait for the model and {MAX_UPLOADS} pictures "
        f"are held, for {MAX_SESSIONS} visitors. Your picture is removed when you leave the page."
    )
