"""Plans of every method at a given budget, for commands that compare methods."""

from __future__ import annotations

from minillava.pruning.mustdrop import MustDrop

# these have no option for a budget
ADAPTIVE = ("prumerge", "prumerge-plus", "border", "text-only")


def suggest_plan(
    name: str, share: float, n_layers: int, n_tokens: int, layer: int | None = None
) -> str:
    """A plan of one method that leaves a share of the n_tokens patches, for a decoder of n_layers.

    layer: whose input methods in the decoder prune. By default it is 2, and the middle for methods
    that also prune before the decoder. Methods with several layers prune the input of three,
    `layer` and two more in equal steps (of fewer, if there are not so many), and reduce the tokens
    by equal ratios. VTW drops all tokens at one layer, which follows from the share. MustDrop has
    no budget, and its layers are scaled to n_layers. Other methods without a budget are given by
    their names. The plan may be one that the model refuses.
    """
    k = round(n_tokens * share)
    first, middle = (2, n_layers // 2) if layer is None else (layer, layer)
    m = max(1, min(3, n_layers - first))  # layers of methods with several
    layers = "/".join(str(first + i * (n_layers - first) // m) for i in range(m))
    steps = [round(n_tokens * share ** (i / m)) for i in range(1, m + 1)]
    side, cells = max(1, round(k**0.5)), (round(n_tokens**0.5) // 2) ** 2  # the latter are Nuwa's
    early = min(n_tokens, k + k // 2)
    fewer = sorted({max(1, round(x * n_layers / 32)) for x in MustDrop.layers})
    halves = f"layer={middle},keep={early},final={k - k // 2}"
    special = {
        "fastv": f"fastv:k={first},keep={k}",
        "dart": f"dart:layer={first},keep={k}",
        "vtw": f"vtw:layer={round(n_layers * share)}",
        "fitprune": f"fitprune:average={k}",
        "pyramiddrop": f"pyramiddrop:layers={layers},ratios="
        + "/".join(f"{s / n_tokens:.3f}" for s in steps),
        "sparsevlm": f"sparsevlm:layers={layers},keep={'/'.join(map(str, steps))}",
        "visionzip": f"visionzip:dominant={k - k // 6},contextual={k // 6}",
        "v2drop": f"v2drop:layers={layers},ratios=" + "/".join([f"{share ** (1 / m):.3f}"] * m),
        "vscan": f"vscan:{halves}",
        "nuwa": f"nuwa:{halves},cell={-(-early // cells)}",
        "apet": f"apet:{halves},basis={max(1, min(10, k - k // 2 - 1))}",
        "autoprune": f"autoprune:depth={n_layers},target={k}",
        "ivcprune": f"ivcprune:layer={first},foreground={max(1, k - 2 * (k // 8))},axes={k // 8}",
        "mustdrop": f"mustdrop:layers={'/'.join(map(str, fewer))}",
        "grid": f"grid:h={side},w={side}",
        "pool": f"pool:h={side},w={side}",
        **{adaptive: adaptive for adaptive in ADAPTIVE},
    }
    return special.get(name, f"{name}:keep={k}")
