"""The command `plan`: its arguments, and what they print. What is printed: plan.py, predict.py and sweep.py."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tpffn_triton import plan_comparison, plan_report, predict, sweep
from tpffn_triton.cost_model import LIBRARY_ALGORITHMS
from tpffn_triton.kernels.activations import ACTIVATIONS
from tpffn_triton.machines import ALGORITHMS, Machine
from tpffn_triton.partitionings import PARTITIONINGS
from tpffn_triton.plan import DTYPE_BYTES, plan_ffn
from tpffn_triton.plan_records import FFNPlan
from tpffn_triton.predict import Prediction
from tpffn_triton.presets import GPU_CHOICES, LINKS, machine
from tpffn_triton.validation import SAVE_MODES

EXAMPLES = """\
examples:
  python -m tpffn_triton plan --batch 8 --seq 128 --hidden 1024 --ffn 4096 --tp 4
  python -m tpffn_triton plan --batch 1 --seq 4096 --hidden 8192 --ffn 28672 --tp 8 --activation swiglu --no-bias
  python -m tpffn_triton plan --batch 8 --seq 128 --hidden 1024 --ffn 4096 --tp 4 --save nothing --json
  python -m tpffn_triton plan --batch 8 --seq 128 --hidden 1024 --ffn 4096 --tp 4 --partition all --explain
  python -m tpffn_triton plan --batch 8 --seq 128 --hidden 1024 --ffn 4096 --tp 4 --sequence-parallel --link nvlink4
  python -m tpffn_triton plan --batch 2 --seq 2048 --hidden 4096 --ffn 16384 --dtype bf16 \\
      --sweep tp=1,2,4,8,16 --link nvlink4 --nodes 2 --plot sweep.png
  python bench/comm_bench.py --tp 2,4 --json here.json && \\
      python -m tpffn_triton plan --batch 8 --seq 128 --hidden 1024 --ffn 4096 --tp 4 --machine here.json
"""
DESCRIPTION = """\
Print shapes, FLOPs, bytes and communication of one FFN layer split over --tp ranks
(Linear1 column-parallel, Linear2 row-parallel; with --partition other ways to split it). With
--link or --machine also the time that a cost model predicts, with --sweep for several P.
Nothing runs, so no GPU is needed.
"""


def add_arguments(plan: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    plan.add_argument("--batch", type=int, required=True, metavar="B", help="batch size")
    plan.add_argument("--seq", type=int, required=True, metavar="S", help="sequence length")
    plan.add_argument("--hidden", type=int, required=True, metavar="H", help="hidden_size of the model")
    plan.add_argument("--ffn", type=int, required=True, metavar="F", help="ffn_hidden_size")
    ranks = plan.add_mutually_exclusive_group(required=True)
    ranks.add_argument("--tp", type=int, metavar="P", help="ranks of the tensor-parallel group")
    ranks.add_argument("--sweep", metavar="tp=P,...", help="predict several P instead; needs --link or --machine")
    plan.add_argument("--dtype", choices=[*DTYPE_BYTES], default="fp32", help="of every tensor (default: %(default)s)")
    plan.add_argument(
        "--activation",
        choices=ACTIVATIONS,
        default="gelu",
        help="default: %(default)s; gelu and geglu are the erf forms; with a gated one w1 has 2F rows",
    )
    plan.add_argument("--no-bias", dest="bias", action="store_false", help="plan without b1 and b2")
    plan.add_argument(
        "--save",
        choices=SAVE_MODES,
        default="pre_act",
        help="what backward keeps beside x; nothing: linear1 is computed again (default: %(default)s)",
    )
    plan.add_argument(
        "--sequence-parallel",
        action="store_true",
        help="x, y, dy and dx are slices of dim 0 of [S, B, H]; S divisible by P",
    )
    plan.add_argument(
        "--partition",
        metavar="NAME,...",
        help=f"of {', '.join(PARTITIONINGS)}; or all: side by side, in JSON an object each, by name; with "
        "--sequence-parallel also column_row_sequence_parallel",
    )
    plan.add_argument(
        "--explain", action="store_true", help="say why there is a collective, or none, at each point; JSON always does"
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    cost = plan.add_argument_group("predicted time (docs/cost_model.md)")
    where = cost.add_mutually_exclusive_group()
    where.add_argument("--link", metavar="NAME", help=f"a preset: {', '.join(LINKS)}")
    where.add_argument("--machine", type=Path, metavar="FILE", help="measured by bench/comm_bench.py --json FILE")
    cost.add_argument("--gpu", choices=GPU_CHOICES, help="default: the one that usually has the link")
    cost.add_argument("--nodes", type=int, metavar="N", help="default: 1; InfiniBand between them")
    cost.add_argument("--ranks-per-node", type=int, metavar="N", help="default: the machine's, 8 with NVLink")
    cost.add_argument(
        "--algorithm",
        choices=[*dict.fromkeys(name for names in ALGORITHMS.values() for name in names), "all"],
        action="append",
        help="collectives by this; may be repeated (default: ring and tree, which a process group has)",
    )
    cost.add_argument(
        "--forward-chunks",
        default="1",
        metavar="N",
        help="row chunks of Linear2 at most, each all-reduced behind the next; auto: as the model chooses (default: 1)",
    )
    cost.add_argument("--plot", type=Path, metavar="FILE", help="with --sweep: draw it (.png, .pdf or .svg)")


def run(args: argparse.Namespace) -> str:
    """Return what to print. Raises: ValueError: arguments that do not fit."""
    options = {name: getattr(args, name) for name in ("dtype", "activation", "bias", "save", "sequence_parallel")}
    sizes = (args.batch, args.seq, args.hidden, args.ffn)
    chunks = _chunks(args.forward_chunks)
    where = _machine(args, chunks)
    given = tuple(args.algorithm or LIBRARY_ALGORITHMS)
    algorithms = None if "all" in given else given
    nodes = 1 if args.nodes is None else args.nodes
    if args.sweep is None:
        if args.partition is None:
            plans = {"": plan_ffn(*sizes, args.tp, **options)}
        else:
            plans = plan_comparison.plan_partitionings(args.partition, (*sizes, args.tp), **options)
        predictions = {
            name: predict.predict(plan, where, nodes=nodes, chunks=chunks, algorithms=algorithms)
            for name, plan in plans.items()
            if where is not None
        }
        if args.json:
            return _json(plans, predictions, where)
        return _text(plans, predictions, where, args.explain)
    if args.partition is not None or args.explain:
        raise ValueError("--sweep predicts column_row: it cannot go with --partition or --explain")
    assert where is not None  # --sweep needs it
    world_sizes = sweep.parse_sweep(args.sweep)
    rows = sweep.sweep(sizes, world_sizes, where, nodes=nodes, chunks=chunks, algorithms=algorithms, **options)
    names = dict(zip(("batch", "seq", "hidden", "ffn"), sizes, strict=True))
    sequence = ", sequence-parallel" if args.sequence_parallel else ""
    title = f"B={args.batch} S={args.seq} H={args.hidden} F={args.ffn}, {args.activation}, {args.dtype}{sequence}"
    if args.plot is not None:
        sweep.plot(rows, where, title, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)
    if args.json:
        inputs = {**names, **options, "nodes": nodes, "algorithms": algorithms, "forward_chunks": args.forward_chunks}
        return json.dumps(sweep.to_dict(rows, where, inputs), indent=2)
    return sweep.render_text(rows, where, title)


def _json(plans: dict[str, FFNPlan], predictions: dict[str, Prediction], where: Machine | None) -> str:
    objects = {name: plan.to_dict() for name, plan in plans.items()}
    for name, prediction in predictions.items():
        assert where is not None
        objects[name] |= {"predicted": prediction.to_dict(), **where.to_dict()}
    return json.dumps(objects.get("", objects), indent=2)


def _text(plans: dict[str, FFNPlan], predictions: dict[str, Prediction], where: Machine | None, explain: bool) -> str:
    if len(plans) > 1:
        parts = [plan_comparison.render_text(plans, predictions)]
    else:
        (plan,) = plans.values()
        parts = [plan_report.render_text(plan)]
        for prediction in predictions.values():
            assert where is not None
            parts.append(predict.render_text(prediction, plan, where))
    if explain:
        parts += [plan_comparison.explain(plan, name) for name, plan in plans.items()]
    return "\n\n".join(parts)


def _chunks(given: str) -> int | None:
    if given == "auto":
        return None
    if not given.isascii() or not given.isdigit() or int(given) < 1:
        raise ValueError(f"--forward-chunks must be auto or at least 1, got {given!r}")
    return int(given)


def _machine(args: argparse.Namespace, chunks: int | None) -> Machine | None:
    """Return the machine to predict for, None where nothing is to be predicted."""
    if args.link is None and args.machine is None:
        given: dict[str, Any] = {
            "--sweep": args.sweep,
            "--plot": args.plot,
            "--gpu": args.gpu,
            "--nodes": args.nodes,
            "--ranks-per-node": args.ranks_per_node,
            "--algorithm": args.algorithm,
            "--forward-chunks": None if chunks == 1 else args.forward_chunks,
        }
        if needing := [flag for flag, value in given.items() if value is not None]:
            raise ValueError(f"{needing[0]} needs --link or --machine")
        return None
    if args.nodes is not None and args.nodes < 1:
        raise ValueError(f"--nodes must be at least 1, got {args.nodes}")
    if args.plot is not None:
        _check_plot(args)
    if args.link is not None:
        return machine(args.link, args.gpu, args.ranks_per_node)
    if args.gpu is not None:
        raise ValueError(f"--machine says what computes: it cannot go with --gpu {args.gpu}")
    loaded = Machine.load(args.machine)
    return loaded if args.ranks_per_node is None else replace(loaded, ranks_per_node=args.ranks_per_node)


def _check_plot(args: argparse.Namespace) -> None:
    if args.sweep is None:
        raise ValueError("--plot needs --sweep")
    if args.plot.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot writes .png, .pdf or .svg, got {args.plot}")
    if not args.plot.parent.is_dir() or args.plot.is_dir() or not os.access(args.plot.parent, os.W_OK):
        raise ValueError(f"cannot write {args.plot}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib is needed for --plot: pip install 'tpffn-triton[bench]'")
