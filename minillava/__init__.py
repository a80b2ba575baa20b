"""LLaVA-1.5 from scratch in PyTorch, with visual-token pruning in its forward and its KV cache.

from minillava import load, parse_plan
from minillava.generate import generate

model, processor = load("weights/demo")
batch = processor(["USER: <image>\\nWhat digit is red? ASSISTANT:"], images=[[image]])
result = generate(model, batch, plan=parse_plan("fastv:k=2,r=0.5"))
print(processor.decode(result.tokens[0]))
"""

from .app.overlay import overlay
from .loading.checkpoint import load
from .pruning import parse_plan
from .sample import Batch

__all__ = ["Batch", "load", "overlay", "parse_plan"]
