"""The page: what a visitor sees and does. Everything is checked here before the model is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageOps

from eval.suggest import suggest_plan
from minillava import parse_plan
from minillava.pruning import METHODS

from . import limits
from .asking import NONE, Asker, Request
from .markup import explain, format_answers, format_sheet, say
from .pictures import THUMBNAIL, Bundled, data_uri, show_pixels
from .state import UPLOAD, State, read_query, write_query

HERE = Path(__file__).parent
NOT_OFFERED = ("hand", "trim", "cdpruner")  # one has the board, the others read CLIP weights
FIRST_PLANS = ("fastv", "divprune")  # on a page without a state in its address
SHARE = 0.25  # of the patches, that is suggested first


@dataclass(frozen=True)
class Page:
    """What all sessions share, and what is done at each event of the page."""

    asker: Asker
    budgets: bool = False  # whether plans are asked at several budgets, unless a visitor says

    # ------------------------------------------------------------ what the model has

    @property
    def bundled(self) -> Mapping[str, Bundled]:
        return self.asker.pictures.bundled

    @property
    def n_patches(self) -> int:
        return self.asker.model.config.vision.num_patches

    @property
    def n_layers(self) -> int:
        return self.asker.model.config.text.num_hidden_layers

    @property
    def all_patches(self) -> str:
        return f"0-{self.n_patches - 1}"

    def offered(self) -> list[str]:
        """The methods for which a plan can be suggested that this model takes."""
        return [name for name in METHODS if name not in NOT_OFFERED and self._suits(name)]

    def _suits(self, name: str) -> bool:
        try:
            plan = parse_plan(suggest_plan(name, SHARE, self.n_layers, self.n_patches))
            for method in plan.resolve(self.n_layers, self.n_patches).methods:
                method.check_model(self.asker.model)
                method.check(self.n_layers, self.n_patches, (1,))
        except ValueError:
            return False
        return True

    def default(self) -> State:
        sizes = (self.n_layers, self.n_patches)
        plans = tuple(suggest_plan(name, SHARE, *sizes) for name in FIRST_PLANS)
        return State("example", self.bundled["example"].question, plans, budgets=self.budgets)

    # ------------------------------------------------------------ events

    def open_link(self, query: str) -> tuple[Any, ...]:
        """Picture, question, plans, board, new tokens, budgets and message of an address."""
        message = ""
        try:
            state = read_query(query, self.default(), tuple(self.bundled))
            if state.picture == UPLOAD:
                message = (
                    "This address was made with an uploaded picture, which is not in it: upload it "
                    "again, or choose another one."
                )
        except ValueError as error:
            state, message = self.default(), explain(error)
        patches = state.patches or self.all_patches
        try:
            limits.check_patches(patches, self.n_patches)
        except ValueError as error:
            patches, message = self.all_patches, explain(error)
        picture = state.picture if state.picture in self.bundled else "example"
        board = self._board(self.bundled[picture].image, patches)
        plans = "\n".join(state.plans)
        shown = state.picture if state.picture in self.bundled else UPLOAD
        return shown, state.question, plans, board, state.new_tokens, state.budgets, say(message)

    def choose_picture(
        self, picture: object, question: object, patches: object, request: gr.Request
    ) -> tuple[Any, Any, str]:
        """Board, question and message after a picture was chosen or uploaded."""
        pictures = self.asker.pictures
        try:
            with pictures.uploads.decoding:
                image = pictures.open(picture, str(request.session_hash))
                board = self._board(image, patches)
        except Exception as error:
            return gr.skip(), gr.skip(), say(explain(error))
        typed, new = str(question).strip(), self.bundled.get(str(picture))
        if new is not None and typed in ("", *(b.question for b in self.bundled.values())):
            question = new.question
        return board, question, say("")

    def add_plan(
        self, plans: object, name: object, share: object, layer: object
    ) -> tuple[Any, str]:
        """The plans with a suggested one more, and a message."""
        try:
            if name not in METHODS:
                raise ValueError(f"there is no method {limits.shorten(name)}; choose one")
            part = limits.check_number("the share of patches", share, 0, 1)
            first = int(limits.check_number("the layer", layer, 0, self.n_layers))
            plan = suggest_plan(str(name), part, self.n_layers, self.n_patches, first)
            return "\n".join(limits.split_plans(f"{plans}\n{plan}")), say("")
        except Exception as error:
            return gr.skip(), say(explain(error))

    def write_link(self, *given: object) -> str:
        """The state as the part of an address after the "?". Nothing is checked."""
        picture, question, plans, patches, tokens, budgets = map(str, given)
        name = UPLOAD if picture.startswith(UPLOAD) else picture
        by_hand = "" if patches == self.all_patches else patches
        typed = tuple(line.strip() for line in plans.splitlines() if line.strip())
        return write_query(State(name, question, typed, by_hand, tokens, budgets == "True"))

    def ask(
        self,
        picture: object,
        question: object,
        plans: object,
        patches: object,
        new_tokens: object,
        budgets: object,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Message, answers, sheet, and plans whose patches can be taken over, as they come."""
        yield say("The model is asked."), gr.skip(), gr.skip(), gr.skip()
        try:
            asked = Request(
                picture,
                str(request.session_hash),
                limits.check_question(str(question)),
                self._list_plans(str(plans), patches),
                limits.check_new_tokens(new_tokens),
                bool(budgets),
            )
            for progress in self.asker.ask(asked):
                if progress.sheet is None:
                    yield gr.skip(), format_answers(progress), gr.skip(), gr.skip()
                    continue
                assert progress.comparison is not None
                left = self.asker.patches_left(progress.comparison)
                choices = [(plan, patches) for plan, patches in left.items() if plan != NONE]
                again = gr.Dropdown(choices=choices, value=None, visible=bool(choices))
                yield say("Done."), format_answers(progress), format_sheet(progress), again
        except Exception as error:
            yield say(explain(error)), gr.skip(), gr.skip(), gr.skip()

    def say_stopped(self) -> str:
        return say("Stopped.")

    def take_over(self, patches: object) -> Any:
        """The patches that a plan has left, on the board."""
        return patches if isinstance(patches, str) and patches else gr.skip()

    def end_session(self, request: gr.Request) -> None:
        self.asker.pictures.uploads.end_session(str(request.session_hash))

    # ------------------------------------------------------------ parts

    def _list_plans(self, plans: str, patches: object) -> list[str]:
        """The plans that are typed, and the one that is chosen by hand."""
        typed = [plan for plan in limits.split_plans(plans) if plan != NONE]
        if patches == self.all_patches:
            return typed
        named = limits.check_patches(str(patches), self.n_patches)
        by_hand = [] if len(named) == self.n_patches else [f"hand:patches={patches}"]
        return list(dict.fromkeys(typed + by_hand))

    def _board(self, image: Image.Image, patches: object) -> Any:
        return gr.HTML(value=str(patches), image=data_uri(self.show(image)))

    def show(self, image: Image.Image) -> Image.Image:
        """The square of a picture that the model sees."""
        processor = self.asker.processor
        return show_pixels(image, processor.image, processor.aspect)


# ---------------------------------------------------------------- layout


@dataclass(frozen=True)
class Parts:
    """What the page consists of."""

    picture: gr.HTML
    question: gr.Textbox
    plans: gr.Textbox
    method: gr.Dropdown
    share: gr.Slider
    layer: gr.Slider
    add: gr.Button
    tokens: gr.Slider
    budgets: gr.Checkbox
    board: gr.HTML
    again: gr.Dropdown
    ask: gr.Button
    stop: gr.Button
    message: gr.HTML
    answers: gr.HTML
    sheet: gr.HTML
    query: gr.Textbox

    @property
    def state(self) -> list[Any]:
        """The choices of a visitor, in the order of State."""
        return [self.picture, self.question, self.plans, self.board, self.tokens, self.budgets]


def build(page: Page) -> gr.Blocks:
    """The page as Gradio's blocks."""
    state, parts = page.default(), dict[str, Any]()
    with gr.Blocks(title="minillava explorer", analytics_enabled=False) as app:
        gr.HTML(_make_head(page))
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                parts |= _make_question(page, state)
            with gr.Column(scale=1, min_width=300):
                parts |= _make_answers(page)
        parts["sheet"] = gr.HTML("", elem_id="sheet")
        parts["query"] = gr.Textbox(visible=False)
        _connect(page, app, Parts(**parts))
    return app


def _make_head(page: Page) -> str:
    sizes = f"{page.n_patches} patches, {page.n_layers} decoder layers"
    return (
        f"<h1>minillava explorer</h1><p>Model: {escape(page.asker.name)} ({sizes}). The address of "
        "this page holds the choice of a bundled picture, the question and the plans; an uploaded "
        f'picture is not in it.</p><p class="limits">{escape(limits.list_limits())}</p>'
    )


def _make_question(page: Page, state: State) -> dict[str, Any]:
    found: dict[str, Any] = {"picture": _make_picker(page, state)}
    found["question"] = gr.Textbox(state.question, label="Question", lines=2, max_lines=6)
    found["plans"] = gr.Textbox(
        "\n".join(state.plans),
        label=f"Plans, one per line, {limits.MAX_PLANS} at most (beside the unpruned model)",
        lines=3,
        max_lines=6,
    )
    with gr.Accordion("Add a plan", open=True):
        found["method"] = gr.Dropdown(page.offered(), value="fastv", label="Method")
        found["share"] = gr.Slider(0.02, 1.0, SHARE, step=0.01, label="Share of patches left")
        found["layer"] = gr.Slider(
            1, page.n_layers - 1, 2, step=1, label="Layer, for methods in the decoder"
        )
        found["add"] = gr.Button("Add this plan")
    most = limits.MAX_NEW_TOKENS
    found["tokens"] = gr.Slider(1, most, state.new_tokens, step=1, label="New tokens, at most")
    found["budgets"] = gr.Checkbox(state.budgets, label="Ask each plan at five budgets, too")
    return found


def _make_answers(page: Page) -> dict[str, Any]:
    found: dict[str, Any] = {"board": _make_board(page)}
    label = "Take over the patches that a plan has left"
    found["again"] = gr.Dropdown([], label=label, visible=False, elem_id="again")
    with gr.Row():
        found["ask"] = gr.Button("Ask", variant="primary", elem_id="ask")
        found["stop"] = gr.Button("Stop", elem_id="stop")
    found["message"] = gr.HTML("", elem_id="message")
    found["answers"] = gr.HTML("", elem_id="answers")
    return found


def _make_picker(page: Page, state: State) -> gr.HTML:
    radios = "".join(
        f'<label><input type="radio" name="picture" value="{name}" aria-label="{name}: '
        f'{escape(bundled.question)}"><img src="{data_uri(_shrink(bundled.image))}" alt=""></label>'
        for name, bundled in page.bundled.items()
    )
    mebibytes = limits.MAX_UPLOAD >> 20
    return gr.HTML(
        state.picture,
        html_template=(
            f'<fieldset class="pictures"><legend>Picture</legend>{radios}</fieldset>'
            f'<label class="file">or your own, at most {mebibytes} MiB: '
            '<input type="file" accept="image/*"></label>'
            '<p class="status" role="alert"></p>'
        ),
        js_on_load=(HERE / "picker.js").read_text("utf-8"),
        most_bytes=limits.MAX_UPLOAD,
        apply_default_css=False,
        elem_id="picker",
    )


def _make_board(page: Page) -> gr.HTML:
    buttons = "".join(
        f'<button type="button" data-keep="{kind}">{words}</button>'
        for kind, words in (("all", "keep all"), ("none", "none"), ("others", "the others"))
    )
    hint = "Brush patches out and in: drag, or Tab to the picture, arrows and Space."
    image = page.bundled[page.default().picture].image
    return gr.HTML(
        page.all_patches,
        html_template=(
            f'<p id="hint">{hint}</p><div class="board" role="group" '
            'aria-label="patches that are kept" aria-describedby="hint"></div>'
            f'<div class="board-buttons">{buttons}<span class="count" role="status"></span></div>'
        ),
        js_on_load=(HERE / "board.js").read_text("utf-8"),
        grid=page.asker.model.config.vision.grid,
        image=data_uri(page.show(image)),
        apply_default_css=False,
        elem_id="board",
    )


def _shrink(image: Any) -> Any:
    return ImageOps.fit(image, (THUMBNAIL, THUMBNAIL))


def _connect(page: Page, app: gr.Blocks, parts: Parts) -> None:
    """Which event does what. Only `ask` uses the model; light events run beside it."""
    message = parts.message
    # without `preprocess`, what a page sends is checked here alone, and refused in a sentence
    shared = {"preprocess": False, "api_visibility": "private", "show_progress": "hidden"}
    light = {"queue": False, **shared}
    loaded = app.load(
        page.open_link,
        parts.query,
        [*parts.state, message],
        js="() => window.location.search",
        **light,
    )
    parts.picture.input(
        page.choose_picture,
        [parts.picture, parts.question, parts.board],
        [parts.board, parts.question, message],
        **light,
    )
    given = [parts.plans, parts.method, parts.share, parts.layer]
    parts.add.click(page.add_plan, given, [parts.plans, message], **light)
    parts.again.input(page.take_over, parts.again, parts.board, **light)
    asking = gr.on(
        [parts.ask.click, parts.question.submit],
        page.ask,
        parts.state,
        [message, parts.answers, parts.sheet, parts.again],
        concurrency_limit=limits.MAX_WAITING + 2,  # Asker lets one at a time use the model
        trigger_mode="once",
        **shared,
    )
    stopping = parts.stop.click(None, cancels=[asking])
    stopping.then(page.say_stopped, None, message, **light)
    changes = [part.change for part in (parts.picture, parts.plans, parts.board, parts.tokens)]
    changes += [parts.budgets.change, parts.question.blur, parts.ask.click, parts.question.submit]
    gr.on(changes, page.write_link, parts.state, parts.query, trigger_mode="always_last", **light)
    loaded.then(page.write_link, parts.state, parts.query, **light)
    replace = "(query) => { if (query) window.history.replaceState('written', '', query); }"
    parts.query.change(None, parts.query, None, js=replace)
    app.unload(page.end_session)
