"""Pruning plans in transformers: minillava chooses the tokens, and transformers does the rest.

LlavaForConditionalGeneration is transformers' class with another `forward`:

    prefill     engine.prefill runs each prompt. Its model holds transformers' own modules, and in
                place of our blocks their decoder layers. What these give to the cache goes into
                the DynamicCache of `generate`, with a length of its own in each layer.
    next token  their layers run on that cache. Each has the mask and the positions of the rows that
                it holds: prompts with fewer rows are padded on the left.

Beams and several answers share their prompt's prefill. Without a cache all rows are run again, and
the plan chooses again, for each token. No file, module or attribute of theirs is changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from ..engine import Memory, Pruned, State, hidden_states_read, prefill
from ..llama import Attend, Block, Rope, rotate
from ..llava import Encoded, LLaVA
from ..loading.checkpoint import empty_model
from ..loading.config_file import parse_config
from ..loading.keys import our_name
from ..pruning import parse_plan
from ..pruning.base import Plan
from ..report import Kept, describe_arithmetic, explain_step
from ..request import Settings, check_plan, prompts_of
from ..sample import Batch, LastAttention, LayerAttention

# The names that an argument and an entry have had in different versions of transformers.
CACHES = ("cache", "past_key_values", "past_key_value")
LAYER_CACHE = next(
    n for n in CACHES if n in inspect.signature(LlamaDecoderLayer.forward).parameters
)
OUTPUT_CACHE = next(n for n in CACHES if n in {f.name for f in fields(LlavaCausalLMOutputWithPast)})

ATTENTION = ("sdpa", "eager")
# Arguments of from_pretrained, beside fastv_config. README.md says which of them change nothing.
LOADING = (
    *("config", "revision", "cache_dir", "force_download", "local_files_only", "token"),
    *("subfolder", "variant", "use_safetensors", "weights_only", "ignore_mismatched_sizes"),
    *("torch_dtype", "dtype", "attn_implementation", "low_cpu_mem_usage", "trust_remote_code"),
    *("device_map", "max_memory", "quantization_config", "generation_config", "key_mapping"),
    *("output_loading_info", "offload_folder", "offload_buffers", "proxies", "state_dict"),
)
# Arguments of generate that bring their own rows, or feed several tokens at once.
REFUSED = (
    *("inputs_embeds", "position_ids", "past_key_values", "cache", "assistant_model"),
    *("prompt_lookup_num_tokens", "prefill_chunk_size", "cache_implementation"),
    *("output_attentions", "output_hidden_states", "vision_feature_layer"),
)
DYNAMIC = ("cache_implementation", "dynamic")  # the one that is allowed


class LlavaForConditionalGeneration(transformers.LlavaForConditionalGeneration):  # type: ignore[misc,no-untyped-call,unused-ignore]
    """transformers' LLaVA-1.5 that drops image tokens as a plan says.

    kept: what each step of the plan left in the last prefill that `generate` ran (report.Kept).
    """

    pruner: Any = None  # a Pruner; None: nothing is pruned
    kept: Any = ()

    @classmethod
    def from_pretrained(  # type: ignore[override,unused-ignore]
        cls, pretrained_model_name_or_path: Any, *, fastv_config: Any = None, **arguments: Any
    ) -> Any:
        """Load a checkpoint as transformers does. fastv_config: FastV's dict, unchanged, or None.

        Raises ValueError for an argument that is not in LOADING.
        """
        plan = parse_plan(fastv_config)
        if unknown := sorted(arguments.keys() - {*LOADING}):
            raise ValueError(
                f"from_pretrained has no argument {', '.join(unknown)}; it takes fastv_config, "
                f"{', '.join(LOADING)}"
            )
        # their class reads the files: which names it translates depends on the class
        loaded: Any = transformers.LlavaForConditionalGeneration.from_pretrained(
            pretrained_model_name_or_path, **arguments
        )
        if arguments.get("output_loading_info"):
            return to_transformers(loaded[0], None, plan, 0), loaded[1]
        return to_transformers(loaded, None, plan, 0)

    def generate(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        *,
        input_ids: Any = None,
        pixel_values: Any = None,
        focus: Any = None,
        sizes: Any = None,
        **arguments: Any,
    ) -> Any:
        """As transformers' generate. focus, sizes: as in Batch.

        Raises ValueError, before any forward, for what cannot be done with a plan.
        """
        ids = inputs if input_ids is None else input_ids
        if self.pruner is None:
            pictures = {} if pixel_values is None else {"pixel_values": pixel_values}
            return super().generate(ids, generation_config, **pictures, **arguments)
        settings = generation_config or self.generation_config
        for name in REFUSED:
            value = arguments.get(name, getattr(settings, name, None))
            if value is None or value is False or (name, str(value)) == DYNAMIC:
                continue
            raise ValueError(f"generate({name}=…) does not go together with a plan; leave it out")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise ValueError("generate needs input_ids (B, T), as the processor makes them")
        each = focus if isinstance(focus, list | tuple) else [focus]
        if not all(isinstance(own, Tensor | None) for own in each):
            raise ValueError("focus must hold ids (t,) or None for each prompt; tokenise its texts")
        request = Request(self.pruner, len(ids), pixel_values, focus, sizes)
        answer = super().generate(ids, generation_config, pruning=request, **arguments)
        self.__dict__["kept"] = request.explain()
        return answer

    def forward(
        self,
        input_ids: Any = None,
        pixel_values: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        logits_to_keep: Any = 0,
        pruning: Request | None = None,
        **arguments: Any,
    ) -> Any:
        """transformers' forward; pruning: what `generate` asks for, then only the newest row has
        logits, (rows, 1, V)."""
        if pruning is None:
            if self.pruner is not None and pixel_values is not None:
                raise ValueError(
                    "a plan acts in generate() alone; call that, or for a forward without pruning "
                    "the model of transformers itself"
                )
            return super().forward(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                logits_to_keep=logits_to_keep,
                **arguments,
            )
        cache = next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)
        if cache is None and arguments.get("use_cache"):
            cache = transformers.DynamicCache()  # some versions leave this to the model
        if cache is None:
            logits: Any = pruning.run_again(input_ids, attention_mask)
        elif not cache.get_seq_length():
            logits = pruning.fill(input_ids, attention_mask, cache)
        else:
            logits = pruning.feed(input_ids, cache)
        return LlavaCausalLMOutputWithPast(logits=logits[:, None], **{OUTPUT_CACHE: cache})


def to_transformers(
    hf_model: Any, processor: Any, plan: Plan, seed: int
) -> LlavaForConditionalGeneration:
    """See the package."""
    if not isinstance(hf_model, transformers.LlavaForConditionalGeneration):
        raise ValueError(
            f"hf_model is a {type(hf_model).__name__}; give a transformers."
            "LlavaForConditionalGeneration (LLaVA-1.5)"
        )
    if not isinstance(plan, Plan):
        raise ValueError(f"plan={plan!r} must be a Plan: parse_plan(text), or Plan((method,))")
    model = LlavaForConditionalGeneration.__new__(LlavaForConditionalGeneration)
    model.__dict__.update(hf_model.__dict__)  # the same modules, config and generation_config
    model.__dict__.pop("forward", None)  # accelerate's, around the forward of hf_model
    tokenizer = getattr(processor, "tokenizer", processor)
    pruner = Pruner(hf_model, tokenizer and Words(tokenizer), plan, seed) if plan.methods else None
    model.__dict__.update(pruner=pruner, kept=())
    return model


# ---------------------------------------------------------------- their modules as our model


class Pruner:
    """A plan for a model of transformers. `ours` holds that model's modules under our names."""

    def __init__(self, theirs: Any, tokenizer: Words | None, plan: Plan, seed: int) -> None:
        self.theirs, self.seed = theirs, seed
        for name, value in (("tokens", plan.tokens), ("focus", plan.focus)):
            if value not in (None, "hf"):
                raise ValueError(
                    f"the plan wants prompts with {name}={value}, which only minillava's processor "
                    "makes; use minillava.generate"
                )
        if hidden := [m.label for m in plan.methods if m.mode == "mask"]:
            raise ValueError(
                f"{hidden[0]}: mode=mask hides rows in some layers, for which transformers' cache "
                "has no place; use mode=drop, or minillava.generate"
            )
        values = theirs.config.to_dict()
        values.pop("quantization_config", None)  # the modules are theirs, in whatever form
        config = parse_config(values, source="the model's config")
        self.ours: LLaVA = empty_model(config, tokenizer)  # type: ignore[arg-type]
        self.plan = plan.resolve(config.text.num_hidden_layers, config.vision.num_patches)
        share_modules(self.ours, theirs)
        self.follow_model()

    def follow_model(self) -> None:
        """Follow the model to its device and dtype. Raises ValueError where a plan cannot."""
        used = self.theirs.config._attn_implementation
        if used not in ATTENTION:
            raise ValueError(
                f"attn_implementation={used!r}; plans run with {' or '.join(ATTENTION)}"
            )
        if len(devices := {p.device for p in self.theirs.parameters()}) > 1:
            raise ValueError(
                f"the model lies on {', '.join(sorted(map(str, devices)))}; plans need it on one "
                "device: model.to(device)"
            )
        self.ours.dtype = self.theirs.dtype


def share_modules(ours: LLaVA, theirs: nn.Module) -> None:
    """Put their modules in the places of ours, and their decoder layers in those of our blocks."""
    for name, module in theirs.named_modules():
        if not next(module.children(), None) and hasattr(module, "weight"):
            ours.set_submodule(_our_module(name), module)
    classes = {n: p for n, p in theirs.named_parameters() if n.endswith("class_embedding")}
    (ours.vision.class_embedding,) = classes.values()
    layers = [m for m in theirs.modules() if isinstance(m, LlamaDecoderLayer)]
    for i, layer in enumerate(layers):
        ours.llama.blocks[i] = TheirBlock(ours.block(i), layer)
    if left := [name for name, p in ours.named_parameters() if p.is_meta]:
        raise ValueError(f"the model has no weights for {', '.join(left[:3])}; give a LLaVA-1.5")


def _our_module(name: str) -> str:
    try:
        return str(our_name(f"{name}.weight")).removesuffix(".weight")
    except KeyError:
        raise ValueError(
            f"module {name} of the model is not part of LLaVA-1.5; merge adapters first"
        ) from None


class TheirBlock(nn.Module):
    """A decoder layer of transformers in the place of a Block, for the rows of one prompt."""

    def __init__(self, block: Block, layer: LlamaDecoderLayer) -> None:
        super().__init__()
        # pruning methods compute attention weights with these
        self.norm1, self.attn, self.mlp, self.layer = block.norm1, block.attn, block.mlp, layer

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """x (S, D) -> (S, D)."""
        assert isinstance(attend, LayerAttention)
        if attend.x is not None:
            self._note(x, rope, attend)
        mask = None  # causal
        if self.layer.self_attn.config._attn_implementation == "eager":
            S, least = len(x), torch.finfo(x.dtype).min
            mask = x.new_full((S, S), least).triu(1)[None, None]  # eager holds S x S weights too
        return run_layer(self.layer, x[None], rope, mask, attend.cache)[0]

    def _note(self, x: Tensor, rope: Rope, attend: LayerAttention) -> None:
        """Compute again, for a method, the queries and keys that the layer keeps to itself."""
        h, (s,), attn = self.norm1(x), attend.samples, self.attn
        q, k = (rotate(attn.heads(proj, h), rope) for proj in (attn.q_proj, attn.k_proj))
        s.last = LastAttention(q, k, x, None, s.rows)


def run_layer(layer: nn.Module, x: Tensor, rope: Rope, mask: Tensor | None, cache: Any) -> Tensor:
    """One decoder layer of theirs on x (rows, S, D); the angles of rope are those of rows * S."""
    # theirs takes a sine without sign: what we have for the second half of a head
    halves = (t.chunk(2, -1)[1].view(*x.shape[:2], -1) for t in rope)
    cos, sin = (torch.cat((t, t), -1) for t in halves)  # (rows, S, Dh)
    given = {"attention_mask": mask, "position_embeddings": (cos, sin), LAYER_CACHE: cache}
    y = layer(x, use_cache=cache is not None, **given)
    return y[0] if isinstance(y, tuple) else y  # a tuple before transformers 4.54


class Words:
    """Their tokenizer as methods use ours."""

    def __init__(self, tokenizer: Any) -> None:
        self.theirs = tokenizer

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return list(self.theirs(text, add_special_tokens=bos)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.theirs.decode(ids, skip_special_tokens=True))


# ---------------------------------------------------------------- one call of generate


class PromptCache:
    """Keys and values of one prompt, as their layers give them. KVCache to us, Cache to them."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, (1, Hkv, S, Dh) each

    def update(self, k: Tensor, v: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.held[layer] = k, v
        return k, v

    def reserve(self, layers: Sequence[int], lengths: Sequence[int]) -> None:
        """Nothing: the layers give new tensors."""

    def cut(self, layers: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Hold only the rows with these numbers [(s,)] in some layers."""
        for layer in layers:
            k, v = self.held[layer]
            self.held[layer] = k[:, :, rows[0].to(k.device)], v[:, :, rows[0].to(v.device)]


class Request:
    """The prompts of one call of generate, and what pruning left of them.

    generate gives `rows` sequences, n for each prompt: its beams, or its answers.
    """

    def __init__(self, pruner: Pruner, n_prompts: int, pixels: Any, focus: Any, sizes: Any) -> None:
        pruner.follow_model()
        self.pruner, self.ours, self.n_prompts = pruner, pruner.ours, n_prompts
        self.pixels, self.focus, self.sizes = pixels, focus, sizes
        self.states: list[State] = []  # [prompt] of the first prefill
        self.encoded: Encoded | None = None
        self.memories: list[Memory] = []  # [row], without a cache
        self.longest = 0  # rows of the longest prompt in layer 0

    def begin(self, ids: Tensor, mask: Tensor | None) -> None:
        """Check the prompts (rows, T) and encode their images."""
        n = len(ids) // self.n_prompts
        own = None if mask is None else mask[::n]
        batch = Batch.from_padded(ids[::n], own, self.pixels, self.focus, self.sizes)
        self.prompts, self.length = prompts_of(self.ours, batch), ids.shape[1]
        check_plan(self.ours, self.prompts, self.pruner.plan, Settings())
        if batch.pixels is not None:
            read = hidden_states_read(self.ours, self.pruner.plan)
            self.encoded = self.ours.encode(batch.pixels, read)
        self.memories = [{} for _ in ids]

    def prefill(self, b: int, new: list[int], cache: Any, memory: Memory) -> tuple[Tensor, State]:
        """Logits (1, V) after prompt b and new tokens."""
        prompt, plan, seed = self.prompts[b].extended(new), self.pruner.plan, self.pruner.seed + b
        return prefill(self.ours, [prompt], self.encoded, plan, cache, seed, [memory])

    def run_again(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Without a cache: logits (rows, V) after the prompts and all new tokens, ids (rows, T)."""
        if not self.memories:
            self.begin(ids, mask)
        n, new = len(ids) // self.n_prompts, ids[:, self.length :].tolist()
        done = [self.prefill(r // n, new[r], None, self.memories[r]) for r in range(len(ids))]
        self.states = self.states or [state for _, state in done[::n]]
        return torch.cat([logits for logits, _ in done])

    def fill(self, ids: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """Run the prompts, ids (rows, T), and fill the cache: logits (rows, V)."""
        self.begin(ids, mask)
        n, caches = len(ids) // self.n_prompts, [PromptCache() for _ in self.prompts]
        done = [self.prefill(b, [], own, {}) for b, own in enumerate(caches)]
        self.states = [state for _, state in done]
        for layer in caches[0].held:
            held = zip(*(own.held[layer] for own in caches), strict=True)
            k, v = (pad_left(tensors).repeat_interleave(n, 0) for tensors in held)
            cache.update(k, v, layer)
        self._note_rows(n)
        return torch.cat([logits for logits, _ in done]).repeat_interleave(n, 0)

    def _note_rows(self, n: int) -> None:
        """What the next tokens need to know of each segment of layers that hold the same rows."""
        device, self.segments = self.ours.device, self.states[0].segments
        self.positions, self.held = list[Tensor](), list[Tensor | None]()
        for i in range(len(self.segments)):
            rows = [state.segments[i].held[0] for state in self.states]  # [prompt]
            lengths = torch.tensor([len(r) for r in rows])
            position = torch.tensor([r.next_position for r in rows])
            most = int(lengths.max())
            self.longest = self.longest if i else most
            held = torch.arange(most) >= most - lengths[:, None]  # (prompts, most)
            ragged = bool((lengths < most).any())
            self.positions.append(position.repeat_interleave(n).to(device))  # (rows,)
            self.held.append(held.repeat_interleave(n, 0).to(device) if ragged else None)

    def feed(self, ids: Tensor, cache: Any) -> Tensor:
        """Logits (rows, V) after one more token of each row, ids (rows, 1)."""
        if ids.shape[1] != 1 or not self.states:
            raise ValueError(f"a plan's cache takes one token at a time, not {ids.shape[1]}")
        before, x = cache.get_seq_length() - self.longest, self.ours.embed(ids)  # (rows, 1, D)
        for segment, position, held in zip(self.segments, self.positions, self.held, strict=True):
            rope = self.ours.llama.rope(position + before, x.dtype)
            mask = None
            if held is not None:
                seen = F.pad(held, (0, before + 1), value=True)[:, None, None]  # (rows, 1, 1, S)
                mask = torch.zeros_like(seen, dtype=x.dtype)
                mask = mask.masked_fill(~seen, torch.finfo(x.dtype).min)
            for i in segment.layers:
                layer: Any = self.ours.llama.blocks[i]
                x = run_layer(layer.layer, x, rope, mask, cache)
        return self.ours.llama.logits(x[:, 0])

    def explain(self) -> list[Kept]:
        """What each step of the plan left of the prompts."""
        _, rounding = describe_arithmetic(self.ours)
        steps = zip(*(state.history.get(0, []) for state in self.states), strict=True)
        return [explain_step(join_prompts(each), rounding) for each in steps]


def pad_left(tensors: Sequence[Tensor]) -> Tensor:
    """(1, Hkv, S, Dh) each, of different S -> (B, Hkv, longest, Dh), zeros on the left."""
    longest = max(x.shape[2] for x in tensors)
    return torch.cat([F.pad(x, (0, 0, longest - x.shape[2], 0)) for x in tensors])


def join_prompts(each: Sequence[Pruned]) -> Pruned:
    """What one step did to several prompts, each run by itself."""
    before, choices, left = (
        [getattr(p, name)[0] for p in each] for name in ("before", "choices", "left")
    )
    return Pruned(each[0].step, before, choices, left)
