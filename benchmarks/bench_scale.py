"""GPT-J-6B and GPT-2 XL at tp 8 to 64 x dp to 1,024, by simulation in one process.

What one rank holds, computes and sends in a training step is derived from the model's own code
(`tensorpar.planning`), and must equal the closed formulas of `tensorpar.planning.formulas`; the
command fails where it does not. dp does not change what tensor parallelism does, so it is varied
at the smallest and the largest tp only, unless `--all` asks for more.

Layers are alike, so each figure is the line through those of two shallow models; they and the
formulas are for the whole depth. The first row of each model is derived at its whole depth too, and
must be the same; `--whole` does so for every row.

    python benchmarks/bench_scale.py
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
import transformers
from contest import record

from tensorpar.planning import formulas
from tensorpar.planning.counting import Sent
from tensorpar.planning.report import readable
from tensorpar.planning.step import Figures, planned
from tensorpar.planning.wanted import Wanted

#: of the two models between which a line is drawn.
DEPTHS = (4, 8)
DEGREES, COPIES = (8, 16, 32, 64), (1, 16, 1024)
NO_DROPOUT = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1, help="rows of one copy")
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", type=int, help="fewer, to see it work")
    parser.add_argument("--whole", action="store_true", help="derive every row at full depth")
    parser.add_argument("--all", action="store_true", help="every dp at every tp")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows: list[dict[str, Any]] = []
    titles = f"{'tp':>4}{'dp':>6}{'parameters':>12}{'activations':>13}{'peak':>11}{'TFLOP':>8}"
    for head, config in models(args.layers).items():
        first = True
        print(f"{head}\n{titles}{'tp all-reduce':>15}{'dp':>11}{'seconds':>9}")
        for tp in DEGREES:
            for dp in COPIES if args.all or tp in (DEGREES[0], DEGREES[-1]) else COPIES[:1]:
                wanted = Wanted(
                    config,
                    head,
                    tp=tp,
                    dp=dp,
                    data_parallel="replicate",
                    batch=args.batch,
                    sequence=args.sequence,
                    dtype=getattr(torch, args.dtype),
                )
                rows.append(row(wanted, whole=args.whole, checked=first))
                first = False
    record(f"scale_{args.dtype}", {"arguments": vars(args), "rows": rows})


def models(layers: int | None) -> dict[str, Any]:
    """By class. The configs are GPT-2 XL's, and Transformers' default, GPT-J-6B's."""
    xl = {"n_embd": 1600, "n_head": 25, "n_layer": layers or 48}
    return {
        "GPT2LMHeadModel": transformers.GPT2Config(**xl, **NO_DROPOUT),
        "GPTJForCausalLM": transformers.GPTJConfig(n_layer=layers or 28, **NO_DROPOUT),
    }


def row(wanted: Wanted, *, whole: bool, checked: bool) -> dict[str, Any]:
    """Simulated, compared with the formulas, printed."""
    start = time.perf_counter()
    plan = planned(wanted) if whole else on_a_line(wanted)
    if checked and plan != planned(wanted):
        raise SystemExit(f"tp {wanted.tp}: the line and the whole depth differ")
    seconds = time.perf_counter() - start
    require_formulas(wanted, plan)
    tensor = sum(sent.num_bytes for kind, sent in plan.sent.items() if "data" not in kind)
    data = plan.sent.get("all-reduce data parallel", Sent()).num_bytes
    print(
        f"{wanted.tp:4}{wanted.dp:6}{readable(plan.parameters):>12}{readable(plan.activations):>13}"
        f"{readable(plan.peak):>11}{plan.flop / 1e12:8.2f}{readable(tensor):>15}"
        f"{readable(data):>11}{seconds:9.1f}",
        flush=True,
    )
    figures = {**vars(plan), "sent": {kind: vars(sent) for kind, sent in plan.sent.items()}}
    return {"head": wanted.head, "tp": wanted.tp, "dp": wanted.dp, **figures}


def on_a_line(wanted: Wanted) -> Figures:
    """The figures at full depth, from those of two shallow models."""
    models = [copy.deepcopy(wanted.config) for _ in DEPTHS]
    for config, depth in zip(models, DEPTHS, strict=True):
        config.n_layer = depth
    low, high = (planned(replace(wanted, config=config)) for config in models)
    steps = (wanted.config.n_layer - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    named = {f.name: (getattr(low, f.name), getattr(high, f.name)) for f in fields(Figures)}
    return Figures(**{name: extended(*pair, steps) for name, pair in named.items()})


def extended(low: Any, high: Any, steps: float) -> Any:
    """A figure, or each of several: the lower, and so many times what the higher has more."""
    if isinstance(low, Mapping):
        return {key: extended(low[key], high[key], steps) for key in low}
    if isinstance(low, Sent):
        pairs = ((getattr(low, f.name), getattr(high, f.name)) for f in fields(Sent))
        return Sent(*(extended(*pair, steps) for pair in pairs))
    return round(low + (high - low) * steps) if isinstance(low, int) else low


def require_formulas(wanted: Wanted, plan: Figures) -> None:
    """Exit unless every figure equals its closed formula."""
    z = formulas.Sizes.of(wanted)
    sent = dict(formulas.sent(z))
    if wanted.dp > 1:
        sent["all-reduce batch check"] += Sent(1, 16)  # of the data-parallel ranks
        layers_and_rest = z.L + 1
        sent["all-reduce data parallel"] = Sent(layers_and_rest, plan.gradients)
    parameters = formulas.num_parameters(z)
    pairs = {
        "parameters": (plan.num_parameters, parameters),
        "gradients": (plan.gradients, parameters * z.e),
        "optimizer": (plan.optimizer, formulas.adamw_bytes(z)),
        "flop": (plan.flop, formulas.flop(z)),
        "sent": (dict(plan.sent), sent),
    }
    if wanted.dtype == torch.float32:
        pairs["activations"] = (plan.activations, formulas.activations(z))
    wrong = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if wrong:
        raise SystemExit(f"tp {wanted.tp}, dp {wanted.dp}: derived and formula differ: {wrong}")


if __name__ == "__main__":
    main()
