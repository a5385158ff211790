import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bn_jax.data import Split
from bn_jax.training import feed

NUM_STEPS = st.integers(1, 70)


@given(
    first=st.integers(0, 100),
    max_steps=st.integers(1, 30),
    epochs=st.integers(0, 3),
    steps_per_epoch=NUM_STEPS,
    checkpoint_steps=st.none() | NUM_STEPS,
)
def test_calls_cover_all_steps_once_and_end_where_they_have_to(
    first, max_steps, epochs, steps_per_epoch, checkpoint_steps
):
    last = first + epochs * steps_per_epoch
    calls = feed.calls(
        first,
        last,
        max_steps=max_steps,
        steps_per_epoch=steps_per_epoch,
        checkpoint_steps=checkpoint_steps,
    )
    steps = [step for call in calls for step in range(call.first, call.stop)]
    assert steps == list(range(first, last))
    for start, stop in calls:
        assert 1 <= stop - start <= max_steps
        for period in (steps_per_epoch, checkpoint_steps or last + 1):
            # The periods of a call's first and last step are the same.
            assert start // period == (stop - 1) // period


def test_calls_are_as_long_as_they_may_be():
    def stops(**options):
        return [call.stop for call in feed.calls(0, 60, max_steps=20, **options)]

    assert stops(steps_per_epoch=60, checkpoint_steps=None) == [20, 40, 60]
    assert stops(steps_per_epoch=30, checkpoint_steps=None) == [20, 30, 50, 60]
    assert stops(steps_per_epoch=30, checkpoint_steps=25) == [20, 25, 30, 50, 60]


@pytest.fixture
def order():
    """Seven steps of four of 30 examples."""
    return feed.Order(jax.random.key(5), num_examples=30, batch_size=4)


@pytest.fixture
def split():
    """Images whose pixels say their number."""
    numbers = np.arange(30)
    images = np.broadcast_to(numbers[:, None, None, None], (30, 2, 2, 1))
    return Split(images.astype(np.uint8), numbers.astype(np.int32))


def test_order_differs_by_epoch_and_comes_again_for_the_same_epoch(order):
    again = feed.Order(jax.random.key(5), num_examples=30, batch_size=4)
    first, second = order.of_epoch(0), order.of_epoch(1)
    assert first.shape == (order.steps_per_epoch, 4) == (7, 4)
    assert not np.array_equal(first, second)
    # In another sequence of epochs, as after a restart.
    np.testing.assert_array_equal(again.of_epoch(1), second)
    np.testing.assert_array_equal(again.of_epoch(0), first)


def rows_of(order, planned):
    """The examples of each step of each call, by the definition of an epoch."""
    flat = np.concatenate([order.of_epoch(epoch) for epoch in range(3)])
    return [flat[call.first : call.stop] for call in planned]


@pytest.mark.parametrize("columns", [slice(0, 4), slice(0, 2), slice(3, 4)])
def test_stream_yields_the_rows_of_the_order(order, split, columns):
    planned = feed.calls(0, 21, max_steps=9, steps_per_epoch=7, checkpoint_steps=5)
    streamed = list(feed.stream(split, order, planned, columns=columns, max_steps=9))
    expected = rows_of(order, planned)
    for (images, labels), rows in zip(streamed, expected, strict=True):
        rows = rows[:, columns]
        np.testing.assert_array_equal(labels[: len(rows)], rows)
        np.testing.assert_array_equal(images[: len(rows)], split.images[rows])
        # As many steps as any call has, so that one program takes all of them.
        assert len(labels) == len(images) == 9
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize("first", [1, 7, 12, 21])
def test_stream_from_amid_a_run_yields_the_rest(order, split, first):
    plan = {"max_steps": 20, "steps_per_epoch": 7, "checkpoint_steps": None}
    planned = feed.calls(first, 21, **plan)
    streamed = feed.stream(split, order, planned, columns=slice(None), max_steps=20)
    rest = [
        step
        for call, batches in zip(planned, streamed, strict=True)
        for step in batches.labels[: call.stop - call.first].tolist()
    ]
    whole = itertools.chain(*rows_of(order, feed.calls(0, 21, **plan)))
    assert rest == [step.tolist() for step in whole][first:]


def test_memory_mapped_images_are_streamed(order, split, tmp_path):
    np.save(tmp_path / "images.npy", split.images)
    mapped = Split(np.load(tmp_path / "images.npy", mmap_mode="r"), split.labels)
    plan = {"max_steps": 20, "steps_per_epoch": 7, "checkpoint_steps": None}
    planned = feed.calls(0, 7, **plan)
    (batches,) = feed.stream(mapped, order, planned, columns=slice(None), max_steps=20)
    np.testing.assert_array_equal(batches.images[:7], split.images[order.of_epoch(0)])
    assert not isinstance(batches.images, np.memmap)
