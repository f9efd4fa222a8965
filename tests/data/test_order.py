import numpy as np
import pytest

from vidgen.data.order import mix, permute


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 17, 1000, 65_537])
def test_permute_is_a_bijection(n):
    assert sorted(permute(np.arange(n), n, 0, 1)) == list(range(n))


def test_permute_is_seeded_and_the_same_one_at_a_time():
    whole = permute(np.arange(500), 500, 3, 1)
    assert [int(permute(i, 500, 3, 1)) for i in range(500)] == whole.tolist()
    assert (whole != permute(np.arange(500), 500, 4, 1)).mean() > 0.9
    assert (whole != permute(np.arange(500), 500, 3, 2)).mean() > 0.9
    assert (whole != np.arange(500)).mean() > 0.9


def test_permute_works_on_many_domains_at_once():
    n = np.repeat([1, 5, 90], [1, 5, 90])
    index = np.concatenate([np.arange(1), np.arange(5), np.arange(90)])
    key = np.repeat([7, 8, 9], [1, 5, 90])
    together = permute(index, n, 0, key)
    alone = [permute(np.arange(size), size, 0, k) for size, k in ((1, 7), (5, 8), (90, 9))]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_permute_reaches_every_order_of_a_small_set_about_equally():
    orders, counts = np.unique([permute(np.arange(3), 3, seed) for seed in range(3000)], axis=0, return_counts=True)
    assert len(orders) == 6
    assert counts.min() > 400 and counts.max() < 600  # 500 expected


def test_neighbours_do_not_stay_neighbours():
    steps = np.abs(np.diff(permute(np.arange(10_000), 10_000, 0)))
    assert 3000 < steps.mean() < 3700  # a third of the range, as of independent draws


def test_mix_depends_on_every_key_and_on_their_order():
    assert len({int(mix(*keys)) for keys in ((0,), (1,), (0, 0), (0, 1), (1, 0), (-1,))}) == 6
    bits = np.unpackbits(mix(0, np.arange(4096)).view(np.uint8))
    assert 0.495 < bits.mean() < 0.505
