"""The image tower: pixels on the device to pooled embeddings, beside transformers on PyTorch."""

import statistics
import time

import measure


def encode(args) -> dict:
    """Times the image tower at each batch size: pixels on the device -> pooled embedding."""
    import jax
    import numpy as np

    from medsiglip_jax.model import config
    from medsiglip_jax.model.weights import random

    architecture = config.named(args.size)
    params = jax.device_put(random.init_params(architecture, seed=0)["img"])
    reference = None if args.without_torch else torch_tower(architecture.vision, args.dtype)
    reference = _compiled(reference) if args.gpu and reference else reference
    size, rows = architecture.image_size, []
    for batch in args.batch:
        images = np.random.default_rng(0).uniform(-1, 1, (batch, size, size, 3)).astype("float32")
        # As the library does: on a CPU its programs take four images, one by one in each block.
        at_once = min(batch, args.at_once or (4 if jax.default_backend() == "cpu" else batch))
        if batch % at_once:
            raise SystemExit(f"--batch {batch} is not a multiple of --at-once {at_once}")
        ours, seconds = _our_call(params, images, architecture, args, at_once, args.attention)
        calls = {"ours": ours}
        for name in args.beside:
            calls[name] = _our_call(params, images, architecture, args, at_once, name)[0]
        if args.products:
            calls["other products"] = _our_call(
                params, images, architecture, args, at_once, args.attention, other_products=True
            )[0]
        if reference is not None:
            calls["torch"] = _torch_call(reference, images, args.dtype)
        times = measure.interleaved(calls, args.repeats)
        row = {"batch": batch, "at_once": at_once, "compile_seconds": round(seconds, 2)}
        for side, seconds_each in times.items():
            row[side] = measure.summary([t / batch * 1e3 for t in seconds_each])
        row["ours_images_per_second"] = round(batch / statistics.median(times["ours"]), 3)
        if reference is not None:
            row |= measure.ratios(times)
        measure.progress(f"batch {batch}: {row}")
        rows.append(row)
    return {
        "dtype": args.dtype,
        "attention": args.attention,
        "precision": args.precision,
        "repeats": args.repeats,
        "unit": "milliseconds per image",
        "rows": rows,
    }


def _our_call(
    params, images, architecture, args, at_once: int, attention: str | None, other_products=False
):
    import dataclasses

    import jax

    from medsiglip_jax.model import api, bits
    from medsiglip_jax.model import towers as model

    compute = api.compute_for(args.dtype, args.precision, attention)
    compute = api.encoding(compute, architecture.vision)
    compute = dataclasses.replace(compute, wide=compute.wide != other_products)
    params = jax.tree.map(lambda x: x.astype(args.dtype), params)
    if jax.default_backend() == "cpu":  # as the library does
        params = bits.of_blocks(params)
    pieces = [jax.device_put(images[i : i + at_once]) for i in range(0, len(images), at_once)]
    start = time.perf_counter()
    call = (
        jax.jit(lambda p, x: model.encode_image({"img": p}, x, architecture, compute)[0])
        .lower(params, pieces[0])
        .compile()
    )
    seconds = time.perf_counter() - start

    def all_images():
        for z in [call(params, piece) for piece in pieces]:
            z.block_until_ready()

    return all_images, seconds


def torch_tower(vision, dtype: str):
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.set_num_threads(measure.cores())
    config = SiglipVisionConfig(
        hidden_size=vision.width,
        intermediate_size=vision.mlp_dim,
        num_hidden_layers=vision.depth,
        num_attention_heads=vision.num_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act="gelu_pytorch_tanh",
        attn_implementation="sdpa",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return SiglipVisionModel(config).eval().to(device, getattr(torch, dtype))


def _compiled(tower):
    import torch

    return torch.compile(tower, dynamic=False)  # one program for each batch size, as ours


def _torch_call(tower, images, dtype: str):
    import torch

    pixels = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    pixels = pixels.to(tower.device, getattr(torch, dtype))

    @torch.inference_mode()
    def call():
        tower(pixel_values=pixels).pooler_output.float().cpu()  # .cpu() waits for a GPU

    return call


def add_parsers(commands, common) -> None:
    """The sub-command; `common` adds the flags that all share."""
    sub = commands.add_parser("encode", help="image encoder throughput")
    common(sub, "so400m-448")
    sub.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    sub.add_argument(
        "--at-once", type=int, help="images per call of our encoder (default: 4 on a CPU)"
    )
    sub.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    sub.add_argument("--beside", nargs="+", default=[], help="more attention back ends of ours")
    sub.add_argument(
        "--products", action="store_true", help="also with what this CPU does not choose: products "
        "of bfloat16 in float32, or in bfloat16"
    )  # fmt: skip
    sub.add_argument("--gpu", action="store_true", help="on a GPU; torch compiled")
    sub.add_argument("--precision", help="our matmul precision (default as the library's)")
    sub.set_defaults(run=encode)
