"""Visual-token pruning: one file per method, the interface in base.py, plans as text in parsing.py.

Start with fastv.py, then base.py. README.md says what each method does and how to write your own.
"""

from .base import Context, Keep, Method, Plan
from .parsing import option_fields, parse_plan, parse_plan_with_files
from .registry import CATALOGUE, METHODS, PRESETS, Preset
from .user_methods import load_file_method

__all__ = [
    "CATALOGUE",
    "METHODS",
    "PRESETS",
    "Context",
    "Keep",
    "Method",
    "Plan",
    "Preset",
    "load_file_method",
    "option_fields",
    "parse_plan",
    "parse_plan_with_files",
]
