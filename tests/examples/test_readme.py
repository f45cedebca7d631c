"""The README's code runs as it stands there."""

from __future__ import annotations

import os
import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import torch
import transformers
from torch import nn

import tensorpar as tp
from tensorpar.planning import command as planning
from tensorpar.translators import command as translating
from tensorpar.translators import hf_to_smdistributed
from tensorpar.translators.destination import num_bytes
from tests.families import FAMILIES
from tests.unit.test_translators_command import same, save_partial, saved_model

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(mark: str) -> str:
    """The one code block that contains `mark`."""
    (found,) = (text for text in BLOCKS if mark in text)
    return found


def run_training_script(folder: str) -> list[str]:
    """The first example, in a folder of its own; the files that it leaves."""
    os.chdir(folder)
    names: dict[str, object] = {}
    exec(compile(block("# train.py"), "README.md", "exec"), names)
    return sorted(path.name for path in Path(folder, "out/readme").iterdir())


def run_custom_attention() -> tuple[torch.Tensor, torch.Tensor]:
    """The user's module, in one process and on these ranks, with the same weights."""
    names: dict[str, type[nn.Module]] = {"__name__": "readme"}  # type: ignore[dict-item]
    exec(compile(block("class MyAttention"), "README.md", "exec"), names)
    my_attention = names["MyAttention"]
    torch.manual_seed(0)
    one = my_attention(24, 3)
    torch.manual_seed(0)
    with tp.tensor_parallelism():
        many = my_attention(24, 3)
    tp.unregister(my_attention)
    assert many.num_heads == (2, 1)[tp.tp_rank()]
    x = torch.randn(2, 5, 24)
    return one(x).detach(), many(x).detach()


def run_smdistributed_script() -> bool:
    """The migration example: its translated dict is that of the model in one process."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2, n_embd=12, n_head=3, vocab_size=31, bos_token_id=0, eos_token_id=0
    )
    names = {"GPT2LMHeadModel": GPT2LMHeadModel, "config": config}
    torch.manual_seed(0)
    exec(compile(block("import tensorpar as smp"), "README.md", "exec"), names)
    torch.manual_seed(0)
    expected = GPT2LMHeadModel(config).state_dict()
    translated = names["hf"]
    return translated.keys() == expected.keys() and all(
        torch.equal(translated[name], expected[name]) for name in expected
    )


def test_training_example(ranks, tmp_path):
    """The first example trains, generates and leaves an ordinary Hugging Face folder."""
    files, _ = ranks(2, init=False).run(run_training_script, str(tmp_path))
    assert files == ["config.json", "generation_config.json", "model.safetensors"]


def test_custom_module_example(ranks):
    """The user's own attention computes the same on two ranks, with three heads."""
    for one, many in ranks(2).run(run_custom_attention):
        torch.testing.assert_close(many, one)


def test_smdistributed_example(ranks):
    """A script of smdistributed runs, and its dict translates to Hugging Face's bit for bit."""
    assert all(ranks(2, init=False).run(run_smdistributed_script))


def test_commands_are_understood():
    """Every command line that begins with `tensorpar` has arguments that its parser knows."""
    whole, commands = translating.parser("")
    planning.add(commands, num_bytes)
    shell = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in shell.splitlines()]
    known = [whole.parse_args(words[1:]) for words in lines if words[:1] == ["tensorpar"]]
    (plan,) = (read for read in known if "sequence" in read)
    assert (plan.tp, plan.dp, plan.dtype, str(plan.chart)) == (4, 2, "bfloat16", "plan.png")
    assert num_bytes(plan.memory) > 0
    assert len(known) == 6


def test_commands_for_checkpoints(tmp_path, monkeypatch, capsys):
    """Each line as it stands: GPT-J to four ranks and back, smdistributed's files to a model."""
    config = FAMILIES[0].config(heads=4, inner=84)
    hf = FAMILIES[0].state_dict(config)
    saved_model("gptj", tmp_path / "gpt-j")
    save_partial(tmp_path / "checkpoint", hf_to_smdistributed(hf, config))
    config.to_json_file(tmp_path / "config.json")
    monkeypatch.chdir(tmp_path)
    (script,) = entry_points(group="console_scripts", name="tensorpar")
    (commands,) = re.findall(r"```sh\n(tensorpar translate.*?)```", README, re.DOTALL)
    for line in commands.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert (program, script.load()(arguments)) == ("tensorpar", 0), line
    assert "degree 4" in capsys.readouterr().out
    assert len(list(Path("gpt-j-tp4").glob("tensorpar-*-of-00004.safetensors"))) == 4
    for file in Path("gpt-j").iterdir():
        assert (Path("gpt-j-again") / file.name).read_bytes() == file.read_bytes()
    assert same(transformers.GPT2LMHeadModel.from_pretrained("out").state_dict(), hf)
