"""A user's own method in Python: the checks of a plan, tracebacks, and what decoding offers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny import alone, make_batch
from torch import Tensor

from minillava.generate import generate
from minillava.pruning import Context, Keep, Method, Plan
from minillava.pruning.base import amount, count, option, top


@dataclass(frozen=True)
class Loud(Method):
    """Keeps the image tokens with the largest features; `wrong` makes it return something else."""

    keep: float = amount(0.5)
    wrong: str = option("", choices=("", *"abcdefghijk"))

    def stages(self) -> Any:
        return (("embed", 0),)

    def choose(self, c: Context) -> Keep:
        keep = top(c.features().norm(dim=-1), count(self.keep, c.n_tokens), c.where)
        n, x = len(c.candidates), c.features()
        wrong: dict[str, Any] = {
            "": Keep(keep),
            "a": Keep(torch.tensor([3, 3])),
            "b": Keep(torch.tensor([-1])),
            "c": Keep(torch.tensor([0, n])),
            "d": Keep(torch.ones(n, dtype=torch.bool)),
            "e": Keep(keep, merged=x[keep]),
            "f": Keep(keep, extra=x[:1]),
            "g": Keep(keep, ordered=True),
            "h": keep,
            "i": Keep(keep[None]),
            "j": Keep([0, 1]),  # type: ignore[arg-type]
            "k": None,
        }
        return wrong[self.wrong]


@dataclass(frozen=True)
class Merging(Loud):
    drops_only = False
    shape: str = "good"

    def choose(self, c: Context) -> Keep:
        x = c.features()
        rows: dict[str, Any] = {
            "good": x[:2],
            "few": x[:1],
            "narrow": x[:2, :3],
            "flat": x[0],
            "integers": x[:2].long(),
            "nan": x[:2] * torch.nan,
            "list": [1.0],
        }
        return Keep(torch.arange(2), merged=rows[self.shape])


def run(model: Any, *methods: Method, prompts: tuple[str, ...] = ("ttItt",), **options: Any) -> Any:
    return generate(model, make_batch(model, *prompts), Plan(methods), **options)


def test_a_plan_of_objects_runs(model: Any) -> None:
    report = run(model, Loud(keep=3), max_new_tokens=2).report
    assert (report.kept[0].rule, len(report.kept[0].positions[0])) == ("loud", 3)
    assert run(model, Merging(), max_new_tokens=1).report.tokens_entering[0] == [2 + 2 + 2]


@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_a_method_is_not_asked_about_no_candidates(model: Any, mode: str) -> None:
    asked: list[int] = []

    @dataclass(frozen=True)
    class Counting(Loud):
        def stages(self) -> Any:
            return (("decoder", 1),)

        def choose(self, c: Context) -> Keep:
            asked.append(len(c.candidates))
            return Keep(torch.arange(1))

    result = run(model, Loud(keep=0, mode=mode), Counting(), max_new_tokens=1)
    assert asked == []
    assert result.report.kept[1].positions == [[]]
    run(model, Loud(keep=3, mode=mode), Counting(), max_new_tokens=1)
    assert asked == [3]


def test_a_joint_choice_sees_the_patches_of_all_images(model: Any) -> None:
    """With scope=all, image i's patches are i * N to i * N + N - 1, with their own keys."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    @dataclass(frozen=True)
    class Joint(Method):
        def stages(self) -> Any:
            return (("embed", 0),)

        def vision_layers(self, n_layers: int) -> tuple[int, ...]:
            return (3,)

        def choose(self, c: Context) -> Keep:
            seen.append((c.patches, c.vision_keys(3), c.vision_attention(3)))
            return Keep(torch.arange(1))

    for scope in ("image", "all"):
        run(model, Joint(scope=scope), prompts=("tItIt",), max_new_tokens=1)
    first, second, joint = seen
    assert joint[0].tolist() == list(range(32))
    assert torch.equal(joint[1], torch.cat((first[1], second[1])))
    assert torch.equal(joint[2], torch.cat((first[2], second[2]), dim=1))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("a", "has 3; name each of the 16 candidates"),
        ("b", "has -1"),
        ("c", "has 16"),
        ("d", "mask.nonzero()"),
        ("e", "drops_only = False"),
        ("f", "drops_only = False"),
        ("g", "drops_only = False"),
        ("h", "must return Keep"),
        ("i", "(1, 8)"),
        ("j", "must return Keep"),
        ("k", "must return Keep"),
    ],
)
def test_a_choice_that_does_not_fit_is_refused(model: Any, wrong: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^loud: choose\(\)") as error:
        run(model, Loud(wrong=wrong), max_new_tokens=1)
    assert words in str(error.value)


@pytest.mark.parametrize("shape", ["few", "narrow", "flat", "integers", "nan", "list"])
def test_merged_rows_that_do_not_fit_are_refused(model: Any, shape: str) -> None:
    with pytest.raises(ValueError, match=r"merging: choose\(\): Keep.merged"):
        run(model, Merging(shape=shape), max_new_tokens=1)


@pytest.mark.parametrize(
    ("keep", "words"), [(-1, "keep=-1"), (1.5, "keep=1.5"), (17, "there are 16 image tokens")]
)
def test_options_are_checked_as_on_the_command_line(model: Any, keep: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(model, Loud(keep=keep), max_new_tokens=1)


def test_a_plain_field_called_keep_is_an_amount(model: Any) -> None:
    @dataclass(frozen=True)
    class Plain(Method):
        keep: float = 0.5

        def stages(self) -> Any:
            return (("embed", 0),)

        def choose(self, c: Context) -> Keep:
            return Keep(torch.arange(count(self.keep, c.n_tokens)))

    assert run(model, Plain(), max_new_tokens=1).report.image_tokens_entering[0] == [8]
    with pytest.raises(ValueError, match=r"keep=-0.5 must be a whole number of tokens"):
        Plain(keep=-0.5)
    with pytest.raises(ValueError, match="there are 16 image tokens"):
        run(model, Plain(keep=17), max_new_tokens=1)


def test_a_class_without_its_decorator_is_refused() -> None:
    class Bare(Loud):
        size: int = 3

    for arguments in ({}, {"size": 4}):
        with pytest.raises(ValueError, match=r"put @dataclass\(frozen=True\) above class Bare"):
            Bare(**arguments)


def test_an_incomplete_class_is_refused() -> None:
    @dataclass(frozen=True)
    class Half(Method):
        def stages(self) -> Any:
            return (("embed", 0),)

    with pytest.raises(ValueError, match="class Half has no method choose"):
        Plan((Half(),))
    with pytest.raises(ValueError, match="derive one from Method"):
        Plan(("fastv",))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "stages",
    [
        ("embed", 0),
        (("embed", 1),),
        (("vision", 1),),
        (("middle", 0),),
        (("decoder", 1.0),),
        (["decoder", 1],),
        (["embed", 0],),
        (),
        None,
    ],
)
def test_stages_that_are_none_are_refused(stages: Any) -> None:
    @dataclass(frozen=True)
    class Where(Loud):
        def stages(self) -> Any:
            return stages

    with pytest.raises(ValueError, match=r"where: stages\(\) gave"):
        Plan((Where(),))


def test_hidden_states_that_the_tower_lacks_are_refused(model: Any) -> None:
    @dataclass(frozen=True)
    class Deep(Loud):
        def vision_layers(self, n_layers: int) -> tuple[int, ...]:
            return (-2,)

    with pytest.raises(ValueError, match=r"deep: vision_layers\(\) gave \(-2,\)"):
        run(model, Deep(), max_new_tokens=1)


def test_features_of_its_own_may_need_no_hidden_state(model: Any) -> None:
    """The tower then keeps LLaVA's own, from which the sequence begins."""

    @dataclass(frozen=True)
    class Own(Loud):
        def own_features(self, n_tokens: int) -> bool:
            return True

    assert run(model, Own(), max_new_tokens=1).tokens


def test_a_window_that_it_moves_itself_serves_several_images(model: Any) -> None:
    @dataclass(frozen=True)
    class Moved(Loud):
        def shift(self, start: int) -> int:
            return 1

    result = generate(model, make_batch(model, "tItIt"), Plan((Moved(),)), 1)
    assert result.tokens[0]


def test_declarations_that_the_engine_would_misread_are_refused() -> None:
    @dataclass(frozen=True)
    class Renumbered(Loud):
        numbering = "compakt"

    @dataclass(frozen=True)
    class Masked(Loud):
        mode: str = "soft"

    for method, words in (
        (Renumbered, "renumbered: numbering='compakt' must be original or compact"),
        (Masked, "masked: the option 'mode' is the engine's; choose another name"),
    ):
        with pytest.raises(ValueError, match=words):
            Plan((method(),))


def test_an_authors_exception_stays_what_it_is(model: Any) -> None:
    @dataclass(frozen=True)
    class Broken(Loud):
        def choose(self, c: Context) -> Keep:
            return Keep(torch.arange(1 // 0))

    with pytest.raises(ZeroDivisionError):
        run(model, Broken(), max_new_tokens=1)


# ---------------------------------------------------------------- while decoding


@dataclass(frozen=True)
class Again(Method):
    """Hides all but `keep` tokens, chosen again every `every` tokens from the newest row."""

    keep: int = 4
    every: int = 3
    rows: str = option("newest", choices=("newest", "question", "first"))
    layer: int = 2
    calls: list[tuple[int, list[int]]] = field(default_factory=list, compare=False)

    newest_row = True

    def stages(self) -> Any:
        return (("decoder", self.layer),)

    def choose(self, c: Context) -> Keep:
        if c.generated % self.every == 0:
            c.memory["kept"] = top(c.attention(self.asked(c)).mean(0), self.keep, c.where)
        self.calls.append((c.generated, sorted(c.memory["kept"].tolist())))
        return Keep(c.memory["kept"])

    def asked(self, c: Context) -> Tensor:
        if c.generated and self.rows == "question":
            return c.text_rows
        return c.text_rows[:1] if c.generated and self.rows == "first" else c.newest


@dataclass(frozen=True)
class Standing(Again):
    choice_stands = True


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_choice_made_again_every_three_tokens(model: Any, use_cache: bool) -> None:
    often, seldom = Again(mode="mask", every=1), Again(mode="mask", every=3)
    for method in (often, seldom):
        run(model, method, max_new_tokens=8, min_new_tokens=8, use_cache=use_cache)
        assert [generated for generated, _ in method.calls] == list(range(8))
    kept = [k for _, k in seldom.calls]
    assert kept[0] == kept[1] == kept[2]
    assert kept[3] == kept[4] == kept[5]
    assert len({tuple(k) for _, k in often.calls}) > 1, (
        "the choice never changes: nothing is tested"
    )
    assert kept != [k for _, k in often.calls]


def test_memory_is_the_samples_own(model: Any) -> None:
    prompts = ("ttItt", "tItIttt", "ttttt")
    together = Again(mode="mask")
    options = {"max_new_tokens": 7, "min_new_tokens": 7}
    result = run(model, together, prompts=prompts, **options)
    batch = make_batch(model, *prompts)
    for b in range(3):
        single = generate(model, alone(model, batch, b), Plan((Again(mode="mask"),)), **options)
        assert single.tokens[0] == result.tokens[b]


def test_a_choice_that_stands_is_not_made_again(model: Any) -> None:
    method = Standing(mode="mask")
    run(model, method, max_new_tokens=6, min_new_tokens=6)
    assert [generated for generated, _ in method.calls] == [0]


@pytest.mark.parametrize("rows", ["question", "first"])
@pytest.mark.parametrize("layer", [2, 0])
def test_only_the_newest_row_has_a_query_while_decoding(model: Any, rows: str, layer: int) -> None:
    """A single other row, too: it must not be answered with the newest row's query."""

    @dataclass(frozen=True)
    class Asking(Again):
        def choose(self, c: Context) -> Keep:
            return Keep(top(c.attention(self.asked(c), layer=0).mean(0), 4, c.where))

    method = Asking(mode="mask", rows=rows, layer=layer)
    run(model, method, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"the attention of rows \[.*\] is gone while decoding"):
        run(model, method, max_new_tokens=2, min_new_tokens=2)
    if layer:
        with pytest.raises(
            ValueError, match=r"the attention of rows \[.*\] is gone while decoding"
        ):
            run(model, Again(mode="mask", rows=rows, every=1), max_new_tokens=2, min_new_tokens=2)


def test_the_prompts_hidden_states_are_gone_while_decoding(model: Any) -> None:
    @dataclass(frozen=True)
    class Reading(Again):
        def choose(self, c: Context) -> Keep:
            return Keep(top(c.features().norm(dim=-1), 4, c.where))

    with pytest.raises(ValueError, match="the prompt's hidden states are gone"):
        run(model, Reading(mode="mask"), max_new_tokens=2, min_new_tokens=2)


# ---------------------------------------------------------------- questions that have no answer


@dataclass(frozen=True)
class Asking(Method):
    """Asks the Context a question at a stage, and keeps everything."""

    stage: str = "embed"
    question: str = ""

    def stages(self) -> Any:
        return ((self.stage, 2 if self.stage == "decoder" else 0),)

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        return (n_layers - 2,)

    def choose(self, c: Context) -> Keep:
        questions: dict[str, Any] = {
            "the layer by its number": lambda: c.attention(c.newest, layer=2),
            "before the decoder": lambda: c.attention(c.newest, layer=0),
            "what entered it": lambda: c.entered(),
            "a query that there is not": lambda: c.vision_attention(-2, "clas"),  # type: ignore[arg-type]
            "a block that there is not": lambda: c.vision_attention(57),
        }
        questions[self.question]()
        return Keep(torch.arange(len(c.candidates)))


@pytest.mark.parametrize(
    ("stage", "question", "words"),
    [
        ("decoder", "the layer by its number", r"layer=2\): -1 is the layer before, 0 the coming"),
        ("vision", "before the decoder", r'is for the stages \("embed", 0\) and \("decoder", K\)'),
        ("embed", "what entered it", r'is for the stages \("decoder", K\)'),
        ("vision", "a query that there is not", "'clas'.* must be 'class' or 'mean'"),
        ("vision", "a block that there is not", "block 57 .*-10 to 9"),
    ],
)
def test_a_question_without_an_answer_is_refused(
    model: Any, stage: str, question: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        run(model, Asking(stage=stage, question=question), max_new_tokens=1)


@dataclass(frozen=True)
class Adding(Method):
    """Adds a row at layer 1; at layer 2 asks for the attention of all image rows, that row too."""

    drops_only = False

    def stages(self) -> Any:
        return (("decoder", 1), ("decoder", 2))

    def choose(self, c: Context) -> Keep:
        index = torch.arange(8)
        if c.stage_index == 0:
            return Keep(index, extra=c.features()[:1])
        return Keep(top(c.attention(c.candidates).mean(0), 8, c.where))


@dataclass(frozen=True)
class AddingLater(Adding):
    """Both acts at layer 2: the added row was not there when layer 1 ran."""

    def stages(self) -> Any:
        return (("decoder", 2), ("decoder", 2))


@pytest.mark.parametrize("method", [Adding(), AddingLater()])
def test_an_added_row_that_had_no_query_does_not_count(model: Any, method: Method) -> None:
    with_cache, without = (
        run(model, method, use_cache=cache, max_new_tokens=3, output_logits=True)
        for cache in (True, False)
    )
    assert with_cache.logits.isfinite().all()
    assert with_cache.report.kept == without.report.kept
    assert [len(k.positions[0]) + k.extra[0] for k in with_cache.report.kept] == [9, 8]


def test_the_attention_of_rows_that_had_a_query_is_their_mean(model: Any) -> None:
    seen = []

    @dataclass(frozen=True)
    class Looking(AddingLater):
        def choose(self, c: Context) -> Keep:
            if c.stage_index == 1:
                seen.append((c.attention(c.candidates), c.attention(c.candidates[:8])))
            return super().choose(c)

    run(model, Looking(), max_new_tokens=1)
    everything, old = seen[0]
    assert torch.equal(everything, old)
    assert everything[:, 8].eq(0).all()  # nothing attended to the added row


def test_a_plan_without_the_comma_or_as_text_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"tuple, as in Plan\(\(method,\)\)"):
        Plan(Loud(keep=3))  # type: ignore[arg-type]
    for plan in ("fastv:k=2", Loud(keep=3)):
        with pytest.raises(ValueError, match=r"must be a Plan: parse_plan\(text\)"):
            generate(model, make_batch(model, "ttItt"), plan)  # type: ignore[arg-type]
