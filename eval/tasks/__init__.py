"""The benchmarks, by the names that --task takes."""

from __future__ import annotations

from .aokvqa import AOKVQA
from .base import Task
from .captions import COCO2014, COCO2017, FLICKR30K, NOCAPS
from .demo import Demo
from .gqa import GQA
from .mmbench import MMBench
from .mme import MME
from .mmmu import MMMU
from .ocrvqa import OCRVQA
from .pope import POPE
from .refcoco import REFCOCO, REFCOCO_PLUS, REFCOCOG
from .scienceqa import ScienceQA
from .seed_bench import SEEDBench
from .textvqa import TextVQA
from .vqav2 import VQAv2

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Demo(),
        ScienceQA(),
        AOKVQA(),
        OCRVQA(),
        GQA(),
        SEEDBench(),
        MMMU(),
        MME(),
        POPE(),
        TextVQA(),
        VQAv2(),
        MMBench(),
        NOCAPS,
        COCO2014,
        COCO2017,
        FLICKR30K,
        REFCOCO,
        REFCOCO_PLUS,
        REFCOCOG,
    )
}
