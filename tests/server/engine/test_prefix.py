"""The radix tree, against a dictionary of all prefixes."""

from __future__ import annotations

import random

from server.engine.prefix import PrefixCache


def test_insert_match_and_split() -> None:
    cache = PrefixCache()
    _, held = cache.insert([1, 2, 3, 4], [11, 12, 13, 14])
    assert held == [11, 12, 13, 14]
    assert cache.match([1, 2, 9])[1] == [11, 12]
    _, held = cache.insert([1, 2, 5], [21, 22, 25])
    assert held == [11, 12, 25]
    assert sorted(cache.owned()) == [11, 12, 13, 14, 25]
    assert cache.match([1, 2, 3, 4, 5])[1] == [11, 12, 13, 14]
    assert cache.match([2])[1] == []


def test_locked_paths_stay_and_the_least_recently_used_end_goes_first() -> None:
    cache = PrefixCache()
    node, _ = cache.insert([1, 2], [1, 2])
    cache.lock(node)
    cache.insert([3, 4], [3, 4])
    cache.insert([5, 6], [5, 6])
    cache.match([3, 4])
    assert cache.num_evictable == 4
    assert cache.evict(3) == [5, 6, 4]
    assert cache.match([3, 4])[1] == [3]
    assert cache.evict(10) == [3]
    assert cache.num_evictable == 0
    cache.unlock(node)
    assert sorted(cache.evict(10)) == [1, 2]


def test_a_split_inside_a_locked_edge_keeps_both_halves_locked() -> None:
    cache = PrefixCache()
    node, _ = cache.insert([1, 2, 3], [1, 2, 3])
    cache.lock(node)
    cache.insert([1, 9], [91, 92])
    assert cache.num_evictable == 1
    assert cache.evict(10) == [92]
    cache.unlock(node)
    assert cache.num_evictable == 3


def test_random_use_agrees_with_a_dictionary() -> None:
    rng = random.Random(0)
    cache, known, slot = PrefixCache(), dict[tuple[int, ...], int](), 0
    for _ in range(500):
        tokens = tuple(rng.randrange(3) for _ in range(rng.randrange(1, 9)))
        longest = next((n for n in range(len(tokens), 0, -1) if tokens[:n] in known), 0)
        _, found = cache.match(tokens)
        assert found == [known[tokens[:n]] for n in range(1, longest + 1)]
        new = list(range(slot, slot + len(tokens)))
        slot += len(tokens)
        _, held = cache.insert(tokens, new)
        for n in range(1, len(tokens) + 1):
            known.setdefault(tokens[:n], new[n - 1])
            assert held[n - 1] == known[tokens[:n]]
        if rng.random() < 0.2:
            freed = set(cache.evict(rng.randrange(6)))
            known = {prefix: s for prefix, s in known.items() if s not in freed}
        assert sorted(cache.owned()) == sorted(known.values())
        assert cache.num_evictable == len(known)
