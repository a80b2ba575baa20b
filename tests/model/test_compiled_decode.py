"""One token of the decoder compiles as one graph in drop mode, so that CUDA graphs could hold it.

The graph of the second token serves all later ones: the numbers of cached rows are symbols in it.
The backend runs the graph as it is; no compiler is needed.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from minillava import parse_plan
from minillava.cache import KVCache
from minillava.engine import State, decode, hidden_states_read, prefill
from minillava.request import prompts_of

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


def prefilled(model: Any, plan_text: str, prompts: tuple[str, ...]) -> tuple[torch.Tensor, State]:
    batch, plan = tiny.make_batch(model, *prompts), parse_plan(plan_text)
    encoded = model.encode(batch.pixels, hidden_states_read(model, plan))
    cache = KVCache(model.config.text, 8, model.dtype, model.device)
    return prefill(model, prompts_of(model, batch), encoded, plan, cache)


@pytest.mark.skipif(VERSION < (2, 14), reason="older versions of Dynamo were not tried")
@pytest.mark.parametrize(
    ("plan", "prompts"),
    [
        ("", ("ttItttt",)),
        ("fastv:layer=2,r=0.5", ("ttItttt", "tt", "tItIt")),
        ("pyramiddrop:layers=1/3,ratios=0.5/0.25", ("ttIItttt", "tIt")),
    ],
)
def test_one_token_is_one_graph(model: Any, plan: str, prompts: tuple[str, ...]) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def run_as_it_is(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(decode, fullgraph=True, backend=run_as_it_is)
    with torch.inference_mode():
        logits, plain = prefilled(model, plan, prompts)
        _, state = prefilled(model, plan, prompts)
        for _ in range(5):
            token = logits.argmax(-1)
            logits = decode(model, token, plain)
            assert torch.equal(compiled(model, token, state), logits)
    assert state.cache.lengths == plain.cache.lengths
    assert torch.equal(state.position, plain.position)
    assert len(graphs) == 2
