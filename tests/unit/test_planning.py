"""Plans without ranks: closed formulas, the command, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config

from tensorpar import mesh
from tensorpar.command import main
from tensorpar.planning import formulas
from tensorpar.planning.pretence import pretended_world
from tensorpar.planning.step import Figures, planned
from tensorpar.planning.wanted import Wanted, config_of
from tests.conformance.families import tiny_config


@pytest.mark.parametrize(
    ("family", "head"), [("gpt2", "GPT2LMHeadModel"), ("gptj", "GPTJForCausalLM")]
)
def test_the_closed_formulas(family, head):
    """What is derived from the model's own code equals what is written by hand, to the byte."""
    sizes = [(1, 3, False), (3, 3, False), (8, 3, False), (2, 1, True), (4, 3, True)]
    for tp, rows, split in sizes:  # five heads: whole, uneven, and from 4 a rank without one
        size = {"tp": tp, "batch": rows, "sequence": 9, "sequence_parallel": split}
        wanted = Wanted(tiny_config(family), head, **size)
        plan, z = planned(wanted), formulas.Sizes.of(wanted)
        assert plan.num_parameters == formulas.num_parameters(z)
        assert plan.gradients == plan.parameters == 4 * plan.num_parameters
        assert plan.optimizer == formulas.adamw_bytes(z)
        assert plan.activations == formulas.activations(z)
        assert plan.flop == formulas.flop(z)
        assert plan.sent == formulas.sent(z)
        assert any("without a head" in note for note in plan.notes) == (tp >= 4)
    assert not mesh.is_initialized()
    assert not torch.distributed.is_initialized()


@pytest.fixture
def model(tmp_path):
    """A folder with a small config."""
    config = tiny_config("gpt2")
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command(model, tmp_path, capsys):
    """A table, the degrees that fit, a chart; the model's class from its config."""
    drawn = tmp_path / "plan.png"
    options = ["--tp", "2", "--batch", "3", "--sequence", "9", "--memory", "500KB"]
    options.append("--sequence-parallel")
    assert main(["plan", str(model), *options, "--chart", str(drawn)]) == 0
    told = capsys.readouterr().out
    size = {"tp": 2, "batch": 3, "sequence": 9, "sequence_parallel": True}
    plan = planned(Wanted(tiny_config("gpt2"), "GPT2LMHeadModel", **size))
    assert config_of(model).to_dict() == config_of(model / "config.json").to_dict()
    assert "adamw, sequence parallel" in told
    for name in ("parameters", "gradients", "optimizer", "activations", "peak", "flop"):
        assert f"{getattr(plan, name):,}" in told
    fits = dict(re.findall(r"^ +(\d+) .*%, (fits|does not fit)$", told, re.MULTILINE))
    assert list(fits) == ["1", "2", "4", "8", "16"]
    smallest = next(degree for degree, verdict in fits.items() if verdict == "fits")
    assert smallest != "1"
    assert f"smallest of these degrees that fits: {smallest}" in told
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "much"], "--memory: size = 'much', required: a positive number"),
        (["--tp", "0"], "tp = 0, required: at least 1"),
        (["--dp", "-1"], "dp = -1, required: at least 1"),
        (["--sequence", "0"], "sequence = 0, required: at least 1"),
        (["--sequence", "17"], "sequence = 17, required: at most the model's positions, 16"),
        (["--model-class", "Nothing"], "model class = 'Nothing', required: a class"),
        (["--model-class", "BertModel"], "required: a class of Transformers for GPT2Config"),
        (["--chart", "nowhere/x.png"], "--chart = 'nowhere/x.png', required: in a folder"),
    ],
)
def test_wrong_requests_are_refused(model, capsys, options, message):
    """In one line, before anything is built."""
    assert main(["plan", str(model), *options]) == 1
    told = capsys.readouterr()
    assert not told.out
    assert message in told.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "required: a config.json or a folder that has one"),
        ("{", "required: a config in JSON"),
        (json.dumps({"model_type": "llama"}), "model_type = 'llama', required: one of ['bert', "),
        (json.dumps({"model_type": "gpt2"}), "architectures = None in the config"),
    ],
)
def test_wrong_models_are_refused(tmp_path, capsys, content, message):
    """What is no config, of no known family, or does not tell its class."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["plan", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_a_plan_wants_a_process_of_its_own():
    """Within a world, real or pretended, it would end the process group."""
    with (
        pretended_world(2, 1),
        pytest.raises(RuntimeError, match="required: a process of its own"),
    ):
        planned(Wanted(tiny_config("gpt2"), "GPT2LMHeadModel", sequence=9))
    assert not mesh.is_initialized()


def test_help_imports_neither_transformers_nor_matplotlib():
    """The command's grammar is quick to print, and has all four commands."""
    code = (
        "import sys; from tensorpar.command import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print([m for m in ('transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("[]\n")
    assert all(name in done.stdout for name in ("translate", "inspect", "verify", "plan"))


def test_nothing_is_allocated():
    """A rank's share of a model of 200 billion parameters, which no machine of tests could hold."""
    config = GPT2Config(n_layer=1, n_embd=2**17, n_head=2**10, n_positions=8, vocab_size=97)
    plan = planned(Wanted(config, "GPT2LMHeadModel", tp=2, sequence=8))
    assert plan.num_parameters > 10**11
    assert plan.peak > 12 * 10**11


def test_data_parallel_ranks_hold_even_shares():
    """The 3 of q|k|v and a rank's few heads are not what eight ranks share a weight along."""

    def plan(tp: int, dp: int) -> Figures:
        size = {"batch": 1, "sequence": 9}
        return planned(Wanted(tiny_config("gpt2"), "GPT2LMHeadModel", tp=tp, dp=dp, **size))

    assert 8 * plan(2, 8).parameters < 1.1 * plan(2, 1).parameters
    told = "c_attn.weight leaves a rank without a part of its 5 along dim 1"
    assert any(told in note for note in plan(8, 8).notes)
