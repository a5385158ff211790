"""Several devices train as one: the same numbers, few collectives, nothing mixed up."""

import collections
import dataclasses
import functools
import re
import types
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from bn_jax import data as data_lib
from bn_jax.fields import ConfigError
from bn_jax.linen import BatchNorm
from bn_jax.training import feed, loop, merging, parallel
from bn_jax.training.config import TrainConfig
from bn_jax.training.state import Network, init_state
from marks import slow_but

BATCH_SIZE = 32
NUM_STEPS = 50
MOMENTUM = 0.9
IMAGE_SHAPE = (6, 6, 1)
FLOAT32 = {"learning_rate": 0.1, "dtype": "float32"}
FLOAT64 = {"learning_rate": 1.0, "dtype": "float64"}


class Small(nn.Module):
    """Dense layers, each but the last with a norm: what LeNet has, quick to compile."""

    norm_options: dict | None = None
    ghost_batch_size: int | None = None
    num_norms: int = 1

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1)
        for i in range(self.num_norms):
            x = nn.Dense(8)(x)
            x = BatchNorm(
                use_running_average=not train,
                momentum=MOMENTUM,
                ghost_batch_size=self.ghost_batch_size,
                name=f"norm{i + 1}",
                **(self.norm_options or {}),
            )(x)
            x = jax.nn.sigmoid(x)
        return nn.Dense(10)(x)


def images_and_labels():
    """100 images whose classes differ in brightness, so that devices' means differ."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 100).astype(np.int32)
    images = (
        rng.integers(0, 130, (100, *IMAGE_SHAPE)) + 12 * labels[:, None, None, None]
    )
    return data_lib.Split(images.astype(np.uint8), labels)


PACE = parallel.Pace(parallel.STEPS_PER_CALL)
DATA = images_and_labels()
ORDER = np.stack(
    [
        np.random.default_rng(i).permutation(len(DATA.labels))[:BATCH_SIZE]
        for i in range(NUM_STEPS)
    ]
)


def placed(batch_stats, num_devices, program, batch_size=BATCH_SIZE):
    """The config and placement, on that many devices indeed."""
    config = TrainConfig(batch_size=batch_size, batch_stats=batch_stats)
    placement = parallel.place(config, devices=str(num_devices), parallel=program)
    assert len(set(placement.devices)) == num_devices
    return config, placement


def small(config, placement, **model_options):
    """`Small`, whose norms share statistics as configured."""
    attributes = parallel.norm_attributes(config, placement)
    ghosts = attributes.pop("ghost_batch_size", None)
    options = {"norm_options": attributes, "ghost_batch_size": ghosts} | model_options
    return Network(Small(**options), IMAGE_SHAPE)


@functools.cache  # compilation is what these tests wait for
def steps_of(
    config,
    placement,
    *,
    learning_rate=0.1,
    pace=PACE,
    **model_options,
):
    """The compiled loop of `Small`, and of plain SGD."""
    train_step = loop.make_train_step(
        config,
        small(config, placement, **model_options),
        optax.sgd(learning_rate),
        axis_name=parallel.DATA if placement.uses_axis else None,
    )
    return parallel.make_steps(
        placement, functools.partial(loop.run_steps, train_step, pace=pace)
    )


COMPILED = weakref.WeakKeyDictionary()  # loops, by the kind of their source


def run(steps, state, source, start, stop):
    """The state and the metrics of some steps."""
    of_kind = COMPILED.setdefault(steps, {})
    with steps.tracing():
        if type(source) not in of_kind:
            of_kind[type(source)] = steps.compiled(source)
        first, last = np.int32(start), np.int32(stop)
        return of_kind[type(source)](state, source, first, last)


def initial(num_states, *, dtype=np.float32, seed=0, num_norms=1):
    """The state before the first step, on the host."""
    network = Network(Small(num_norms=num_norms), IMAGE_SHAPE)
    variables = network.init(jax.random.key(seed))
    state = as_dtype(init_state(variables, optax.sgd(0.1)), dtype)
    copies = jax.tree.map(lambda v: np.stack([v] * num_states), state.batch_stats)
    return state.replace(batch_stats=copies)


def as_dtype(state, dtype):
    """A state of NumPy arrays whose floats are of `dtype`."""

    def cast(leaf):
        leaf = np.asarray(leaf)
        return leaf.astype(dtype) if leaf.dtype.kind == "f" else leaf

    return jax.tree.map(cast, state)


def ran(steps, state, first=0, last=NUM_STEPS):
    """The state on the host, and the losses, of the steps from `first` to `last`."""
    source = steps.put_stored(steps.put_data(DATA), ORDER)
    state, losses = steps.put_state(state), []
    for start in range(first, last, parallel.STEPS_PER_CALL):
        stop = min(last, start + parallel.STEPS_PER_CALL)
        state, metrics = run(steps, state, source, start, stop)
        losses.append(steps.get_first(metrics.loss)[: stop - start])
    state = steps.get_state(state)
    assert state.step == last
    return state, np.concatenate(losses)


@functools.cache  # a few runs are compared with many
def trained(
    batch_stats, num_devices, program, *, learning_rate, dtype, last=NUM_STEPS, **model
):
    """The state and the losses after steps of `Small` from its initial state."""
    config, placement = placed(batch_stats, num_devices, program)
    steps = steps_of(config, placement, learning_rate=learning_rate, **model)
    return ran(steps, initial(placement.num_states, dtype=dtype), last=last)


def assert_near(one, other, atol):
    """Assert that states are near in parameters and statistics, and not for lack."""
    for a, b in ((one.params, other.params), (one.batch_stats, other.batch_stats)):
        chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
        chex.assert_trees_all_close(a, b, atol=atol, rtol=0)


def merged(state):
    """The state with the exact merge of its moving averages, in a stack of one."""
    one = merging.merged(state.batch_stats, "exact")
    return state.replace(batch_stats=jax.tree.map(lambda leaf: leaf[None], one))


# Sharing statistics, the devices are one.


@pytest.mark.slow
@pytest.mark.parametrize("program", ["pmap", "jit"])
@pytest.mark.parametrize("num_devices", [2, 4, 8])
def test_synced_devices_are_one_device_with_the_whole_batch(num_devices, program):
    one, losses = trained("synced", 1, "jit", **FLOAT32)
    many, losses_of_many = trained("synced", num_devices, program, **FLOAT32)
    assert_near(many, one, atol=1e-4)
    np.testing.assert_allclose(losses_of_many, losses, atol=1e-4)
    assert losses[-10:].mean() < losses[:10].mean() - 0.1  # there was something to lose


@pytest.mark.parametrize(
    ("num_devices", "program"),
    slow_but([(8, "pmap")], [(n, by) for n in (2, 4, 8) for by in ("pmap", "jit")]),
)
def test_synced_devices_are_one_device_to_rounding_in_float64(
    num_devices, program, x64
):
    one, losses = trained("synced", 1, "jit", **FLOAT64)
    many, losses_of_many = trained("synced", num_devices, program, **FLOAT64)
    chex.assert_type(jax.tree.leaves((many.params, many.batch_stats)), np.float64)
    assert_near(many, one, atol=1e-10)
    np.testing.assert_allclose(losses_of_many, losses, atol=1e-10)
    assert losses[-10:].mean() < losses[:10].mean() - 0.1


def lenet_after_50_steps(data, num_devices, program, *, learning_rate, dtype):
    """The state of LeNet, trained by the Trainer in `dtype`."""
    config = TrainConfig(epochs=5, batch_size=16, learning_rate=learning_rate)
    placement = parallel.place(config, devices=str(num_devices), parallel=program)
    assert len(set(placement.devices)) == num_devices
    trainer = loop.Trainer(config, data, placement=placement)
    start = trainer.progress()
    trainer.restore(start._replace(state=as_dtype(start.state, dtype)))
    assert len(list(trainer.train())) == 5
    assert trainer.step == NUM_STEPS
    return trainer.progress().state


@pytest.mark.slow
def test_lenet_on_synced_devices_is_lenet_on_one_in_float64(tiny_data, x64):
    one = lenet_after_50_steps(tiny_data, 1, "jit", **FLOAT64)
    chex.assert_type(jax.tree.leaves((one.params, one.batch_stats)), np.float64)
    for program in ("pmap", "jit"):
        four = lenet_after_50_steps(tiny_data, 4, program, **FLOAT64)
        assert_near(four, one, atol=1e-10)


@pytest.mark.slow
def test_lenet_on_synced_devices_is_lenet_on_one(tiny_data):
    one = lenet_after_50_steps(tiny_data, 1, "jit", **FLOAT32)
    two = lenet_after_50_steps(tiny_data, 2, "pmap", **FLOAT32)
    assert_near(two, one, atol=1e-4)


# Not sharing them, they are ghost batches.


APART = [
    ("per_device", 4, 4),
    ("per_device", 8, 8),
    ("groups:2", 8, 4),
    ("groups:4", 8, 2),
]


@pytest.mark.parametrize(
    ("batch_stats", "num_devices", "num_ghosts", "program"),
    slow_but(
        [
            ("per_device", 8, 8, "pmap"),
            ("groups:2", 8, 4, "jit"),
        ],
        [(*apart, program) for apart in APART for program in ("pmap", "jit")],
    ),
)
def test_devices_apart_are_ghost_batches_of_one_device(
    batch_stats, num_devices, num_ghosts, program, x64
):
    one, losses = trained(
        "synced", 1, "jit", **FLOAT64, ghost_batch_size=BATCH_SIZE // num_ghosts
    )
    many, losses_of_many = trained(batch_stats, num_devices, program, **FLOAT64)
    np.testing.assert_allclose(losses_of_many, losses, atol=1e-10)
    chex.assert_trees_all_close(many.params, one.params, atol=1e-10, rtol=0)
    # Averages are linear in the batches' means, whichever comes first: the average
    # over time or that over ghosts. (The variance has a test of its own.)
    for layer in one.batch_stats:
        mean = many.batch_stats[layer]["mean"].mean(0)
        expected = one.batch_stats[layer]["mean"][0]
        np.testing.assert_allclose(mean, expected, atol=1e-10)
    if program == "jit":
        assert_near(many, one, atol=1e-10)


@pytest.mark.slow
def test_ghosts_variance_exceeds_the_merge_of_devices_by_the_jitter_of_their_means(x64):
    """The moving variance of ghost batches, from what the devices averaged apart.

    Let mu_dt and s_dt be mean and variance of device d's part of batch t, w_t the
    batch's weight in the average, (1 - m) m^(T - t), and V_d the variance over
    devices. Ghost batches merge before they average,

      v = m^T + sum_t w_t (mean_d s_dt + V_d(mu_dt)),

    whereas devices average first, v_d = m^T + sum_t w_t s_dt, mu_d = sum_t w_t mu_dt,
    and their merge is mean_d v_d + V_d(mu_d). So the first exceeds the second by
    sum_t w_t V_d(mu_dt) - V_d(sum_t w_t mu_dt), which is not negative, as V_d is
    convex and the weights add up to less than 1. As mu_d moves by
    mu_d <- m mu_d + (1 - m) mu_dt, its values before and after a step give mu_dt.
    """
    config, placement = placed("per_device", 4, "pmap")
    steps = steps_of(config, placement, learning_rate=1.0)
    state = initial(4, dtype=np.float64)
    num_steps = 12
    between = dict.fromkeys(state.batch_stats, 0.0)
    for t in range(num_steps):
        before = state.batch_stats
        state, _ = ran(steps, state, t, t + 1)
        for layer in between:
            old, new = before[layer]["mean"], state.batch_stats[layer]["mean"]
            of_batch = (new - MOMENTUM * old) / (1 - MOMENTUM)
            weight = (1 - MOMENTUM) * MOMENTUM ** (num_steps - 1 - t)
            between[layer] = between[layer] + weight * of_batch.var(0)

    ghosts, _ = trained("per_device", 4, "jit", **FLOAT64, last=num_steps)
    merge = merged(state)
    for layer in between:
        of_devices = state.batch_stats[layer]
        v = ghosts.batch_stats[layer]["var"][0]
        np.testing.assert_allclose(
            v, of_devices["var"].mean(0) + between[layer], atol=1e-10
        )
        excess = v - merge.batch_stats[layer]["var"][0]
        np.testing.assert_allclose(
            excess, between[layer] - of_devices["mean"].var(0), atol=1e-10
        )
        assert excess.min() > 1e-6


@pytest.mark.parametrize(
    "batch_stats",
    slow_but(["synced", "groups:2"], ["synced", "groups:2", "per_device"]),
)
def test_pmap_and_jit_are_the_same_training(batch_stats, x64):
    by_pmap, losses = trained(batch_stats, 8, "pmap", **FLOAT64)
    by_jit, losses_by_jit = trained(batch_stats, 8, "jit", **FLOAT64)
    np.testing.assert_allclose(losses, losses_by_jit, atol=1e-10)
    chex.assert_trees_all_close(by_pmap.params, by_jit.params, atol=1e-10, rtol=0)


def test_how_statistics_are_shared_makes_a_difference(x64):
    losses = [
        trained(batch_stats, 8, "pmap", **FLOAT64)[1]
        for batch_stats in ("synced", "groups:2", "per_device")
    ]
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert np.abs(losses[i] - losses[j]).max() > 1e-3


# Moving averages of devices that share nothing.


@pytest.mark.parametrize(
    ("batch_stats", "num_states"), [("per_device", 8), ("groups:2", 4), ("synced", 1)]
)
def test_moving_averages_of_groups_stay_apart(batch_stats, num_states, x64):
    state, _ = trained(batch_stats, 8, "pmap", **FLOAT64)
    for layer in state.batch_stats.values():
        chex.assert_shape([layer["mean"], layer["var"]], (num_states, 8))
        for i in range(num_states):
            for j in range(i):
                assert np.abs(layer["mean"][i] - layer["mean"][j]).max() > 1e-3
                assert np.abs(layer["var"][i] - layer["var"][j]).max() > 1e-3


def test_groups_average_their_own_part_of_the_batch(x64):
    # After one step from mean 0 the average is (1 - m) times the mean of what the
    # group saw, here of the first dense layer.
    start = initial(4, dtype=np.float64)
    steps = steps_of(*placed("groups:2", 8, "pmap"), learning_rate=1.0)
    state, _ = ran(steps, start, last=1)
    dense = start.params["Dense_0"]
    for group in range(4):
        rows = ORDER[0, 8 * group : 8 * (group + 1)]
        x = DATA.images[rows].reshape(8, -1) / 255
        y = x @ dense["kernel"] + dense["bias"]
        averages = state.batch_stats["norm1"]
        np.testing.assert_allclose(averages["mean"][group], 0.1 * y.mean(0), rtol=1e-9)
        np.testing.assert_allclose(
            averages["var"][group], 0.9 + 0.1 * y.var(0), rtol=1e-9
        )


def test_exact_merge_adds_the_variance_between_devices():
    # Devices of means 1, 3 and variances 2, 4: mean 2, variance 3 + 1.
    layer = {
        "mean": np.array([[1.0, 0.0], [3.0, 0.0]], np.float32),
        "var": np.array([[2.0, 1.0], [4.0, 2.0]], np.float32),
    }
    exact = merging.merged({"block": {"norm": layer}}, "exact")["block"]["norm"]
    np.testing.assert_allclose(exact["mean"], [2.0, 0.0])
    np.testing.assert_allclose(exact["var"], [4.0, 1.5])
    first = merging.merged({"block": {"norm": layer}}, "first")["block"]["norm"]
    np.testing.assert_array_equal(first["mean"], [1.0, 0.0])
    np.testing.assert_array_equal(first["var"], [2.0, 1.0])


def test_merge_of_one_is_itself_and_keeps_what_is_no_average():
    layer = {
        "mean": np.array([[0.1, 0.2]], np.float32),
        "var": np.array([[0.3, 0.7]], np.float32),
        "count": np.array([5.0], np.float32),
    }
    for rule in ("exact", "first"):
        one = merging.merged({"norm": layer}, rule)["norm"]
        chex.assert_trees_all_equal(one, {name: v[0] for name, v in layer.items()})
    both = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf]), {"norm": layer})
    assert merging.merged(both, "exact")["norm"]["count"] == 5
    assert merging.merged({}, "exact") == {}


@pytest.mark.parametrize("norm", ["whitening:max_group_size=8", "center", "mabn"])
def test_averages_that_cannot_be_merged_exactly_are_refused(norm, tiny_data):
    config = TrainConfig(
        model="mlp:widths=16x16", norm=norm, batch_size=16, batch_stats="per_device"
    )
    placement = parallel.place(config, devices="4")
    with pytest.raises(
        ConfigError, match="merged_stats='exact'.*, which keeps.*'first"
    ):
        loop.Trainer(config, tiny_data, placement=placement)
    first = dataclasses.replace(config, merged_stats="first")
    loop.Trainer(first, tiny_data, placement=placement)
    loop.Trainer(config, tiny_data, placement=parallel.place(config))  # on one device


@pytest.mark.parametrize("rule", slow_but(["exact"], ["exact", "first"]))
def test_run_is_taken_on_by_another_number_of_devices(rule, tiny_data):
    config = TrainConfig(
        model="mlp:widths=16x16",
        batch_size=16,
        batch_stats="per_device",
        merged_stats=rule,
    )

    def trainer_on(num_devices):
        placement = parallel.place(config, devices=str(num_devices))
        assert len(set(placement.devices)) == num_devices
        return loop.Trainer(config, tiny_data, placement=placement)

    progress = trainer_on(4).progress()
    rng = np.random.default_rng(0)
    apart = jax.tree.map(
        lambda leaf: rng.uniform(size=leaf.shape).astype(np.float32),
        progress.state.batch_stats,
    )
    progress = progress._replace(
        state=progress.state.replace(step=np.int32(3), batch_stats=apart),
        step_losses=np.array([3.0, 2.0, 1.0], np.float32),
        step_accuracies=np.array([0.1, 0.2, 0.3], np.float32),
    )
    means, variances = apart["norm2"]["mean"], apart["norm2"]["var"]
    chex.assert_shape([means, variances], (4, 16))
    mean, var = means[0], variances[0]
    if rule == "exact":
        mean, var = means.mean(0), variances.mean(0) + means.var(0)
    for num_devices in (1, 2, 8):
        trainer = trainer_on(num_devices)
        trainer.restore(progress)
        after = trainer.progress()
        assert (trainer.step, trainer.last_loss) == (3, 1.0)
        chex.assert_trees_all_equal(after.state.params, progress.state.params)
        np.testing.assert_array_equal(after.step_losses, progress.step_losses)
        norm2 = after.state.batch_stats["norm2"]
        chex.assert_shape(norm2["mean"], (num_devices, 16))
        for i in range(num_devices):
            np.testing.assert_allclose(norm2["mean"][i], mean, rtol=1e-5)
            np.testing.assert_allclose(norm2["var"][i], var, rtol=1e-5)
    same = trainer_on(4)
    same.restore(progress)
    chex.assert_trees_all_equal(same.progress(), progress)


# On the devices and back.


@pytest.mark.parametrize(
    ("batch_stats", "num_devices", "program"),
    [
        ("synced", 1, "pmap"),
        ("synced", 4, "pmap"),
        ("per_device", 8, "pmap"),
        ("groups:2", 8, "pmap"),
        ("groups:4", 8, "pmap"),
        ("synced", 1, "jit"),
        ("groups:2", 4, "jit"),
        ("per_device", 8, "jit"),
    ],
)
def test_states_return_from_the_devices_bit_for_bit(batch_stats, num_devices, program):
    config, placement = placed(batch_stats, num_devices, program)
    steps = steps_of(config, placement)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype),
        initial(placement.num_states),
    )
    state = state.replace(step=np.int32(7))
    placed_state = steps.put_state(state)
    for leaf in jax.tree.leaves(placed_state):
        assert leaf.sharding.device_set == set(placement.devices)
    back = steps.get_state(placed_state)
    chex.assert_trees_all_equal(back, state)
    chex.assert_trees_all_equal_dtypes(back, state)


def test_state_without_statistics_returns():
    config, placement = placed("per_device", 8, "pmap")
    steps = steps_of(config, placement)
    state = initial(placement.num_states).replace(batch_stats={})
    chex.assert_trees_all_equal(steps.get_state(steps.put_state(state)), state)


@pytest.mark.parametrize(
    ("platform", "steps_per_epoch", "streamed", "expected"),
    [
        ("cpu", 234, False, (20, 1)),
        ("gpu", 234, False, (234, 26)),  # one call of 9 rounds, none for nothing
        ("gpu", 468, False, (234, 26)),
        ("gpu", 5, False, (255, 5)),
        ("tpu", 233, False, (256, 16)),  # a prime
        ("gpu", 234, True, (20, 20)),
    ],
)
def test_calls_are_long_on_accelerators(platform, steps_per_epoch, streamed, expected):
    device = types.SimpleNamespace(platform=platform)
    pace = parallel.pace([device], steps_per_epoch=steps_per_epoch, streamed=streamed)
    assert pace == expected


def test_steps_that_nobody_asks_about_change_no_bit():
    config, placement = placed("synced", 8, "pmap")
    start = initial(placement.num_states)
    asked = ran(steps_of(config, placement), start)
    unasked = ran(steps_of(config, placement, pace=parallel.Pace(20, 3)), start)
    chex.assert_trees_all_equal(asked, unasked)


@pytest.mark.parametrize("program", slow_but(["pmap"], ["pmap", "jit"]))
def test_streamed_batches_are_the_stored_ones(program, x64):
    config, placement = placed("per_device", 8, program)
    steps = steps_of(config, placement, learning_rate=1.0)
    start = initial(placement.num_states, dtype=np.float64)
    assert steps.columns(BATCH_SIZE) == slice(0, BATCH_SIZE)
    rows = ORDER[: parallel.STEPS_PER_CALL]
    streamed = steps.put_streamed(feed.Batch(DATA.images[rows], DATA.labels[rows]))
    state, metrics = run(steps, steps.put_state(start), streamed, 0, len(rows))
    stored, losses = ran(steps, start, last=len(rows))
    chex.assert_trees_all_equal(steps.get_state(state), stored)
    np.testing.assert_array_equal(steps.get_first(metrics.loss), losses)


# One collective for each layer and direction, and one for the step.


def lowered(batch_stats, num_devices, program, num_norms):
    """The loop as it is given to the compiler."""
    config, placement = placed(batch_stats, num_devices, program)
    steps = steps_of(config, placement, num_norms=num_norms)
    state = steps.put_state(initial(placement.num_states, num_norms=num_norms))
    source = steps.put_stored(steps.put_data(DATA), ORDER)
    return steps.lower(state, source)


def collectives(compiled):
    """How often each kind of collective stands in the compiled loop."""
    kinds = (
        "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|"
        "collective-broadcast|ragged-all-to-all"
    )
    found = re.findall(
        rf" ({kinds})(?:-start)?\(.*op_name=\"([^\"]*)\"", compiled.as_text()
    )
    assert all("while/body" in name for _, name in found)  # in the loop, each of them
    return collections.Counter(kind for kind, _ in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_stats", "num_norms"), [("synced", 1), ("synced", 4), ("groups:2", 3)]
)
def test_pmap_has_one_collective_per_norm_and_direction_and_one_for_the_step(
    batch_stats, num_norms
):
    program = lowered(batch_stats, 4, "pmap", num_norms)
    assert collectives(program.compile()) == {"all-reduce": 2 * num_norms + 1}
    # So they were written; no compiler has to join them.
    assert program.as_text().count("stablehlo.all_reduce") == 2 * num_norms + 1


def test_devices_apart_have_one_collective_for_gradients_and_metrics():
    program = lowered("per_device", 4, "pmap", 1)
    assert collectives(program.compile()) == {"all-reduce": 1}
    assert program.as_text().count("stablehlo.all_reduce") == 1


def test_one_device_has_no_collectives():
    assert not collectives(lowered("synced", 1, "pmap", 1).compile())


@pytest.mark.parametrize(
    ("batch_stats", "most"),
    [
        ("synced", {"all-gather": 2, "all-reduce": 3}),
        pytest.param("per_device", {"all-reduce": 5}, marks=pytest.mark.slow),
        pytest.param(
            "groups:2", {"all-gather": 4, "all-reduce": 8}, marks=pytest.mark.slow
        ),
    ],
)
def test_compilers_own_collectives_are_bounded(batch_stats, most):
    # Over a mesh XLA splits the sums over a batch where they stand, and joins what is
    # ready together. Of L norms, synced, it makes 2 L + 1, as many as pmap has: forward
    # the moments of the devices, in one gather; backward one, which carries gradients,
    # too; and one for the last of them and the metrics. Ghost batches of a device make
    # 2 L + 1: their moments are merged, for the moving averages, in two passes. Groups
    # make 5 L + 2: their backward sums are not over all devices, as the gradients' are.
    found = collectives(lowered(batch_stats, 4, "jit", 2).compile())
    assert found
    assert found <= collections.Counter(most)


# Members of an ensemble.


@pytest.mark.slow
@pytest.mark.parametrize("batch_stats", ["synced", "groups:2", "per_device"])
def test_members_of_an_ensemble_train_as_if_alone(batch_stats, x64):
    config, placement = placed(batch_stats, 4, "pmap")
    one_step = loop.make_train_step(
        config,
        small(config, placement),
        optax.sgd(1.0),
        axis_name=parallel.DATA,
    )

    def of_members(states, batch):
        states, metrics = jax.vmap(one_step, (0, None), axis_name="models")(
            states, batch
        )
        return states, jax.tree.map(jnp.mean, metrics)

    members = [
        initial(placement.num_states, dtype=np.float64, seed=seed) for seed in range(3)
    ]
    together = jax.tree.map(lambda *leaves: np.stack(leaves), *members)
    # Groups of devices come first, members after.
    by_group = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), together.batch_stats)
    ensemble = parallel.make_steps(
        placement,
        functools.partial(loop.run_steps, of_members, pace=parallel.Pace(20)),
    )
    source = ensemble.put_stored(ensemble.put_data(DATA), ORDER)
    state = ensemble.put_state(together.replace(batch_stats=by_group))
    state, metrics = run(ensemble, state, source, 0, 20)
    state = ensemble.get_state(state)

    steps = steps_of(config, placement, learning_rate=1.0)
    alone = [ran(steps, member, last=20) for member in members]
    for i, (member, _) in enumerate(alone):
        found = state.replace(
            step=state.step[i],
            params=jax.tree.map(lambda leaf, i=i: leaf[i], state.params),
            batch_stats=jax.tree.map(lambda leaf, i=i: leaf[:, i], state.batch_stats),
        )
        assert_near(found, member, atol=1e-10)
    mean_losses = np.mean([losses for _, losses in alone], 0)
    np.testing.assert_allclose(
        ensemble.get_first(metrics.loss), mean_losses, atol=1e-10
    )
    difference = jax.tree.map(
        lambda a, b: a - b, alone[0][0].params, alone[1][0].params
    )
    assert optax.tree.norm(difference) > 1  # others, indeed


# Compiled once.


@pytest.mark.parametrize(("stream", "program"), [(False, "pmap"), (True, "jit")])
def test_loop_is_compiled_once_however_it_is_cut(stream, program, tiny_data):
    traces = []

    def make_train_step(*arguments, **options):
        train_step = loop.make_train_step(*arguments, **options)

        def traced(state, batch):
            traces.append(batch.labels.shape)
            return train_step(state, batch)

        return traced

    config = TrainConfig(
        model="mlp:widths=16", epochs=3, batch_size=16, learning_rate=0.1
    )
    trainer = loop.Trainer(
        config,
        tiny_data,
        placement=parallel.place(config, devices="2", parallel=program),
        stream=stream,
        checkpoint_steps=3,  # of 10 an epoch: calls of 1, 2 and 3 steps
        make_train_step=make_train_step,
    )
    reports = trainer.train()
    next(reports)
    of_first_call, compiled = len(traces), trainer.compile_seconds
    assert of_first_call == 1 and compiled > 0  # traced once, too
    later = [trainer.compile_seconds for _ in reports]
    assert trainer.step == 30 and len(later) > 10
    assert len(traces) == of_first_call
    assert later[-1] == later[3]  # the evaluation was compiled in the first epoch
    # A batch, or a device's part of it: nothing was traced with another shape.
    assert set(traces) == {(8,) if program == "pmap" else (16,)}


# What cannot be had.


@pytest.mark.parametrize(
    ("config", "devices", "program", "message"),
    [
        ({}, "9", "pmap", r"devices=9, but JAX sees 8 \(cpu\); give at most 8, or all"),
        (
            {"batch_size": 30},
            "4",
            "jit",
            "batch_size=30 does not divide over 4 devices; give a multiple of 4, or",
        ),
        (
            {"batch_size": 30},
            "all",
            "pmap",
            "batch_size=30 does not divide over 8 devices",
        ),
        (
            {"batch_stats": "groups:3"},
            "8",
            "pmap",
            "batch_stats='groups:3' does not divide 8 devices into groups of 3; give a "
            "divisor of 8",
        ),
        (
            {"batch_stats": "groups:8"},
            "4",
            "jit",
            "batch_stats='groups:8' does not divide 4 devices into groups of 8",
        ),
    ],
)
def test_placement_that_cannot_be_is_refused(config, devices, program, message):
    with pytest.raises(ConfigError, match=message):
        parallel.place(TrainConfig(**config), devices=devices, parallel=program)


@pytest.mark.parametrize("norm", ["flax", "whitening"])
@pytest.mark.parametrize("batch_stats", ["per_device", "groups:2"])
def test_norm_without_ghost_batches_is_refused_where_they_stand_for_devices(
    norm, batch_stats, tiny_data
):
    config = TrainConfig(
        norm=norm, batch_stats=batch_stats, batch_size=16, model="mlp:widths=4"
    )
    placement = parallel.place(config, devices="4", parallel="jit")
    with pytest.raises(ConfigError, match=f"norm='{norm}' takes no ghost_batch_size"):
        loop.Trainer(config, tiny_data, placement=placement)


def test_flaxs_norm_is_placed_where_it_shares_statistics_by_itself(tiny_data):
    def num_states(devices, program, **options):
        config = TrainConfig(
            norm="flax", batch_size=16, model="mlp:widths=4", **options
        )
        placement = parallel.place(config, devices=devices, parallel=program)
        return loop.Trainer(config, tiny_data, placement=placement).placement.num_states

    assert num_states("4", "pmap", batch_stats="per_device") == 4
    assert num_states("1", "jit", batch_stats="per_device") == 1
    assert num_states("4", "jit") == 1


# Other models.


MODELS = {"mlp": "mlp:widths=8x8", "resnet": "resnet:depth=8,width=2"}


@functools.cache
def model_after_5_steps(model, num_devices, program, batch_stats):
    """The trainer of a model and a data set, of 5 steps at a low rate."""
    config = TrainConfig(
        model=MODELS[model],
        epochs=1,
        batch_size=32,
        learning_rate=0.05,
        batch_stats=batch_stats,
    )
    rng = np.random.default_rng(0)
    labels = (np.arange(160) % 10).astype(np.int32)
    images = rng.integers(0, 130, (160, 8, 8, 1)) + 12 * labels[:, None, None, None]
    split = data_lib.Split(images.astype(np.uint8), labels)
    data = data_lib.ImageData(
        name="bright",
        train=split,
        test=split,
        class_names=tuple("0123456789"),
        kind="npz",
        source="bright",
    )
    placement = parallel.place(config, devices=str(num_devices), parallel=program)
    assert len(set(placement.devices)) == num_devices
    trainer = loop.Trainer(config, data, placement=placement)
    assert len(list(trainer.train())) == 1 and trainer.step == 5
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("program", ["pmap", "jit"])
@pytest.mark.parametrize("model", MODELS)
def test_other_models_on_synced_devices_are_those_on_one(model, program):
    one = model_after_5_steps(model, 1, "jit", "synced")
    two = model_after_5_steps(model, 2, program, "synced")
    assert_near(two.progress().state, one.progress().state, atol=1e-4)
    np.testing.assert_allclose(
        two.progress().step_losses, one.progress().step_losses, atol=1e-4
    )
    assert two.history[0].test_loss == pytest.approx(one.history[0].test_loss, rel=1e-3)
    assert two.score().test_loss_exact == pytest.approx(
        one.score().test_loss_exact, rel=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_other_models_on_devices_apart_are_ghost_batches(model):
    apart = model_after_5_steps(model, 2, "pmap", "per_device").progress()
    ghosts = model_after_5_steps(model, 2, "jit", "per_device").progress()
    synced = model_after_5_steps(model, 2, "pmap", "synced").progress()
    np.testing.assert_allclose(apart.step_losses, ghosts.step_losses, atol=1e-4)
    chex.assert_trees_all_close(
        apart.state.params, ghosts.state.params, atol=1e-4, rtol=0
    )
    for path, mean in jax.tree_util.tree_leaves_with_path(apart.state.batch_stats):
        if path[-1].key == "mean":  # the average over devices, first or last
            of_ghosts = ghosts.state.batch_stats
            for part in path:
                of_ghosts = of_ghosts[part.key]
            assert len(mean) == 2 and len(of_ghosts) == 1
            np.testing.assert_allclose(mean.mean(0), of_ghosts[0], atol=1e-4)
    assert np.abs(apart.step_losses - synced.step_losses).max() > 1e-3


def test_all_devices_are_those_that_there_are():
    placement = parallel.place(TrainConfig(), devices="all")
    assert placement.devices == tuple(jax.devices())
    assert placement.local_devices == placement.devices
    assert (placement.first_local, placement.group_size) == (0, 8)
