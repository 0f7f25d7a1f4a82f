"""The benchmarks of training, for bench.py: the step, the loss's memory."""

import resource
import statistics
import time

import measure


def train(args) -> dict:
    """Whole train steps (both towers, loss, gradients, AdamW) on each side, taking turns."""
    import jax

    from medsiglip_jax.model import config

    if args.gpu and jax.default_backend() != "gpu":
        raise SystemExit("--gpu: jax sees no GPU")
    architecture = config.named(args.size)
    rows = []
    for batch in args.batch:
        calls = {"ours": _our_step(architecture, batch, args)}
        if not args.without_torch:
            calls["torch"] = _torch_step(architecture, batch, args)
        times = measure.interleaved(calls, args.repeats)
        # Forward, and as much again for gradients of activations and of weights.
        passes = 3 if args.lora is None else 2
        flops = passes * batch * (image_flops(architecture.vision) + text_flops(architecture.text))
        row: dict = {"batch": batch}
        for side, seconds in times.items():
            row[f"{side}_images_per_second"] = measure.summary([batch / s for s in seconds])
        rate = flops / statistics.median(times["ours"])
        row["teraflops_per_second"] = round(rate / 1e12, 3)
        if peak := _peak_flops():
            row["share_of_bf16_peak"] = round(rate / peak, 4)
        if "torch" in times:
            row |= measure.ratios(times)
        measure.progress(f"batch {batch}: {row}")
        rows.append(row)
    return {
        "dtype": args.dtype, "attention": args.attention, "remat": args.remat,
        "lora": args.lora, "unit": "images/s of whole train steps; FLOPs counted are 3 x the "
        "forward pass, with LoRA 2 x",
        "rows": rows,
    }  # fmt: skip


def image_flops(vision) -> float:
    """FLOPs of the matrix products of one forward pass for one image, two per multiply-add."""
    n, d = vision.num_tokens, vision.width
    blocks = vision.depth * _block_flops(n, d, vision.mlp_dim)
    head = 2 * (2 * n * d * d + 2 * d * d + 2 * n * d + 2 * d * vision.mlp_dim)
    return blocks + head + 2 * n * d * 3 * vision.patch_size**2


def text_flops(text) -> float:
    n, d = text.context_length, text.width
    return text.depth * _block_flops(n, d, text.mlp_dim) + 2 * d * text.embed_dim


def _block_flops(n: int, d: int, mlp_dim: int) -> float:
    return 2 * (4 * n * d * d + 2 * n * n * d + 2 * n * d * mlp_dim)


def _peak_flops() -> float | None:
    """Dense bf16 FLOP/s by the vendor's data sheet."""
    import jax

    from medsiglip_jax.plan import gpus

    kind = jax.devices()[0].device_kind
    return next((c.flops.bfloat16 for c in gpus.bundled().values() if c.name == kind), None)


def _batch(architecture, batch: int):
    import numpy as np

    rng, size, text = np.random.default_rng(0), architecture.image_size, architecture.text
    return {
        "image": rng.integers(0, 256, (batch, size, size, 3), np.uint8),
        "text": rng.integers(2, text.vocab_size, (batch, text.context_length), np.int32),
        "mask": np.ones(batch, bool),
    }


def _compute(architecture, dtype: str, args):
    """As `finetune` computes."""
    from medsiglip_jax.train import build
    from medsiglip_jax.train.recipe import Data, Recipe

    recipe = Recipe(
        data=(Data(path="unread"),), total_steps=1, model=args.size, dtype=dtype,
        attention=args.attention, remat=args.remat,
    )  # fmt: skip
    return build.compute_of(recipe, architecture, None)


def _our_step(architecture, batch: int, args):
    import jax

    from medsiglip_jax.model.weights import random
    from medsiglip_jax.train import freeze, lora, optim, step
    from medsiglip_jax.train.objectives.contrastive import Contrastive
    from medsiglip_jax.train.objectives.objective import Labels

    compute = _compute(architecture, args.dtype, args)
    schedule = optim.schedule("constant", 1_000_000)
    optimizer = optim.make_optimizer(1e-5, schedule, optim.OptimizerConfig())
    update = step.make_train_step(Contrastive().loss(architecture, compute, Labels()), optimizer)
    params, frozen = jax.device_put(random.init_params(architecture, seed=0)), {}
    if args.lora is not None:
        adapters = lora.LoRA(rank=args.lora)
        params = freeze.join(params, lora.init(adapters, params))
        params, frozen = freeze.partition(adapters.frozen(params), params).split(params)
    state = [step.init_state(params, optimizer, frozen)]
    rows = jax.device_put(_batch(architecture, batch))

    def call():
        state[0], metrics = update(state[0], rows)
        float(metrics["loss"])

    return call


def _torch_step(architecture, batch: int, args):
    """The same step of transformers.SiglipModel; compiled and in bfloat16 autocast on a GPU."""
    import torch
    from transformers import SiglipConfig, SiglipModel

    torch.set_num_threads(measure.cores())
    vision, text = architecture.vision, architecture.text
    shared = dict(hidden_act="gelu_pytorch_tanh", attn_implementation="sdpa")
    model = SiglipModel(
        SiglipConfig(
            vision_config=_hf(vision, image_size=vision.image_size, patch_size=vision.patch_size),
            text_config=_hf(
                text, vocab_size=text.vocab_size, max_position_embeddings=text.context_length,
                projection_size=text.embed_dim, bos_token_id=None, eos_token_id=1,
            ),
            **shared,
        )
    )  # fmt: skip
    device = "cuda" if args.gpu else "cpu"
    if args.lora is not None:
        _add_adapters(model, args.lora)
    model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), fused=args.gpu)
    rows = _batch(architecture, batch)
    pixels = torch.tensor(rows["image"]).to(device)
    tokens = torch.tensor(rows["text"]).long().to(device)
    forward = torch.compile(model) if args.gpu else model
    half = args.dtype == "bfloat16"

    def call():
        values = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = forward(pixel_values=values, input_ids=tokens, return_loss=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return call


def _add_adapters(model, rank: int) -> None:
    """Freezes a torch model but for adapters beside the linear layers of its blocks."""
    import torch

    class Adapted(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear
            self.a = torch.nn.Linear(linear.in_features, rank, bias=False)
            self.b = torch.nn.Linear(rank, linear.out_features, bias=False)
            torch.nn.init.zeros_(self.b.weight)

        def forward(self, x):
            return self.linear(x) + self.b(self.a(x))

    model.requires_grad_(False)
    model.logit_scale.requires_grad_(True)
    model.logit_bias.requires_grad_(True)
    for tower in (model.vision_model, model.text_model):
        for module in list(tower.encoder.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(module, name, Adapted(child))


def _hf(tower, **more) -> dict:
    return {
        "hidden_size": tower.width, "intermediate_size": tower.mlp_dim,
        "num_hidden_layers": tower.depth, "num_attention_heads": tower.num_heads, **more,
    }  # fmt: skip


# ---------------------------------------------------------------------------- one full-size step


def step(args) -> dict:
    """One step of the full-size model with frozen parts: its memory and seconds."""
    import jax

    from medsiglip_jax.model import config, tree
    from medsiglip_jax.model.weights import random
    from medsiglip_jax.train import freeze, lora, optim
    from medsiglip_jax.train import step as train_step
    from medsiglip_jax.train.objectives.contrastive import Contrastive
    from medsiglip_jax.train.objectives.objective import Labels

    architecture = config.named(args.size)
    params = jax.device_put(random.init_params(architecture, seed=0))
    patterns = ("img/.*",)
    if args.what == "lora":
        adapters = lora.LoRA(rank=args.rank)
        params = freeze.join(params, lora.init(adapters, params))
        patterns = adapters.frozen(params)
    trainable, frozen = freeze.partition(patterns, params).split(params)
    schedule = optim.schedule("constant", 1000)
    optimizer = optim.make_optimizer(1e-5, schedule, optim.OptimizerConfig())
    compute = _compute(architecture, "float32", args)
    update = train_step.make_train_step(
        Contrastive().loss(architecture, compute, Labels()), optimizer
    )
    state = train_step.init_state(trainable, optimizer, frozen)
    del params, trainable, frozen
    rows, seconds = _batch(architecture, args.batch), []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        state, metrics = update(state, rows)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - start)
    row = {
        "what": args.what,
        "batch": args.batch,
        "trained_parameters": tree.size(state["params"]),
        "frozen_parameters": tree.size(state["frozen"]),
        "loss": loss,
        "grad_norm": float(metrics["grad_norm"]),
        "first_step_seconds": round(seconds[0], 2),
        "step_seconds": measure.summary(seconds[1:]),
        "peak_resident_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }
    return {"remat": args.remat, "unit": "seconds; peak of the whole process", "rows": [row]}


# ------------------------------------------------------------------------------- the loss alone


def loss(args) -> dict:
    """Memory of the pairwise loss and its gradients as compiled, without running them."""
    import jax
    import jax.numpy as jnp

    from medsiglip_jax.losses import sigmoid_loss

    z = jax.ShapeDtypeStruct((args.rows, args.dim), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    rows = []
    for chunk in (args.chunk, None):

        def value(zimg, ztxt, t, b, chunk=chunk):
            return sigmoid_loss(zimg, ztxt, t, b, chunk_size=chunk)

        gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2, 3)))
        memory = gradients.lower(z, z, t, t).compile().memory_analysis()
        rows.append(
            {
                "loss": f"chunk_size={chunk}",
                "arguments_mb": round(memory.argument_size_in_bytes / 1e6, 1),
                "results_mb": round(memory.output_size_in_bytes / 1e6, 1),
                "temporary_mb": round(memory.temp_size_in_bytes / 1e6, 1),
            }
        )  # fmt: skip
    return {"batch": args.rows, "dim": args.dim, "unit": "MB", "rows": rows}


def add_parsers(commands, common) -> None:
    """The sub-commands; `common` adds the flags that all share."""
    sub = commands.add_parser("train", help="the train step, images/s")
    common(sub, "base-224")
    sub.add_argument("--batch", type=int, nargs="+", default=[8])
    sub.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    sub.add_argument("--remat", default="none", choices=["none", "dots", "block"])
    sub.add_argument("--lora", type=int, metavar="RANK", help="train adapters only")
    sub.add_argument("--gpu", action="store_true", help="on a GPU; torch compiled")
    sub.set_defaults(run=train)

    sub = commands.add_parser("step", help="one step of the full-size model, frozen in parts")
    common(sub, "so400m-448")
    sub.add_argument("what", choices=["frozen_image", "lora"])
    sub.add_argument("--batch", type=int, default=2)
    sub.add_argument("--rank", type=int, default=16)
    sub.add_argument("--remat", default="block", choices=["none", "dots", "block"])
    sub.set_defaults(run=step)

    sub = commands.add_parser("loss", help="memory of the pairwise loss")
    common(sub, "so400m-448")
    sub.add_argument("--rows", type=int, default=32_768)
    sub.add_argument("--dim", type=int, default=1152)
    sub.add_argument("--chunk", type=int, default=1024)
    sub.set_defaults(run=loss)
