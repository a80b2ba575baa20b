"""Ask the model for a page: the answers as they come, then the sheet that compares them."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from eval.compare import Comparison, compare, draw_sheet
from minillava.app.canvas import Drawing
from minillava.llava import LLaVA
from minillava.processing.processor import Processor
from minillava.pruning.parsing import write_value

from . import limits
from .pictures import Pictures

NONE = "none"  # the plan of the unpruned model
POLL = 0.2  # seconds after which a request that waits looks whether it is still wanted
PATIENCE = 60.0  # seconds after which a page that takes no more text is given up
FAULT = "the program has made a mistake; its terminal says which"


@dataclass(frozen=True)
class Request:
    """What a visitor asks, checked."""

    picture: object  # name of a picture, see Pictures
    session: str
    question: str
    plans: Sequence[str]  # without the unpruned one
    new_tokens: int
    budgets: bool  # whether each plan is asked at several budgets, too


@dataclass(frozen=True)
class Progress:
    """What can be shown so far."""

    texts: dict[str, str]  # plan -> its answer as far as it has come
    comparison: Comparison | None = None  # when all have answered
    sheet: Drawing | None = None


class Abandoned(BaseException):
    """Nobody waits for the answer any more. No Exception, so that nothing takes it for a mistake in
    a plan."""


def _make_places() -> threading.BoundedSemaphore:
    """Places for the request that is answered and those that wait."""
    return threading.BoundedSemaphore(limits.MAX_WAITING + 1)


@dataclass
class Asker:
    """The model that all visitors share. It answers one request at a time."""

    model: LLaVA
    processor: Processor
    name: str  # of the checkpoint, as given
    pictures: Pictures
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _places: threading.BoundedSemaphore = field(default_factory=_make_places)

    def ask(self, request: Request) -> Iterator[Progress]:
        """Answer a request. Raises ValueError, in one sentence, for what cannot be done, and if
        too many requests wait.

        The work is done in a thread of its own. It ends at the next token after this iterator is
        closed, or if nothing was taken from it for PATIENCE seconds.
        """
        if not self._places.acquire(blocking=False):
            raise ValueError(
                f"{limits.MAX_WAITING} requests wait for the model, and no more may; try later"
            )
        work = _Work(self, request)
        thread = threading.Thread(target=work.run, daemon=True)
        thread.start()
        texts = dict.fromkeys((NONE, *request.plans), "")
        try:
            yield Progress(dict(texts))
            while True:
                event = work.events.get()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, Progress):
                    yield event
                    return
                plan, piece = event
                texts[plan] += piece
                if work.events.empty():  # of pieces that came together, only the last is shown
                    yield Progress(dict(texts))
        finally:
            work.abandoned.set()

    def patches_left(self, comparison: Comparison) -> dict[str, str]:
        """The patches that each plan has left, as a list such as 3/7-12."""
        runs = [run for run in comparison.runs if run.result is not None]
        return {run.plan: str(write_value(tuple(sorted(run.kept(0))))) for run in runs}


class _Work:
    """One request while it is answered. events: (plan, piece of its answer), then the last
    Progress or the exception that ended it."""

    def __init__(self, asker: Asker, request: Request) -> None:
        self.asker, self.request = asker, request
        self.events: queue.Queue[tuple[str, str] | Progress | BaseException] = queue.Queue(256)
        self.abandoned = threading.Event()

    def run(self) -> None:
        try:
            self._wait_for_turn()
            try:
                event: Progress | BaseException = self._compare()
            finally:
                self.asker._turn.release()
        except Abandoned:
            return
        except BaseException as error:
            event = error
        finally:
            self.asker._places.release()
        with contextlib.suppress(Abandoned):
            self._put(event)

    def _wait_for_turn(self) -> None:
        while not self.asker._turn.acquire(timeout=POLL):
            self.listen("", "")

    def _compare(self) -> Progress:
        request, asker = self.request, self.asker
        self.listen("", "")
        image = asker.pictures.open(request.picture, request.session)
        comparison = compare(
            asker.model,
            asker.processor,
            image,
            request.question,
            list(request.plans),
            budgets=None if request.budgets else (),
            max_new_tokens=request.new_tokens,
            read=limits.read_plan,
            about={"Model": asker.name},
            listen=self.listen,
        )
        if not request.budgets:
            comparison = replace(comparison, drifts=())  # which would be drawn without answers
        texts = {run.plan: run.answer for run in comparison.runs}
        return Progress(texts, comparison, draw_sheet(comparison))

    def listen(self, plan: str, piece: str) -> None:
        """Pass on a piece of a plan's answer, and end the work if nobody waits for it."""
        if self.abandoned.is_set():
            raise Abandoned
        if plan:
            self._put((plan, piece))

    def _put(self, event: tuple[str, str] | Progress | BaseException) -> None:
        try:
            self.events.put(event, timeout=PATIENCE)
        except queue.Full:
            raise Abandoned from None
