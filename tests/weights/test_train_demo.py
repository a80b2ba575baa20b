"""The trainer of the demo: its batches and its forward are the engine's."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import refusal

from eval.conditions import detail
from minillava.generate import generate
from minillava.loading.checkpoint import load
from minillava.processing.templates import conversation
from minillava.pruning.parsing import parse_plan
from weights import demo_data as data
from weights import muon, scenes, train_demo, train_text
from weights.demo_accuracy import farthest, hide
from weights.demo_model import DEPTH, A, Demo, Losses, random_drop
from weights.export_demo import export


@pytest.fixture(scope="module")
def model() -> Demo:
    return Demo(3)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    parts = ("vision.", "projector.", "llama.")
    weights = {k: p.detach() for k, p in model.named_parameters() if k.startswith(parts)}
    pieces = data.tokenizer().serialized_model_proto()
    export(folder, data.CONFIG, weights, pieces, torch.float32)
    return folder


@pytest.mark.parametrize("plan", [None, "fastv:k=2,keep=30", "divprune:keep=30"])
def test_conversations_in_lanes_give_what_separate_prompts_give(model, folder, plan):
    rng = np.random.default_rng(5)
    things = scenes.make_things(rng, "held-out")
    asked = scenes.questions(things, rng, ["where", "count", "colour"])
    rows = data.pack(asked[:1] if plan else asked, things, rng, follow=0.0)
    later = data.pack(asked[:2], things, rng, follow=1.0)
    patches = data.Patches()
    for _ in range(2):
        data.add_patches(things, patches)
    image = scenes.draw(things, rng)
    batch = data.collate([rows, later], patches, [np.asarray(image)] * 2)
    with torch.no_grad():
        state, _ = model.encode_images(batch.pixels)
        features = model.projector(state[:, 1:])
        hidden, attention, _ = model.decode(features, batch)
        if plan:  # FastV reads the newest row of each image's last question
            newest = torch.tensor([asked[-1][0] for asked in batch.asked]) - A
            fastv = attention[1][torch.arange(2), :, newest].mean(1)
            score, layer = (fastv, 2) if "fastv" in plan else (farthest(features, 30), 0)
            hidden, *_ = model.decode(features, batch, hide(score, 30, layer))
        logits = model.llama.logits(hidden)
    engine, processor = load(folder)
    q = [example.question for example in asked]
    prompts = [conversation("llava-hf", text, n_images=1) for text in (q[:1] if plan else q)]
    turns = [(q[0], asked[0].answer)]
    prompts.append(conversation("llava-hf", q[1], turns, 1))
    inputs = processor(prompts, images=[[image]] * len(prompts))
    chosen = parse_plan(plan) if plan else None
    result = generate(engine, inputs, chosen, max_new_tokens=1, output_logits=True)
    ours = [logits[0, row] for row, *_ in rows[1]] + [logits[1, later[1][1][0]]]
    assert len(ours) == len(prompts)
    for mine, theirs in zip(ours, result.logits[:, 0], strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.square().mean().sqrt()


def test_a_dropped_image_still_shows_every_thing():
    batch = data.make_batch(np.random.default_rng(1), 40, False, "train", data.Mix())
    drop = random_drop(batch, 0.5, torch.Generator().manual_seed(1))
    for until, owners in zip(drop.until, batch.owners, strict=True):
        assert {*owners[until == DEPTH].tolist()} >= {*owners[owners >= 0].tolist()}
    assert 0.2 < float((drop.until == DEPTH).all(1).float().mean()) < 0.8
    assert max(len({*until.tolist()}) for until in drop.until) == 3  # two stages
    assert float((drop.until == DEPTH).float().mean()) < 0.8


def test_salience_is_equal_for_all_things_and_half_of_it_is_in_the_middle():
    batch = data.make_batch(np.random.default_rng(2), 8, False, "train", data.Mix())
    for salience, owners, codes in zip(batch.salience, batch.owners, batch.codes, strict=True):
        things = owners[owners >= 0].unique()
        for thing in things:
            mine = salience[owners == thing]
            assert float(mine.sum()) == pytest.approx(1 / len(things), abs=1e-5)
            assert float(mine.max()) >= 0.5 / len(things) - 1e-5
        assert int((codes[:, data.CENTRE] > 0).sum()) == len(things)


def test_options_belong_to_their_letters_and_the_answer_to_the_right_one():
    batch = data.make_batch(np.random.default_rng(1), 2, False, "train", data.Mix(choices=3))
    pieces = data.tokenizer()
    answered = 0
    for ids, options, targets in zip(batch.ids, batch.options, batch.targets, strict=True):
        words = [pieces.id_to_piece(int(i)) if i < 600 else "" for i in ids]
        for row in (options < 0).nonzero().flatten().tolist():
            (letter,) = (options == -options[row] - 1).nonzero().flatten().tolist()
            assert "▁" + words[letter] == pieces.id_to_piece(int(targets[row]))
            text = (options == -options[row]).nonzero().flatten().tolist()
            assert text == [*range(letter + 2, letter + 2 + len(text))]
            assert words[letter - 1 : letter + 2] == ["▁(", words[letter], ")"]
            assert words[text[-1] + 1] in ("▁(", "<0x0A>")
            answered += 1
    kinds = [kind for asked in batch.asked for _, kind, *_ in asked]
    assert answered == kinds.count("choice") > 0


def test_known_shares_of_questions_need_detail_or_none():
    found = [detail(scene, example) for scene, example in scenes.held_out(4, 300)]
    assert found.count("none") == 30
    assert 60 <= found.count("small") <= 120


def test_a_resumed_stage_continues_where_it_stopped(tmp_path, monkeypatch):
    short = replace(train_demo.STAGES["reader"], images=1, steps=2, undropped=0)
    monkeypatch.setitem(train_demo.STAGES, "reader", short)
    monkeypatch.setattr(train_demo, "log_accuracy", lambda *_: None)
    monkeypatch.setattr(muon, "orthogonal", lambda update: update)  # half of the time, and no state
    once, twice = (
        train_demo.Run("reader", tmp_path / name, 1, Losses(), save_every=1e9) for name in "ab"
    )
    for run in (once, twice):
        run.runs.mkdir()
    train_demo.run_stage(once)
    train_demo.run_stage(replace(twice, steps=1))
    train_demo.run_stage(twice)
    states = [torch.load(run.runs / "reader.pt", weights_only=True) for run in (once, twice)]
    for name, p in states[0]["model"].items():
        assert torch.equal(p, states[1]["model"][name]), name


def test_an_ablation_leaves_a_loss_out():
    assert Losses().without(["salience", "drop"]) == replace(Losses(), salience=0.0, drop=0.0)
    with pytest.raises(ValueError, match="--without nothing: the losses are answers, patches"):
        Losses().without(["nothing"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--runs", "file"], "file cannot be written (File exists); give a writable folder"),
        (["--runs", "file", "--workers", "1"], "file cannot be written (File exists)"),
        (["--runs", "file/x"], "file/x cannot be written (Not a directory)"),
        (["--runs", ""], "--runs: '' is empty"),
        (["--runs", "new", "--stage", "captions"], "new/finish.pt is not there; train its stage"),
    ],
)
def test_a_stage_is_checked_before_its_processes_start(
    options, reason, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_demo, "start_processes", None)
    Path("file").write_text("")
    assert train_demo.main(options) == 2
    assert reason in refusal(capsys)


@pytest.mark.parametrize(
    ("name", "workers"), [("reader.log", "2"), ("reader.log", "1"), ("reader.pt", "1")]
)
def test_an_error_of_one_process_ends_all_with_one_line(
    name, workers, tmp_path, monkeypatch, capfd
):
    """Only the first process writes; the second waits for its gradients."""
    short = replace(train_demo.STAGES["reader"], images=1, steps=1)
    monkeypatch.setitem(train_demo.STAGES, "reader", short)
    path = tmp_path / name
    (path if name == "reader.log" else path.with_suffix(".part")).mkdir()
    options = ["--runs", str(tmp_path), "--stage", "reader", "--workers", workers]
    assert train_demo.main(options) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: {tmp_path}/reader.")
    assert " cannot be written (Is a directory); give a writable folder" in err
    assert err.count("\n") == 1


def test_a_folder_of_train_text_that_cannot_be_written_is_one_line(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "x"):
        assert train_text.main([str(folder)]) == 2
        assert f"{folder} cannot be written (" in refusal(capsys)


def test_a_full_disk_in_train_text_is_one_line(tmp_path, monkeypatch, capsys):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(train_text, "read_texts", lambda: (["a"], ["b"]))
    assert train_text.main([str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {tmp_path} cannot be written (No space left on device); free")
    assert line.count("\n") == 1
