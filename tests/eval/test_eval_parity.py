"""eval.parity: released kept sets are equal, changed ones differ or are ties, damage is refused."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import contexts
import pytest
import safetensors.torch
import torch
from tiny import refusal
from torch import Tensor

from eval import parity
from eval.parity_case import read_case
from minillava import parse_plan

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens"
NEW = GOLDENS / "methods2026"
RELEASED = sorted(
    path for path in NEW.glob("*/tiny-a*.safetensors") if path.parent.name not in ("inputs",)
)


def write(path: Path, tensors: Mapping[str, Any], **header: str) -> Path:
    tensors = {name: torch.as_tensor(x).clone().contiguous() for name, x in tensors.items()}
    safetensors.torch.save_file(tensors, path, metadata=header or None)
    return path


def judge(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[dict[str, Any]]:
    """The verdicts on cases, all of which could be judged."""
    code = parity.main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    verdicts = json.loads(out)
    assert code == int(any(v["verdict"] == "differs" for v in verdicts))
    return verdicts


def rewritten(
    path: Path, golden: Path, kept: Mapping[str, Any] | None = None, **extra: Any
) -> Path:
    """A golden in the form of the page, with other kept sets."""
    case = read_case(golden, None)
    names = [f"kept.{i}" for i in range(len(case.kept))]
    own = dict(zip(names, map(torch.tensor, case.kept), strict=True))
    plan = parity_plan(golden)
    return write(
        path, {**case.tensors, **own, **(kept or {}), **extra}, plan=plan, model=case.model
    )


def parity_plan(golden: Path) -> str:
    meta = json.loads(golden.with_suffix(".meta.json").read_text())
    return str(meta["parameters"]["plan"]).partition(" ")[0]


# ---------------------------------------------------------------- released kept sets


def test_kept_sets_of_released_code_are_equal(capsys):
    assert len(RELEASED) >= 19
    verdicts = judge(capsys, *RELEASED)
    assert [v["verdict"] for v in verdicts] == ["equal"] * len(RELEASED)
    assert {len(v["kept"]) for v in verdicts} == {1, 2, 3}


def test_features_of_released_code_need_no_model(capsys, monkeypatch):
    monkeypatch.setattr(parity, "load", None)
    case = GOLDENS / "divprune" / "select1_n576_r98.safetensors"
    (verdict,) = judge(capsys, case, "--prune", "divprune:keep=0.098")
    assert (verdict["verdict"], verdict["kept"]) == ("equal", [56])
    (verdict,) = judge(capsys, case, "--prune", "divprune:keep=57")
    assert (verdict["verdict"], verdict["pick"]) == ("differs", 56)


def test_scores_of_released_code_are_the_attention_of_a_step(capsys, tmp_path):
    golden = safetensors.torch.load_file(GOLDENS / "pyramiddrop" / "tiny-a_0.safetensors")
    kept = [golden[f"stage{i}_kept_image_index"] for i in range(2)]
    tensors = {f"attention.{i}": golden[f"stage{i}_scores"].flatten() for i in range(2)}
    tensors |= {f"kept.{i}": kept[i] for i in range(2)}
    plan = "pyramiddrop:layers=2/4,ratios=0.5/0.25"
    case = write(tmp_path / "a.safetensors", {**tensors, "patches.1": kept[0]}, plan=plan)
    assert judge(capsys, case)[0]["verdict"] == "equal"
    case = write(tmp_path / "b.safetensors", {**tensors, "patches.1": kept[0].flip(0)}, plan=plan)
    assert judge(capsys, case)[0]["step"] == 1


def test_places_in_the_prompt_are_kept_sets_too(capsys, tmp_path):
    golden = GOLDENS / "fastv" / "tiny-a" / "case0_K2_R50_hf_cache.safetensors"
    case, own = read_case(golden, parse_plan("fastv:k=2")), safetensors.torch.load_file(golden)
    places = {**case.tensors, "kept_positions": own["kept_positions"]}
    path = write(tmp_path / "a.safetensors", places, plan="fastv:k=2,r=0.5", model=case.model)
    assert judge(capsys, path)[0]["verdict"] == "equal"
    dropped = {*range(7, 23)} - {*own["kept_positions"].tolist()}  # the image is at 7 to 22
    places["kept_positions"][7] = dropped.pop()
    path = write(tmp_path / "b.safetensors", places, plan="fastv:k=2,r=0.5", model=case.model)
    assert judge(capsys, path)[0]["verdict"] == "differs"


def test_mustdrops_rows_are_read_as_patches(tmp_path):
    """Of the 28 rows of a 6 x 6 grid the first is a window, whose last patch is number 17."""
    places = torch.tensor([17, *({*range(36)} - {3, 4, 5, 9, 10, 11, 15, 16, 17})])
    tensors = {
        "pixel_u8": torch.zeros(1, 3, 84, 84, dtype=torch.uint8),
        "input_ids": torch.tensor([1, -200, 7]),
        "stage_tower_place": places,
        "stage_tower_patches_in_row": torch.tensor([9.0] + [1.0] * 27),
        "stage0_kept_image_index": torch.arange(0, 28, 3),
    }
    path = write(tmp_path / "a.safetensors", tensors)
    meta = {"model": "tiny-x", "parameters": {"plan": "mustdrop:layers=3"}}
    path.with_suffix(".meta.json").write_text(json.dumps(meta))
    kept = [{*numbers} for numbers in read_case(path, None).kept]
    patches = [3, *places[1:].tolist()]
    assert kept == [{*patches}, {*patches[::3]}]
    tensors["stage0_kept_image_index"][0] = 28
    write(path, tensors)
    with pytest.raises(ValueError, match="names rows beyond the 28 after the tower"):
        read_case(path, None)


# ---------------------------------------------------------------- differences


def test_a_swapped_pair_is_found_at_its_step(capsys, tmp_path):
    golden = NEW / "v2drop" / "tiny-a_0_layers1-3-4_left8-4-1.safetensors"
    kept = read_case(golden, None).kept
    out = next(t for t in kept[0] if t not in kept[1])
    swapped = torch.tensor([out, *kept[1][1:]])
    path = rewritten(tmp_path / "a.safetensors", golden, {"kept.1": swapped})
    (verdict,) = judge(capsys, path, golden)[:1]
    assert (verdict["verdict"], verdict["step"], verdict["layer"]) == ("differs", 1, 3)
    assert (verdict["only_theirs"], verdict["only_ours"]) == ([out], [kept[1][0]])
    by_token = {t["token"]: t for t in verdict["around"]}
    assert by_token[out]["theirs"]
    assert not by_token[out]["ours"]
    assert by_token[out]["score"] < by_token[kept[1][0]]["score"]
    assert parity.main([str(path)]) == 1
    assert f"differs at step 1 (v2drop, layer 3)\n  only theirs keeps 1: {out}\n" in (
        capsys.readouterr().out
    )


# Token 5 is the last of 4 kept, token 6 the first dropped.
RANKED = torch.tensor([0.9, 0.8, 0.7, 0.1, 0.05, 0.5, 0.5, 0.2, 0.01])


@pytest.mark.parametrize(
    ("gap", "dtype", "kept", "verdict"),
    [
        (1e-4, torch.float32, [0, 1, 2, 6], "tie"),
        (1e-2, torch.float32, [0, 1, 2, 6], "differs"),
        (1e-2, torch.float16, [0, 1, 2, 6], "tie"),
        (1e-4, torch.float32, [0, 1, 6, 7], "differs"),  # 7 is far from the cut
        (1e-4, torch.float32, [0, 1, 5, 6], "differs"),  # 2 is, too
        (1e-4, torch.float32, [0, 1, 2], "differs"),
        (1e-4, torch.float32, [0, 1, 2, 5], "equal"),
    ],
)
def test_a_tie_is_within_rounding_of_the_cut(capsys, tmp_path, gap, dtype, kept, verdict):
    scores = RANKED.clone()
    scores[6] *= 1 - gap
    path = tmp_path / "a.safetensors"
    write(path, {"attention": scores.to(dtype), "kept": kept}, plan="fastv:k=2,keep=4")
    assert judge(capsys, path)[0]["verdict"] == verdict


def test_a_tie_of_picks_is_no_later_than_what_is_lacking(capsys, tmp_path):
    """DivPrune's eighth pick has a twin; to lack the first one is another matter."""
    golden = safetensors.torch.load_file(GOLDENS / "divprune" / "select0_n64_r250.safetensors")
    features, order = golden["features"], golden["selected_in_order"].tolist()
    twin = max({*range(order[7], 64)} - {*order})  # of equal ones the lower is picked
    features[twin] = features[order[7]]
    for lacking, verdict in ((7, "tie"), (0, "differs")):
        kept = [twin if i == lacking else token for i, token in enumerate(order)]
        tensors = {"features": features, "kept": kept}
        path = write(tmp_path / "a.safetensors", tensors, plan="divprune:keep=16")
        (found,) = judge(capsys, path)
        assert (found["verdict"], found["pick"]) == (verdict, lacking)
        assert found["closest"] < found["rounding"]


def test_where_nothing_says_how_near_a_choice_is_nothing_is_a_tie(capsys, tmp_path):
    golden = NEW / "prunesid" / "tiny-a_0_keep10_seed0.safetensors"
    case = read_case(golden, None)
    kept = [*case.kept[0][1:], *({*range(16)} - {*case.kept[0]})][: len(case.kept[0])]
    tensors = {**case.tensors, "kept": kept}
    plan = "prunesid:keep=10,seed=0"
    path = write(tmp_path / "a.safetensors", tensors, plan=plan, model=case.model)
    assert judge(capsys, path)[0]["verdict"] == "differs"
    assert parity.main([str(path)]) == 1
    assert "our closest decision is not known" in capsys.readouterr().out


def twins_at_the_cut(path: Path) -> tuple[dict[str, Any], int, int, list[int]]:
    """A case in which two tokens are alike and G-Prune keeps one of them; these and its choice."""
    g = torch.Generator().manual_seed(2)
    for a, b in itertools.permutations(range(16), 2):
        features = torch.randn(16, 12, generator=g)
        features[b] = features[a]
        tensors = {"features": features, "kept": [0]}
        case = read_case(write(path, tensors, plan="gprune:keep=8"), None)
        ours = parity.choose(case, None).kept(0)
        if a in ours and b not in ours:
            return tensors, a, b, sorted(ours)
    raise AssertionError("no pair was at the cut")


def test_a_near_decision_excuses_what_noise_can_move_and_no_more(capsys, tmp_path):
    path = tmp_path / "a.safetensors"
    tensors, inside, outside, ours = twins_at_the_cut(path)
    other = next(t for t in range(16) if t not in (*ours, outside))
    for leaves, enters, expected in ((inside, outside, "tie"), (inside, other, "differs")):
        kept = [enters if t == leaves else t for t in ours]
        (found,) = judge(capsys, write(path, {**tensors, "kept": kept}, plan="gprune:keep=8"))
        assert found["verdict"] == expected
        assert found["closest"] < found["rounding"]
        parity.main([str(path)])
        assert ("so it is no tie" in capsys.readouterr().out) == (expected == "differs")


def test_tokens_of_a_second_image_follow_those_of_the_first(capsys, tmp_path):
    files = [NEW / "scope" / f"tiny-a_{name}.safetensors" for name in ("0_keep10", "1_keep6")]
    cases = [read_case(file, None) for file in files]
    ids = torch.cat([case.tensors["ids"] for case in cases])
    pixels = torch.cat([case.tensors["pixels"] for case in cases])
    first = safetensors.torch.load_file(files[0])["kept_in_order_found"].tolist()[:6]
    kept = [*first, *(16 + t for t in cases[1].kept[0])]
    header = {"plan": "scope:keep=6", "model": cases[0].model}
    path = tmp_path / "a.safetensors"
    write(path, {"ids": ids, "pixels": pixels, "kept": kept}, **header)
    assert judge(capsys, path)[0]["verdict"] == "equal"
    write(path, {"ids": ids, "pixels": pixels, "kept": kept[:-1]}, **header)
    (verdict,) = judge(capsys, path)
    assert (verdict["verdict"], verdict["only_ours"]) == ("differs", [kept[-1]])


# ---------------------------------------------------------------- the inputs of a choice

GRID = 8
READ = {  # method -> what it reads of the vision tower, by the names of the page
    "scope:keep=12": ["vision_attention"],
    "fastervlm:keep=12": ["vision_attention"],
    "fastervlm:keep=12,blocks=16/20-22": [
        "vision_attention_16",
        *(f"vision_attention_{i}" for i in (20, 21, 22)),
    ],
    "hired:keep=0.3": ["vision_attention"],
    "vispruner:keep=12": ["vision_attention"],
    "holov:keep=24": ["vision_attention"],
    "hiprune:keep=20": ["vision_attention_mean_8", "vision_attention_mean_22"],
    "visionzip:dominant=9,contextual=4": ["vision_attention", "vision_keys", "vision_state"],
    "prunesid:keep=12,seed=3": ["vision_attention", "vision_state"],
    "nuwa:keep=12,final=0": ["vision_attention", *(f"vision_state_{i}" for i in range(16, 25))],
    "vscan:keep=34,final=0": ["vision_attention_5", "vision_attention"],
    "gprune:keep=12": [],
    "divprune:keep=12": [],
}


@pytest.fixture(scope="module")
def tower() -> Any:
    torch.manual_seed(5)
    return contexts.make_model(GRID, depth=24)


def dump(c: Any, name: str) -> Tensor:
    """A tensor of the page from a real Context."""
    what, _, number = name.rpartition("_") if name[-1].isdigit() else (name, "", "")
    if what == "vision_state":
        return c.vision_state(int(number) if number else None)[0]
    if what == "vision_keys":
        return c.vision_keys(-2)
    query = "mean" if what.endswith("_mean") else "class"
    return c.vision_attention(int(number or -2), query)


@pytest.mark.parametrize("plan", READ)
def test_a_method_chooses_from_a_dump_as_from_the_model(plan, tower, capsys, tmp_path):
    generator = torch.Generator().manual_seed(7)
    hidden = {i: torch.randn(1, 1 + GRID**2, 24, generator=generator) for i in range(25)}
    method = parse_plan(plan).methods[0]
    embed = method.stages()[0][0] == "embed"
    features = torch.randn(GRID**2, 40, generator=generator) if embed else None
    c = contexts.make_context(tower, method, hidden, features=features)
    tensors = {name: dump(c, name) for name in READ[plan]} | {"features": c.features()}
    tensors["kept"] = method.choose(c).index
    assert 0 < len(tensors["kept"]) < GRID**2
    path = write(tmp_path / "a.safetensors", tensors, plan=plan)
    assert judge(capsys, path)[0]["verdict"] == "equal"


def test_text_and_rows_are_read_by_their_names(capsys, tmp_path):
    g = torch.Generator().manual_seed(1)
    image, text = torch.randn(16, 12, generator=g), torch.randn(5, 12, generator=g)
    path = tmp_path / "a.safetensors"
    likeness = torch.nn.functional.cosine_similarity(image[:, None], text, dim=-1).amax(1)
    kept = likeness.topk(6).indices
    write(path, {"features": image, "focus": text, "kept": kept}, plan="simignore:keep=6")
    assert judge(capsys, path)[0]["verdict"] == "equal"
    before = image + torch.arange(16)[:, None].flip(0)
    tensors = {"features": image, "before": before, "kept": range(8)}
    write(path, tensors, plan="v2drop:layers=3,ratios=0.5")
    assert judge(capsys, path)[0]["verdict"] == "equal"
    rows = torch.rand(2, 5, 16, generator=g)
    share = (image @ text.T).softmax(1).mean(0)
    kept = rows[:, share > share.mean()].mean((0, 1)).topk(7).indices
    tensors = {"features": image, "entered": image, "text": text, "attention_by_row": rows}
    write(path, {**tensors, "kept": kept}, plan="sparsevlm:layers=3,keep=7")
    assert judge(capsys, path)[0]["verdict"] == "equal"
    write(
        path,
        {"attention_by_row": rows, "kept": rows[:, -1].mean(0).topk(4).indices},
        plan="fastv:keep=4",
    )
    assert judge(capsys, path)[0]["verdict"] == "equal"


# ---------------------------------------------------------------- the page


def test_the_two_dumps_on_the_page(capsys, tmp_path, monkeypatch):
    blocks = re.findall(
        r"```python\n(case = .*?)```", (ROOT / "eval" / "README.md").read_text(), re.S
    )
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    g = torch.Generator().manual_seed(3)
    attention = torch.rand(1, 4, 577, 577, generator=g)
    outputs = SimpleNamespace(
        hidden_states=[None, torch.randn(1, 577, 8, generator=g), None],
        attentions=[attention, None],
    )
    kept = attention[0, :, 0, 1:].mean(0).topk(64).indices
    exec(blocks[0], {"outputs": outputs, "kept": kept, "safetensors": safetensors})
    assert judge(capsys, "case.safetensors")[0]["verdict"] == "equal"
    golden = GOLDENS / "fastv" / "tiny-a" / "case0_K2_R50_hf_cache.safetensors"
    case, kept = read_case(golden, parse_plan("fastv:k=2")), safetensors.torch.load_file(golden)
    inputs = {"input_ids": case.tensors["ids"][None], "pixel_values": case.tensors["pixels"]}
    exec(blocks[1], {**inputs, "kept": kept["kept_positions"], "safetensors": safetensors})
    more = ("--model", case.model, "--prune", "fastv:k=2,keep=8")
    assert judge(capsys, "case.safetensors", *more)[0]["verdict"] == "equal"


@pytest.mark.parametrize(("keep", "sizes"), [(2, "3 against 2"), (5, "3 against 5")])
def test_another_size_is_a_difference(capsys, tmp_path, keep, sizes):
    path = write(tmp_path / "a.safetensors", GOOD, plan=f"divprune:keep={keep}")
    assert parity.main([str(path)]) == 1
    out, err = capsys.readouterr()
    assert f"differs at step 0 (divprune, the embed stage): sizes {sizes}, theirs" in out
    assert err == ""
    assert judge(capsys, path)[0]["sizes"] == [3, keep]


def test_more_rows_at_a_later_stage_are_a_difference(capsys, tmp_path):
    golden = NEW / "v2drop" / "tiny-a_0_layers1-3-4_left8-4-1.safetensors"
    first, second, _ = read_case(golden, None).kept
    more = torch.tensor(sorted({*second, next(t for t in first if t not in second)}))
    path = rewritten(tmp_path / "a.safetensors", golden, {"kept.1": more})
    verdict = judge(capsys, path)[0]
    assert (verdict["verdict"], verdict["step"], verdict["sizes"]) == ("differs", 1, [5, 4])


def test_older_goldens_without_a_plan_say_how_to_give_it(capsys):
    golden = GOLDENS / "divprune" / "select1_n576_r98.safetensors"
    assert parity.main([str(golden)]) == 2
    assert "no plan in the parameters of select1_n576_r98.meta.json; give it" in refusal(capsys)


# ---------------------------------------------------------------- damage

GOOD = {"features": torch.eye(9), "kept": [0, 1, 2]}
PLAN = {"plan": "divprune:keep=3"}
IDS = {"ids": [1, -200, 5], "pixels": torch.zeros(1, 3, 56, 56)}
TINY = {"model": str(GOLDENS / "checkpoints" / "tiny-a" / "hub-sharded")}


@pytest.mark.parametrize(
    ("tensors", "header", "said"),
    [
        (GOOD, {}, "no plan in the header; give it, for example --prune"),
        (GOOD, {"plan": "scopee:keep=3"}, "scopee"),
        (GOOD, {"plan": "./mine.py:Mine:keep=3"}, "mine.py"),
        (GOOD, {"plan": "divprune:keep=12"}, "keep=12, but there are 9 image tokens"),
        (GOOD, {**PLAN, "author": "me"}, "the header has 'author'"),
        (GOOD, {"plan": "v2drop"}, "the plan has 3 steps"),
        (GOOD, {"plan": "tome:r=2"}, "runs a part of the model itself"),
        (GOOD, {"plan": "scope:keep=3"}, "does not have vision_attention"),
        (GOOD, {"plan": "fastv:k=2,keep=3,released=1"}, "released=1 moves the window"),
        (GOOD | {"kept": [0, 1, 9]}, PLAN, "has 9; image tokens are 0 to 8"),
        (GOOD | {"kept": [0, 1, 1]}, PLAN, "kept names a token twice"),
        (GOOD | {"kept": [0.5]}, PLAN, "kept must be integers (k,) or a mask"),
        (GOOD | {"features": torch.eye(9)[:, :, None]}, PLAN, "features must have 2 dimensions"),
        (GOOD | {"features": torch.eye(9) * math.nan}, PLAN, "features has NaN"),
        (GOOD | {"feature": torch.eye(9)}, PLAN, "it has the tensor 'feature'"),
        (GOOD | {"focus": torch.eye(5)}, {"plan": "simignore:keep=3"}, "do not fit together"),
        ({"kept": [0]}, PLAN, "it has no inputs"),
        (IDS | {"kept": [0]}, PLAN, "does not name its model"),
        (IDS | {"kept": [0], "features": torch.eye(9)}, PLAN, "it has the tensor 'features'"),
        (IDS | {"kept": [0], "pixels": torch.zeros(1, 3, 9, 9)}, PLAN | TINY, "pixels must be"),
        (IDS | {"kept": [0], "mask": [1]}, PLAN | TINY, "ids and mask must be one prompt"),
        (GOOD | {"kept_positions": [0]}, PLAN, "kept_positions are places in a prompt"),
    ],
)
def test_damage_is_one_line(tensors, header, said, capsys, tmp_path):
    path = write(tmp_path / "a.safetensors", tensors, **header)
    assert parity.main([str(path)]) == 2
    error = refusal(capsys)
    assert said in error
    assert "a.safetensors: " in error


def test_other_files_are_refused_and_nothing_is_unpickled(capsys, tmp_path):
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    whole = write(tmp_path / "a.safetensors", GOOD, **PLAN).read_bytes()
    for content in (pickle.dumps(Trap()), whole[:-20], b"", whole[:5]):
        (tmp_path / "b.safetensors").write_bytes(content)
        assert parity.main([str(tmp_path / "b.safetensors")]) == 2
        assert "no whole safetensors file" in refusal(capsys)
    assert parity.main([str(tmp_path / "none.safetensors")]) == 2
    assert "there is no such file" in refusal(capsys)
    assert not (tmp_path / "sprung").exists()


def test_every_case_is_judged_and_a_damaged_one_decides(capsys, tmp_path):
    good = GOLDENS / "divprune" / "select0_n64_r250.safetensors"
    bad, wrong = tmp_path / "bad.safetensors", tmp_path / "wrong.safetensors"
    bad.write_bytes(b"")
    own = safetensors.torch.load_file(good)
    write(wrong, {"features": own["features"], "kept": range(16)}, plan="divprune:keep=16")
    arguments = [str(bad), str(good), str(wrong), "--prune", "divprune:keep=16"]
    assert parity.main(arguments) == 2
    out, err = capsys.readouterr()
    assert [line.split(":")[1].split()[0] for line in out.splitlines() if line[0] != " "] == [
        "equal",
        "differs",
    ]
    assert err.count("\n") == 1
    assert parity.main(arguments[1:]) == 1
    capsys.readouterr()
    assert parity.main([str(good), "--prune", "divprune:keep=16"]) == 0
