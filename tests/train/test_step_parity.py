"""One step's loss and gradients against transformers under torch autograd: golden and live."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import references
from safetensors.numpy import load_file

import medsiglip_jax
from medsiglip_jax.model.towers import Compute
from medsiglip_jax.model.weights import huggingface
from medsiglip_jax.train.objectives.contrastive import Contrastive
from medsiglip_jax.train.objectives.objective import Labels

pytestmark = pytest.mark.float

GOLDEN = Path(__file__).parents[1] / "golden" / "siglip-tiny"


def reference_step(model, pixels, tokens):
    """The loss of `SiglipModel(return_loss=True)` and its gradient by tensor name."""
    import torch

    values = torch.from_numpy(pixels.astype(np.float32) / 255 * 2 - 1).permute(0, 3, 1, 2)
    values = values.to(model.dtype)
    loss = model(input_ids=torch.from_numpy(tokens).long(), pixel_values=values, return_loss=True)
    loss.loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return loss.loss.item(), gradients


@partial(jax.jit, static_argnames=("config", "compute", "loss_chunk"))
def step(params, batch, config, compute, loss_chunk):
    loss = Contrastive().loss(config, compute, Labels(), loss_chunk)
    return jax.value_and_grad(loss)(params, batch)


def our_step(model, pixels, tokens, folder, loss_chunk=None, compute=Compute()):
    """Likewise: a gradient has the shapes of the weights, so their writer names its tensors."""
    batch = {"image": pixels, "text": tokens, "mask": np.ones(len(pixels), bool)}
    loss, gradients = step(model.params, batch, model.config, compute, loss_chunk)
    folder.mkdir(exist_ok=True)
    huggingface.write_folder(folder, gradients, model.config)
    return float(loss), load_file(folder / "model.safetensors")


def worst(got, want):
    """The largest difference as a share of the bound, and its tensor.

    The bound is the issue's: 1e-5 of the tensor's largest entry and 1e-7 of the global norm, for
    the gradients of key biases are zero in exact arithmetic.
    """
    assert set(got) == set(want)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in want.values()))
    shares = {
        name: np.abs(got[name] - g).max() / (1e-5 * np.abs(g).max() + 1e-7 * norm)
        for name, g in want.items()
    }
    name = max(shares, key=shares.__getitem__)
    return shares[name], name


def assert_parity(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    share, name = worst(ours[1], theirs[1])
    assert share <= 1, f"{name} is off by {share:.2f} of the bound"


def golden():
    expected = dict(np.load(GOLDEN / "step.npz"))
    batch = expected.pop("pixels"), expected.pop("tokens")
    expected.pop("versions")
    return batch, (float(expected.pop("loss")), expected)


def test_golden_gradients(tmp_path):
    """With the loss in chunks, which `test_losses` compares with the dense one, and gradients as
    CPUs take them, which `test_products` does."""
    batch, expected = golden()
    model = medsiglip_jax.load(GOLDEN)
    assert_parity(
        our_step(model, *batch, tmp_path, loss_chunk=3, compute=Compute(flat=True)), expected
    )


def test_the_golden_gradients_can_tell_a_wrong_step(tmp_path):
    """A temperature wrong by 1e-4, or two images that changed places."""
    (pixels, tokens), (_, expected) = golden()
    model = medsiglip_jax.load(GOLDEN)
    _, swapped = our_step(model, pixels[[1, 0, 2, 3]], tokens, tmp_path)
    assert worst(swapped, expected)[0] > 1000
    model.params["t"] = model.params["t"] + np.float32(1e-4)
    _, warmer = our_step(model, pixels, tokens, tmp_path)
    assert worst(warmer, expected)[0] > 5


@pytest.mark.parametrize("seed, rows, loss_chunk", [(0, 1, None), (1, 6, 4)])
def test_live_gradients(tmp_path, seed, rows, loss_chunk):
    pytest.importorskip("torch", reason="live parity needs torch and transformers")
    pytest.importorskip("transformers", reason="live parity needs torch and transformers")
    reference = references.siglip(references.TINY, seed)
    batch = references.inputs(references.TINY, rows, rows, seed)
    model = medsiglip_jax.load(references.save(reference, tmp_path))
    theirs = reference_step(reference, *batch)
    assert_parity(our_step(model, *batch, tmp_path / "gradients", loss_chunk), theirs)


@pytest.mark.slow
@pytest.mark.alone
def test_live_gradients_at_full_size(tmp_path):
    """So400m/448, all 888 tensors; 15 GB of memory, 4 GB of disk, minutes."""
    pytest.importorskip("torch", reason="live parity needs torch and transformers")
    pytest.importorskip("transformers", reason="live parity needs torch and transformers")
    reference = references.siglip(references.SO400M)
    batch = references.inputs(references.SO400M, 2, 2, seed=3)
    folder = references.save(reference, tmp_path)
    theirs = reference_step(reference, *batch)
    del reference
    model = medsiglip_jax.load(folder)
    (folder / "model.safetensors").unlink()
    assert_parity(our_step(model, *batch, tmp_path / "g", compute=Compute(remat="block")), theirs)
