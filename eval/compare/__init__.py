"""Several plans on one question about the same pictures, side by side with the unpruned model.

    from eval.compare import compare, draw
    comparison = compare(model, processor, image, "What digit is red?", ["fastv:k=2,r=0.75"])
    draw(comparison).save("sheet.png")

ask.py asks, runs.py holds what came of it, sets.py compares the kept sets, sheet.py draws, page.py
writes HTML. The command line is `python -m eval.compare`.
"""

from .ask import compare as compare
from .record import record as record
from .runs import Cell as Cell
from .runs import Comparison as Comparison
from .runs import Drift as Drift
from .runs import Run as Run
from .sheet import draw as draw
from .sheet import draw_sheet as draw_sheet
