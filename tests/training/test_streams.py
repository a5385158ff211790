"""Streams of random numbers: no two of a run share a key."""

import itertools

import jax
import numpy as np

from bn_jax.training.streams import Stream, key_of


def test_no_two_streams_share_a_key_nor_do_two_seeds():
    keys = {
        (seed, stream): tuple(np.asarray(jax.random.key_data(key_of(seed, stream))))
        for seed, stream in itertools.product(range(3), Stream)
    }
    assert len(set(keys.values())) == len(keys) == 3 * len(Stream)


def test_weights_and_order_are_those_of_one_key_that_is_split():
    """So that runs that were trained by other versions can be trained again."""
    for stream, key in enumerate(jax.random.split(jax.random.key(7))):
        np.testing.assert_array_equal(
            jax.random.key_data(key), jax.random.key_data(key_of(7, Stream(stream)))
        )
