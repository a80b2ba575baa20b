"""The benchmarks, by the names that --task takes."""

from __future__ import annotations

from .base import Task
from .demo import Demo

TASKS: dict[str, Task] = {task.name: task for task in (Demo(),)}
