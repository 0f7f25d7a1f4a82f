"""The methods by themselves: what is known of linear functions, and where a map comes to lie."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

import medsiglip_jax
from medsiglip_jax.preprocess import image as presets
from medsiglip_jax.trust.maps import faithfulness, geometry, gradients, occlusion, rollout, tower
from medsiglip_jax.trust.maps.targets import Form, Target

MODEL = medsiglip_jax.init(
    medsiglip_jax.ModelConfig.from_dict(
        dict(vision=dict(image_size=40, patch_size=4, width=8, depth=1, mlp_dim=8, num_heads=1))
    )
)
WEIGHTS = np.random.default_rng(0).normal(size=(40, 40, 3)).astype(np.float32)
IMAGE = np.random.default_rng(1).uniform(-1, 1, (40, 40, 3)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Linear(tower.Tower):
    """Its embedding is one number, the sum of weights times pixels, plus 2."""

    def embed(self, images):
        return np.array([[(WEIGHTS * image).sum() + 2] for image in images], np.float32)

    def gradient(self, target, start, end, points, weights):
        return weights.sum() * WEIGHTS.astype(np.float64)


LINEAR = Linear(**vars(tower.Tower.of(MODEL, 4)))
NUMBERS = {"coefficients": jnp.ones((1, 1)), "intercepts": jnp.zeros(1), "index": jnp.array(0)}
TARGET = Target("sum", None, Form(normalize=False), NUMBERS, MODEL)
EXACT = (WEIGHTS * IMAGE).sum(-1)


def test_integrated_gradients_of_a_linear_function_are_exact_at_once():
    made = gradients.integrate(LINEAR, TARGET, IMAGE, gradients.profile(LINEAR, IMAGE))
    assert made.steps == 4 and made.completeness < 1e-5
    np.testing.assert_allclose(made.values, EXACT, rtol=0, atol=1e-6)


def test_more_steps_are_taken_until_the_sum_is_right(monkeypatch):
    """A gradient that is wrong until there are 32 points."""
    asked = []

    def gradient(self, target, start, end, points, weights):
        asked.append(len(points))
        return WEIGHTS * (1.0 if len(points) >= 32 else 1.5)

    monkeypatch.setattr(Linear, "gradient", gradient)
    line = gradients.profile(LINEAR, IMAGE)
    assert gradients.integrate(LINEAR, TARGET, IMAGE, line).steps == 32
    assert asked == [4, 8, 16, 32]
    with pytest.warns(UserWarning, match="after 16 steps the map's sum is off by 50.0%"):
        made = gradients.integrate(LINEAR, TARGET, IMAGE, line, max_steps=31)
    assert made.steps == 16 and made.completeness == pytest.approx(0.5, rel=1e-4)


def test_small_differences_are_measured_against_a_tenth_of_a_logit():
    assert gradients.relative_error(0.02, 0.01) == pytest.approx(0.1)
    assert gradients.relative_error(1.2, 1.0) == pytest.approx(0.2)


def test_quadrature_is_exact_for_polynomials_and_dense_where_a_function_bends():
    points, weights = gradients.quadrature(8, np.array([0, 0.1, 0.3, 1]))
    for power in range(4):  # two points in each part
        assert (weights * points**power).sum() == pytest.approx(1 / (power + 1))
    line = np.linspace(0, 1, 33)
    np.testing.assert_allclose(gradients.cuts(3 * line + 1), np.linspace(0, 1, 5), atol=1e-6)
    step = gradients.cuts(np.tanh(40 * (line - 0.2)))
    assert np.all(np.abs(step[1:4] - 0.2) < 0.1) and np.all(np.diff(step) > 0)


def test_occlusion_of_a_linear_function_is_its_mean_over_the_squares():
    maps, count = occlusion.occlude(LINEAR, [TARGET], IMAGE)
    scales = occlusion.squares(40)
    assert count == sum(map(len, scales)) == 225 + 49
    expected = np.zeros((40, 40))
    for scale in scales:
        total, cover = np.zeros((40, 40)), np.zeros((40, 40))
        for top, left, side in scale:
            part = slice(top, top + side), slice(left, left + side)
            total[part] += EXACT[part].mean()
            cover[part] += 1
        assert cover.min() >= 1  # every pixel is occluded
        expected += total / cover / len(scales)
    np.testing.assert_allclose(maps[0], expected, atol=2e-5)


def test_a_rollout_is_a_share_of_every_pixel_whatever_the_text():
    values = rollout.roll_out(tower.Tower.of(MODEL, 4), IMAGE)
    assert values.shape == (40, 40) and values.min() > 0
    assert values.sum() == pytest.approx(1)
    patches = values.reshape(10, 4, 10, 4)
    assert (patches == patches[:, :1, :, :1]).all()


# ------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("preprocess", presets.PRESETS)
@pytest.mark.parametrize("shape", [(30, 90), (90, 30), (57, 57), (300, 500)])
def test_what_the_model_sees_lies_where_it_was(preprocess, shape):
    """A bright rectangle in the original, found again in the map that is the model's own input."""
    original = np.zeros((*shape, 3), np.uint8)
    top, left, height, width = shape[0] // 5, shape[1] // 3, shape[0] // 2, shape[1] // 2
    part = slice(top, top + height), slice(left, left + width)
    original[part] = 255
    seen = presets.preset(preprocess)(original, 56)[..., 0].astype(np.float64)
    made = geometry.to_original(seen, shape, preprocess)
    assert made.shape == shape and made.dtype == np.float32
    assert made[part].sum() > 0.9 * made.sum()
    y, x = (np.average(np.arange(n), weights=made.sum(1 - axis)) for axis, n in enumerate(shape))
    assert abs(y - (top + (height - 1) / 2)) < 0.012 * max(shape) + 1
    assert abs(x - (left + (width - 1) / 2)) < 0.012 * max(shape) + 1


def test_sums_stay_and_what_lies_on_padding_is_left_out():
    values = np.random.default_rng(2).normal(size=(56, 56))
    for preprocess in presets.PRESETS:
        made = geometry.to_original(values, (31, 90), preprocess)
        rest = geometry.on_padding(values, (31, 90), preprocess)
        assert made.sum(dtype=float) + rest == pytest.approx(values.sum(), abs=1e-3)
        assert (rest != 0) == (preprocess in ("serving", "big_vision_pad"))
        same = geometry.to_original(values, (56, 56), preprocess)
        np.testing.assert_allclose(same, values, atol=1e-5)
    with pytest.raises(ValueError, match="unknown preprocess 'squash'"):
        geometry.to_original(values, (3, 3), "squash")


def test_cells_are_patches_or_fractions_of_them():
    assert geometry.cell_side(448, 14) == 14
    assert geometry.cell_side(40, 8) == 8
    assert geometry.cell_side(16, 8) == 2
    cells = geometry.by_cells(np.arange(49.0).reshape(7, 7), 3)
    assert cells.tolist() == [[72, 99], [261, 288]]


# -------------------------------------------------------------------------------- faithfulness


def test_the_true_map_of_a_linear_function_beats_random_ones_and_its_opposite_does_not():
    bright = np.where(np.indices((40, 40)).max(0)[..., None] < 20, np.sign(WEIGHTS), 0)
    bright = bright.astype(np.float32)  # a quarter of the pixels count, each of them for the logit
    exact = (WEIGHTS * (bright - bright.mean((0, 1)))).sum(-1)
    measured = faithfulness.measure(LINEAR, TARGET, bright, exact)
    whole, empty = (WEIGHTS * bright).sum() + 2, (WEIGHTS * bright.mean((0, 1))).sum() + 2
    assert measured.insertion[[0, -1]] == pytest.approx([empty, whole], rel=1e-4)
    assert measured.deletion[[0, -1]] == pytest.approx([whole, empty], rel=1e-4)
    assert np.all(np.diff(measured.shares) > 0) and len(measured.shares) == 11
    assert measured.better and measured.insertion_minus_deletion > measured.random + 0.5
    area = np.trapezoid(measured.insertion - measured.deletion, measured.shares)
    assert measured.insertion_minus_deletion == pytest.approx(area / (whole - empty), rel=1e-2)
    opposite = faithfulness.measure(LINEAR, TARGET, bright, -exact)
    assert not opposite.better
    assert opposite.insertion_minus_deletion == pytest.approx(
        -measured.insertion_minus_deletion, rel=1e-3
    )


def test_random_maps_are_as_smooth_and_the_same_for_the_same_seed():
    values = np.cumsum(np.random.default_rng(3).normal(size=(12, 12)), axis=0)
    first = list(faithfulness.random_maps(values, 3, 0))
    for made in first:
        np.testing.assert_allclose(
            np.abs(np.fft.fft2(made)), np.abs(np.fft.fft2(values)), atol=1e-9
        )
        assert abs(np.corrcoef(made.ravel(), values.ravel())[0, 1]) < 0.9
    assert all(map(np.array_equal, first, faithfulness.random_maps(values, 3, 0)))
    assert not np.array_equal(first[0], next(faithfulness.random_maps(values, 1, 1)))


def test_a_blurred_image_is_another_fill():
    mean, blur = (faithfulness.fill_of(IMAGE, fill) for fill in faithfulness.FILLS)
    assert np.ptp(mean, axis=(0, 1)).max() == 0 and 0 < np.ptp(blur) < np.ptp(IMAGE)
    with pytest.raises(ValueError, match="fill is 'black'; expected mean or blur"):
        faithfulness.fill_of(IMAGE, "black")
