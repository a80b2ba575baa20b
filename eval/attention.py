"""What a token sees of the picture, layer by layer, and which kinds of tokens get the attention.

    python -m eval.attention --image F --prompt TEXT --layers 2 16 31 --out FILE.png
    python -m eval.attention --image F --prompt TEXT --of word:red answer:0 --head 3 --out FILE.svg
    python -m eval.attention --image F --prompt TEXT --prune fastv:k=2,r=0.5 --no-bos --out FILE.png

For each group of rows (--of) there is a heat map over the picture for each of --layers, and a chart
of the attention by kind of token (BOS, system, image, instruction, answer) over all layers, which
is also printed as a table. Attention says where a row reads, not what the answer depends on.

The names of rows are:
{names}
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from minillava.app.command import parse_non_negative_int, parse_positive_int, run_command
from minillava.config import Config
from minillava.llava import LLaVA
from minillava.processing.image import ImageConfig
from minillava.pruning.base import Plan
from minillava.pruning.parsing import name_plan
from minillava.report import Result
from minillava.request import prompts_of
from minillava.sample import Batch

from . import row_names
from .asked import Asked, add_plan_options, make_parser, open_question
from .attention_figure import Shown, View, draw_attention, draw_one_map, format_table
from .watch import KINDS, Seen, watch

NEW_TOKENS = 48


@dataclass(frozen=True)
class Grid:
    """What rows see of one image in one layer. side: patches along a side of the image."""

    seen: Seen
    image: int
    config: Config
    name: str  # of the rows, for pictures

    @property
    def weights(self) -> Tensor:
        """(H, side, side) float32: mean over the rows. NaN: a patch that none of them could attend
        to, because it was dropped or hidden, or because it comes after them."""
        return self._square(self.seen.of_image(self.image, self.seen.weights, float("nan")))

    @property
    def sinks(self) -> Tensor:
        """(side, side) bool: patches that are attention sinks, see watch.find_sinks."""
        return self._square(self.seen.of_image(self.image, self.seen.sinks, False))

    def view(self, head: int | None = None, bos: bool = True) -> Tensor:
        """(side, side): one head, or the mean of all. bos: False leaves BOS out and scales what is
        left of each head to the same sum."""
        weights = choose_heads(self.seen, head, bos)
        return self._square(self.seen.of_image(self.image, weights, float("nan")))

    def shares(self, head: int | None = None, bos: bool = True) -> dict[str, float]:
        """The part of the attention that each kind of token receives, of all images together."""
        parts = self.seen.by_kind(choose_heads(self.seen, head, bos)).tolist()
        return dict(zip(KINDS, parts, strict=True))

    def draw(
        self,
        picture: Image.Image,
        head: int | None = None,
        bos: bool = True,
        aspect: str | None = None,
        config: ImageConfig | None = None,
    ) -> Image.Image:
        """The heat map over the picture, as a PIL image. aspect, config: how the processor made
        the picture square; default: the checkpoint's aspect and the model's image size."""
        view = View(self.seen, choose_heads(self.seen, head, bos), bos)
        shown, name = Shown(self.config, [picture], aspect, config), self.name
        return draw_one_map(shown, view, self.image, name, [name_heads(head, bos)]).image()

    def _square(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (self.config.vision.grid,) * 2)


def choose_heads(seen: Seen, head: int | None, bos: bool) -> Tensor:
    """Weights (tokens,) of one head, or the mean of all."""
    H = len(seen.weights)
    if head is not None and not 0 <= head < H:
        raise ValueError(f"head={head} must be from 0 to {H - 1}, or None for the mean of all")
    weights = seen.weights if bos else seen.without_bos(seen.weights)
    return weights.mean(0) if head is None else weights[head]


def attention(
    model: LLaVA,
    batch: Batch,
    layer: int,
    rows: int | Sequence[int] = -1,
    plan: Plan | None = None,
    sample: int = 0,
    image: int = 0,
    **options: Any,
) -> Grid:
    """What rows of one sample of a batch see of one of its images in a decoder layer.

    rows: numbers of the prompt's T tokens, from 0, or from -1 backwards; -1 is the newest, from
    which the first token of the answer is chosen. T + n is answer token n. Of several rows the mean
    is taken. layer: from 0. options: seed, encoded and others of `generate`. Raises ValueError for
    rows, a layer or an image that are not there, and as `generate` does.
    """
    prompts, n_layers = prompts_of(model, batch), model.config.text.num_hidden_layers
    if not 0 <= sample < len(prompts):
        raise ValueError(f"sample={sample} must be from 0 to {len(prompts) - 1}")
    prompt = prompts[sample]
    T, images = prompt.length, len(prompt.starts)
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer={layer} must be from 0 to {n_layers - 1}")
    if not 0 <= image < images:
        raise ValueError(f"image={image}: the prompt has {images} images, numbered from 0")
    given = [rows] if isinstance(rows, int) else [*rows]
    if not given or not all(isinstance(row, int) for row in given) or min(given) < -T:
        raise ValueError(f"rows={rows!r} must be one row or more, by numbers from {-T}")
    numbers = [row + T if row < 0 else row for row in given]
    new = max(1, max(numbers) - T + 2)
    result, seen = watch(model, batch, [numbers], plan, new, sample, **options)
    fed = T + max(0, len(result.tokens[sample]) - 1)
    if max(numbers) >= max(fed, T):
        raise ValueError(
            f"there is no row {max(numbers)}: {T} are the prompt's, {fed - T} the answer's, whose "
            "last token is not fed; name one of these"
        )
    name = f"rows {', '.join(map(str, numbers))}" if len(numbers) > 1 else f"row {numbers[0]}"
    return Grid(seen[layer][0], image, model.config, name)


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    names = (row_names.__doc__ or "").partition("\n\n")[2].rstrip()
    parser = make_parser("eval.attention", (__doc__ or "").format(names=names))
    add_plan_options(parser)
    add = parser.add_argument
    add("--layers", type=parse_non_negative_int, nargs="+", metavar="K", help="default: three")
    add("--of", nargs="+", default=["newest", "answer"], metavar="ROWS", help="see above")
    add("--head", type=parse_non_negative_int, metavar="H", help="default: the mean of all heads")
    add("--no-bos", action="store_true", help="leave BOS out, and scale the rest to 1")
    add("--max-new-tokens", type=parse_positive_int, default=NEW_TOKENS, metavar="N")
    add("--tokens", action="store_true", help="print the numbers of the prompt's tokens, no more")
    return run_command(lambda: _run(parser.parse_args(arguments), arguments))


def _run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    for name in args.of:
        row_names.check_name(name)
    if args.out is None and not args.tokens:
        raise ValueError("--out FILE is missing: the picture's file, which ends in .png or .svg")
    asked = open_question(args, argv, "eval.attention")
    layers, text = _check_layers(args, asked.model), asked.model.config.text
    if args.head is not None and args.head >= text.num_attention_heads:
        last = text.num_attention_heads - 1
        raise ValueError(
            f"--head {args.head} must be from 0 to {last}; without it, all are averaged"
        )
    (prompt,) = prompts_of(asked.model, asked.batch)
    n_patches = asked.model.config.vision.num_patches
    texts = row_names.token_texts(prompt, n_patches, asked.processor.tokenizer)
    if args.tokens:
        print("\n".join(row_names.list_tokens(texts)), flush=True)
        return
    most = args.max_new_tokens
    groups = [row_names.find_group(name, prompt, texts, most) for name in dict.fromkeys(args.of)]
    rows = [group.rows for group in groups]
    result, seen = watch(asked.model, asked.batch, rows, asked.plan, most, seed=args.seed)
    n = len(result.tokens[0])
    for group in groups:
        if min(group.rows) > prompt.length - 1 + max(0, n - 1):
            raise ValueError(f"--of {group.name}: the answer has tokens 0 to {n - 1}; name these")
    heads = (args.head, not args.no_bos)
    views = {
        group.name: [View(one[g], choose_heads(one[g], *heads), heads[1]) for one in seen]
        for g, group in enumerate(groups)
    }
    _show(asked, result, layers, views)


def _show(
    asked: Asked, result: Result, layers: Sequence[int], views: Mapping[str, Sequence[View]]
) -> None:
    """Print the answer and the tables, and save the picture."""
    args, answer = asked.args, asked.processor.decode(result.tokens[0]).strip()
    plan = name_plan(result.plan) or "none"
    heads = name_heads(args.head, not args.no_bos)
    caption = [
        f"question: {asked.question}",
        f"answer: {answer}",
        f"plan: {plan}",
        f"weights: {heads}",
    ]
    shown = Shown(asked.model.config, asked.images, asked.aspect, asked.processor.image)
    about = {**asked.about(), "Question": asked.question, "Answer": answer, "Plan": plan}
    print(f"answer: {answer}")
    for name, each in views.items():
        print(f"\n{name}: % of the attention, {heads}\n\n{format_table(each)}")
    sys.stdout.flush()
    asked.save(draw_attention(shown, views, layers, caption, about))


def name_heads(head: int | None, bos: bool) -> str:
    which = "mean of all heads" if head is None else f"head {head}"
    return which if bos else f"{which}, without BOS (the rest scaled to the same sum)"


def _check_layers(args: argparse.Namespace, model: LLaVA) -> list[int]:
    n = model.config.text.num_hidden_layers
    for layer in args.layers or ():
        if layer >= n:
            raise ValueError(f"--layers {layer}: the decoder has layers 0 to {n - 1}; name these")
    return sorted(set(args.layers or (min(2, n - 1), n // 2, n - 1)))


if __name__ == "__main__":
    sys.exit(main())
