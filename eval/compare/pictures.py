"""All that is drawn of a comparison, once, for the sheet and for the HTML page."""

from __future__ import annotations

from dataclasses import dataclass

from minillava.app.overlay import draw_panels, frame_images
from minillava.app.panels import Panel

from .difference import draw_difference
from .runs import Comparison, Run
from .sets import Difference, label_runs, list_differences

OUTSIDE = 0.15  # of a cropped image, on either side, in sides of the square: columns are many


@dataclass(frozen=True)
class Pictures:
    comparison: Comparison
    labels: dict[str, str]  # plan -> A, B, C, ...
    overlays: list[list[list[Panel]]]  # [run][image]: patches that live, then the reasons
    differences: list[tuple[Difference, list[Panel]]]  # of each pair: [image]

    def name(self, run: Run) -> str:
        """How the run is called: "A  fastv:k=2"."""
        return f"{self.labels[run.plan]}  {run.plan}" if run.plan in self.labels else "unpruned"

    @property
    def several(self) -> bool:
        """Whether there is more than one image."""
        return len(self.comparison.images) > 1


def draw_pictures(comparison: Comparison) -> Pictures:
    _, first = comparison.answered[0]
    config, aspect = comparison.image_config, comparison.aspect
    frames = frame_images(comparison.images, first.config, config, aspect, OUTSIDE)
    labels = label_runs(comparison)
    overlays = [
        [draw_panels(run.result, 0, i, frame) for i, frame in enumerate(frames)]
        if run.result
        else []
        for run in comparison.runs
    ]
    differences = [
        (
            d,
            [
                draw_difference(d, frame.square, i, (labels[d.a.plan], labels[d.b.plan]))
                for i, frame in enumerate(frames)
            ],
        )
        for d in list_differences(comparison)
    ]
    return Pictures(comparison, labels, overlays, differences)
