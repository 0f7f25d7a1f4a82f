"""The order of rows is a pure function of (seed, position)."""

import numpy as np
import pytest

from medsiglip_jax.data.order import Once, Order


def run(order, start, stop):
    return np.stack(order.at(np.arange(start, stop)))


def test_every_epoch_is_a_permutation_and_a_new_one():
    source, epoch, row = run(Order((7,), seed=3), 0, 21)
    assert not source.any() and (epoch == np.repeat([0, 1, 2], 7)).all()
    epochs = row.reshape(3, 7)
    assert (np.sort(epochs, axis=1) == np.arange(7)).all()
    assert len({tuple(e) for e in epochs}) == 3


def test_order_does_not_change_between_versions():
    """A run resumed after an upgrade must find its order again."""
    assert run(Order((5,), seed=1), 0, 10)[2].tolist() == [4, 1, 2, 0, 3, 4, 0, 1, 3, 2]
    mixed = run(Order((4, 2), weights=(1.0, 2.0)), 0, 6)
    assert mixed.tolist() == [[1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 0, 1], [1, 3, 0, 1, 2, 0]]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_seeking_and_any_number_of_hosts_give_the_rows_of_the_run(hosts):
    order = Order((5, 11, 3), weights=(0.2, 0.5, 0.3), seed=9)
    whole = run(order, 0, 400)
    for step in (0, 7, 49):
        parts = [
            run(order, step * 8 + h * 8 // hosts, step * 8 + (h + 1) * 8 // hosts)
            for h in range(hosts)
        ]
        assert (np.concatenate(parts, axis=1) == whole[:, step * 8 : step * 8 + 8]).all()


def test_every_source_of_a_mixture_runs_through_whole_epochs():
    order = Order((5, 11, 3), weights=(0.2, 0.5, 0.3), seed=9)
    source, epoch, row = run(order, 0, 3000)
    for s, n in enumerate(order.sizes):
        mine, epochs = row[source == s], epoch[source == s]
        whole = len(mine) // n
        assert (np.sort(mine[: whole * n].reshape(-1, n), axis=1) == np.arange(n)).all()
        assert (epochs == np.arange(len(mine)) // n).all()


def test_every_stretch_of_a_mixture_has_its_shares():
    weights = np.array([0.07, 0.5, 0.3, 0.13])
    source = run(Order((5, 11, 3, 8), weights=tuple(weights.tolist())), 0, 20_000)[0]
    taken = np.cumsum(source[:, None] == np.arange(4), axis=0)
    exact = np.arange(1, 20_001)[:, None] * weights
    assert np.abs(taken - exact).max() <= 1
    window = taken[64:] - taken[:-64]
    assert np.abs(window - 64 * weights).max() <= 2


def test_default_weights_finish_epochs_together():
    source, epoch, row = run(Order((6, 2)), 0, 8)
    assert sorted(zip(source, row, strict=True)) == [(0, i) for i in range(6)] + [(1, 0), (1, 1)]
    assert not epoch.any()


def test_far_positions_are_as_quick_and_exact():
    order = Order((6, 2), weights=(3.0, 1.0))
    start = 4 * 10**11
    source, epoch, _ = order.at(np.arange(start, start + 8))
    assert np.bincount(source).tolist() == [6, 2]
    assert set(epoch[source == 0]) == {start * 3 // 4 // 6}


def test_once_is_every_row_in_order_and_seeds_differ():
    once = run(Once((2, 3)), 0, 7)
    assert once[2].tolist() == [0, 1, 0, 1, 2, -1, -1] and not once[1].any()
    assert once[0][:5].tolist() == [0, 0, 1, 1, 1]
    assert (run(Order((50,), seed=1), 0, 50) != run(Order((50,), seed=2), 0, 50)).any()
    both = run(Order((50, 50)), 0, 100)
    assert (both[2][both[0] == 0] != both[2][both[0] == 1]).any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sizes=()), "at least one source"),
        (dict(sizes=(3, 0)), "at least one source of >= 1 rows"),
        (dict(sizes=(3,), weights=(1.0, 2.0)), "2 weights for 1 sources"),
        (dict(sizes=(3, 4), weights=(1.0, 0.0)), "numbers > 0"),
        (dict(sizes=(3,), seed=-1), "seed is -1"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Order(**arguments)
