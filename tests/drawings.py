"""What tests read out of a drawing."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from minillava.app.canvas import Drawing, Text, font, to_ascii

SVG = "{http://www.w3.org/2000/svg}"


def panels_of(drawing: Drawing) -> list[dict[str, dict[int, dict[str, str]]]]:
    """What an SVG says about patches: for each panel, by class and patch, the data-... of it."""
    found: list[dict[str, dict[int, dict[str, str]]]] = []
    for element in ElementTree.fromstring(drawing.svg()).iter():
        if element.tag == f"{SVG}use":  # a panel begins with its picture
            found.append({})
        patch = element.get("data-patch")
        if patch is not None:
            data = {k[5:]: v for k, v in element.items() if k.startswith("data-")}
            found[-1].setdefault(str(element.get("class")), {})[int(patch)] = data
    return found


def check_layout(drawing: Drawing) -> None:
    """No text leaves the page, and no two overlap."""
    boxes = []
    for shape in drawing.shapes:
        if isinstance(shape, Text):
            text = to_ascii(shape.text)
            width = font(shape.size).getlength(text)
            left = shape.x - {"start": 0, "middle": width / 2, "end": width}[shape.at]
            boxes.append((left, shape.y, left + width, shape.y + shape.size, text))
    for left, top, right, bottom, text in boxes:
        assert left >= 0, text
        assert top >= 0, text
        assert right <= drawing.width, text
        assert bottom <= drawing.height, text
    for i, (a1, b1, a2, b2, first) in enumerate(boxes):
        for c1, d1, c2, d2, second in boxes[i + 1 :]:
            apart = a2 <= c1 or c2 <= a1 or b2 <= d1 or d2 <= b1
            assert apart, f"{first!r} and {second!r}"
