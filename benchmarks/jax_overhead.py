"""What emitted JAX programs cost beside `jit` with `NamedSharding`, written by hand.

    python benchmarks/jax_overhead.py [--rounds N] [--layout LAYOUT ...]
    python benchmarks/jax_overhead.py --depths 1 126 [--layout LAYOUT]

A small Llama on 8 devices of this host's CPU. For every layout one process plans and emits the
program, builds the same step by hand, where XLA's partitioner (GSPMD) finds the collectives from
the shardings of parameters, state and activations (the planned ones, at every product), gives both
the same parameters and rows, and runs them in turn. The losses of both must agree at every step.
The table has the median seconds of a step; the ratio (emitted over by hand) of the medians, with
the middle half of the single rounds' ratios; the same ratio of processor seconds, which other work
on the machine disturbs less; and the seconds of compiling.

With `--depths` only the emitted step is traced and compiled, of models of so many layers, each in a
process of its own; nothing runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

DEVICES = 8
VOCABULARY, HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 4096, 256, 8, 4, 704, 4
BATCH, SEQ_LEN = 16, 128
LAYOUTS = (
    "tp=2,dp=4,zero=0",
    "tp=2,dp=4,zero=1",
    "tp=2,dp=4,zero=3",
    "tp=4,dp=2,zero=1",
    "tp=1,dp=8,zero=1",
)
RATE, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
COLUMNS, ROWS = ("wq", "wk", "wv", "w1", "w3"), ("wo", "w2")


# --- the model -----------------------------------------------------------------------------------


def rms_norm(x: Any, weight: Any) -> Any:
    import jax

    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def rope(x: Any) -> Any:
    """x: [b, s, n, d], halves turned."""
    import jax.numpy as jnp

    frequencies = 1e4 ** (-jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = jnp.arange(x.shape[1])[:, None] * frequencies
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def anywhere(x: Any, *axes: str | None) -> Any:
    """Nothing said of how an array lies."""
    return x


def layer(p: Any, x: Any, lie: Any = anywhere) -> Any:
    """`lie` says how arrays lie, where someone has to: Megatron's layers with sequence parallel."""
    import jax

    b, s, h = x.shape
    size = h // HEADS
    normed = lie(rms_norm(x, p["attn_norm"]), "dp", None, None)
    q, k, v = (lie(normed @ p[name], "dp", None, "tp") for name in ("wq", "wk", "wv"))
    q, k = (rope(each.reshape(b, s, n, size)) for each, n in ((q, HEADS), (k, KV_HEADS)))
    v = v.reshape(b, s, KV_HEADS, size)
    q, k, v = (lie(each, "dp", None, "tp", None) for each in (q, k, v))
    heads = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, s, h)
    x = x + lie(lie(heads, "dp", None, "tp") @ p["wo"], "dp", "tp", None)
    normed = lie(rms_norm(x, p["ffn_norm"]), "dp", None, None)
    gate, up = (lie(normed @ p[name], "dp", None, "tp") for name in ("w1", "w3"))
    return x + lie((jax.nn.silu(gate) * up) @ p["w2"], "dp", "tp", None)


def head(params: Any, x: Any, labels: Any, lie: Any = anywhere) -> Any:
    import jax
    import jax.numpy as jnp

    normed = lie(rms_norm(x, params["norm"]), "dp", None, None)
    logits = lie(normed @ params["head"], "dp", None, "tp")
    normal = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(normal, labels[..., None], axis=-1).mean()


def traced_loss(params: Any, tokens: Any, labels: Any) -> Any:
    """What Shardwright is given."""
    x = params["embed"][tokens]
    for p in params["layers"]:
        x = layer(p, x)
    return head(params, x, labels)


def shapes() -> dict[str, tuple[int, ...]]:
    """Parameters of a layer."""
    key = HIDDEN // HEADS * KV_HEADS
    return {
        "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "wq": (HIDDEN, HIDDEN),
        "wk": (HIDDEN, key), "wv": (HIDDEN, key), "wo": (HIDDEN, HIDDEN),
        "w1": (HIDDEN, FFN), "w3": (HIDDEN, FFN), "w2": (FFN, HIDDEN),
    }  # fmt: skip


# --- by hand -------------------------------------------------------------------------------------


def spec(name: str, zero: bool) -> Any:
    """How a parameter lies; `zero`: as ZeRO splits it along dp. Layers are stacked."""
    from jax.sharding import PartitionSpec

    dp = "dp" if zero else None
    if name in COLUMNS:
        return PartitionSpec(None, dp, "tp")
    if name in ROWS:
        return PartitionSpec(None, "tp", dp)
    if name in ("embed", "head"):
        return PartitionSpec(dp, "tp")
    return PartitionSpec(dp) if name == "norm" else PartitionSpec(None, dp)


def by_hand(layout: dict[str, int], whole: dict[str, np.ndarray]) -> tuple[Any, Any, Any]:
    """The step, the parameters and the state: `jit` over arrays with a `NamedSharding`."""
    import jax
    import optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((layout["dp"], layout["tp"]), ("dp", "tp"), (AxisType.Auto,) * 2)
    lies = partial(NamedSharding, mesh)
    values: Any = {name: whole[name] for name in ("embed", "norm", "head")}
    values["layers"] = {
        name: np.stack([whole[f"layers.{i}.{name}"] for i in range(LAYERS)]) for name in shapes()
    }

    def specs(zero: bool) -> Any:
        return jax.tree.map_with_path(lambda path, _: lies(spec(path[-1].key, zero)), values)

    stored, split = specs(layout["zero"] == 3), specs(layout["zero"] > 0)

    def lie(x: Any, *axes: str | None) -> Any:
        return jax.lax.with_sharding_constraint(x, lies(PartitionSpec(*axes)))

    def loss(params: Any, tokens: Any, labels: Any) -> Any:
        def body(x: Any, p: Any) -> tuple[Any, None]:
            return layer(p, x, lie), None

        x = lie(params["embed"][tokens], "dp", "tp", None)
        x, _ = jax.lax.scan(body, x, params["layers"])
        return head(params, x, labels, lie)

    decays = jax.tree.map_with_path(lambda path, _: "norm" not in path[-1].key, values)
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.adamw(RATE, *BETAS, weight_decay=WEIGHT_DECAY, mask=decays),
    )

    def step(params: Any, state: Any, tokens: Any, labels: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, tokens, labels)
        gradients = jax.lax.with_sharding_constraint(gradients, split)
        own = jax.lax.with_sharding_constraint(params, split)
        updates, state = optimizer.update(gradients, state, own)
        return optax.apply_updates(own, updates), state, value

    params = jax.device_put(values, stored)
    one = lies(PartitionSpec())
    state_lies = optax.tree.map_params(
        optimizer, lambda _, at: at, jax.eval_shape(optimizer.init, params), split,
        transform_non_params=lambda _: one,
    )  # fmt: skip
    state = jax.jit(optimizer.init, out_shardings=state_lies)(params)
    compiled = jax.jit(step, out_shardings=(stored, state_lies, one), donate_argnums=(0, 1))
    return compiled, params, state


# --- one layout ----------------------------------------------------------------------------------


def emitted_modules(layout: str, layers: int) -> tuple[Any, Any, Any]:
    """Plans and emits a model of so many layers: its modules `initial`, `parallel` and `step`."""
    import jax
    import jax.numpy as jnp

    import shardwright as sw

    size = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = {
        "embed": size((VOCABULARY, HIDDEN)), "norm": size((HIDDEN,)),
        "head": size((HIDDEN, VOCABULARY)),
        "layers": [{n: size(shape) for n, shape in shapes().items()} for _ in range(layers)],
    }  # fmt: skip
    tokens = jax.ShapeDtypeStruct((2, SEQ_LEN), jnp.int32)
    plan = sw.plan(
        traced_loss, f"local:1x{DEVICES}",
        sw.Workload(global_batch=BATCH, seq_len=SEQ_LEN, precision="fp32"),
        fix=f"{layout},pp=1,recompute=none,micro_batch={BATCH // degrees_of(layout)['dp']}",
        params=params, example_inputs=(tokens, tokens),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        plan.emit("jax", folder)
        sys.path.insert(0, folder)
        import initial
        import parallel
        import step
    return initial, parallel, step


def degrees_of(layout: str) -> dict[str, int]:
    return {key: int(n) for key, n in (part.split("=") for part in layout.split(","))}


def compile_only(layout: str, layers: int) -> dict[str, float]:
    """Seconds of tracing and of compiling the step, by the clock and of the processor."""
    import jax

    _, parallel, step = emitted_modules(layout, layers)
    adam = step.Adam(lambda _: RATE, BETAS, WEIGHT_DECAY, CLIP)
    params = {key: parallel.shape_of(key) for key in parallel.arrays()}
    batch = {
        name: jax.ShapeDtypeStruct((BATCH, SEQ_LEN), "int32", sharding=parallel.sharding(lies))
        for name, lies in parallel.batch_specs().items()
    }
    found = {}
    began, busy = time.perf_counter(), time.process_time()
    lowered = step.train_step(adam).lower(params, step.state_shapes(adam), batch, None)
    found["tracing"], found["tracing, processor"] = _since(began, busy)
    began, busy = time.perf_counter(), time.process_time()
    lowered.compile()
    found["compiling"], found["compiling, processor"] = _since(began, busy)
    return found


def _since(began: float, busy: float) -> tuple[float, float]:
    return time.perf_counter() - began, time.process_time() - busy


def measure(layout: str, rounds: int) -> dict[str, Any]:
    """Runs both in turn; what the table needs."""
    import jax

    degrees = degrees_of(layout)
    initial, parallel, step = emitted_modules(layout, LAYERS)
    adam = step.Adam(lambda _: RATE, BETAS, WEIGHT_DECAY, CLIP)
    emitted = initial.initialise(0)
    hand, mine, mine_state = by_hand(degrees, parallel.by_name(emitted))
    state = step.create_state(adam, emitted)
    draw = np.random.default_rng(0)
    rows = [draw.integers(VOCABULARY, size=(BATCH, SEQ_LEN), dtype=np.int32) for _ in range(2)]
    lies = parallel.batch_specs()
    batch = {
        name: jax.device_put(given, parallel.sharding(lies[name]))
        for name, given in zip(("tokens", "labels"), rows, strict=True)
    }
    seconds: dict[str, list[float]] = {"emitted": [], "by hand": []}
    processor: dict[str, list[float]] = {"emitted": [], "by hand": []}
    began = time.perf_counter()
    ours = step.train_step(adam).lower(emitted, state, batch, None).compile()
    compiling = {"emitted": time.perf_counter() - began}
    began = time.perf_counter()
    theirs = hand.lower(mine, mine_state, batch["tokens"], batch["labels"]).compile()
    compiling["by hand"] = time.perf_counter() - began
    apart = 0.0
    for number in range(rounds + 2):
        losses = {}
        for name in ("emitted", "by hand") if number % 2 else ("by hand", "emitted"):
            began, busy = time.perf_counter(), time.process_time()
            if name == "emitted":
                emitted, state, losses[name], _ = ours(emitted, state, batch, None)
                jax.block_until_ready((emitted, state))
            else:
                mine, mine_state, losses[name] = theirs(mine, mine_state, *batch.values())
                jax.block_until_ready((mine, mine_state))
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
                processor[name].append(time.process_time() - busy)
        one, other = float(losses["emitted"]), float(losses["by hand"])
        apart = max(apart, abs(one - other) / other)
    assert apart < 1e-4, f"{layout}: losses differ by {apart:.1e}"
    hlo = {"emitted": ours.as_text(), "by hand": theirs.as_text()}
    if folder := os.environ.get("HLO_FOLDER"):
        for name, text in hlo.items():
            Path(folder, f"{layout}-{name}.txt".replace(" ", "-")).write_text(text)
    return {"seconds": seconds, "processor": processor, "compiling": compiling, "apart": apart}


def depths_table(layout: str, depths: list[int]) -> Table:
    """What the depth of a model does to tracing and compiling."""
    table = Table(title=f"The emitted step of {layout} by depth, {DEVICES} CPU devices")
    table.add_column("layers")
    ratios: dict[str, float] = {}
    for layers in depths:
        found = _worker(layout, "--depths", str(layers))
        for name, seconds in found.items():
            if layers == depths[0]:
                table.add_column(f"{name} s")
                ratios[name] = seconds
        cells = (f"{s:.2f} ({s / ratios[name]:.2f})" for name, s in found.items())
        table.add_row(str(layers), *cells)
    return table


def _worker(layout: str, *arguments: str) -> Any:
    """What a process of its own finds."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
    }
    command = [sys.executable, __file__, "--worker", layout, *arguments]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def layouts_table(layouts: list[str], rounds: int) -> Table:
    """Both versions of every layout."""
    table = Table(title=f"A Llama of {LAYERS} layers, {DEVICES} CPU devices")
    for column in ("layout", "emitted s", "by hand s", "ratio", "single rounds", "processor",
                   "compiling: emitted s", "by hand s"):  # fmt: skip
        table.add_column(column)
    for layout in layouts:
        found = _worker(layout, "--rounds", str(rounds))
        emitted, hand = (np.array(found["seconds"][name]) for name in ("emitted", "by hand"))
        busy = [found["processor"][name] for name in ("emitted", "by hand")]
        low, high = np.quantile(emitted / hand, (0.25, 0.75))
        ratio = np.median(emitted) / np.median(hand)
        print(f"{layout}: {ratio:.3f}, processor {np.median(busy[0]) / np.median(busy[1]):.3f}",
              file=sys.stderr, flush=True)  # fmt: skip
        table.add_row(
            layout, f"{np.median(emitted):.3f}", f"{np.median(hand):.3f}",
            f"{ratio:.3f}", f"{low:.3f}-{high:.3f}",
            f"{np.median(busy[0]) / np.median(busy[1]):.3f}",
            *(f"{found['compiling'][name]:.1f}" for name in ("emitted", "by hand")),
        )  # fmt: skip
    return table


def main() -> None:
    """One process for each layout or depth, one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--layout", nargs="*", default=LAYOUTS)
    parser.add_argument("--depths", nargs="*", type=int, help="layers of models, to compile only")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker and args.depths:
        print(json.dumps(compile_only(args.worker, args.depths[0])))
    elif args.worker:
        print(json.dumps(measure(args.worker, args.rounds)))
    elif args.depths:
        for layout in args.layout if args.layout != LAYOUTS else LAYOUTS[1:2]:
            Console(width=110).print(depths_table(layout, args.depths))
    else:
        Console(width=110).print(layouts_table(args.layout, args.rounds))


if __name__ == "__main__":
    main()
