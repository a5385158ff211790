# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Batch normalisation in JAX
#
# What it is and what it does to a network: the chapter "Batch Normalization" of
# [Dive into Deep Learning](https://d2l.ai), with bn_jax. The notebook runs on a CPU, a
# GPU and all cores of a TPU; each cell can be run twice.

# %%
# Outside of a checkout, as on Colab, set the address of the repository.
REPOSITORY = "https://github.com/OWNER/bn_jax"

import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("bn_jax") is None:
    wanted = f"bn_jax[train] @ git+{REPOSITORY}"  # with data and training
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)

# For a try, BN_JAX_EPOCHS=1 trains for one epoch, on an embedded sample of images.
SMALL = "BN_JAX_EPOCHS" in os.environ
EPOCHS = int(os.environ.get("BN_JAX_EPOCHS", 10))

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import bn_jax

# %matplotlib inline
print(jax.device_count(), "x", jax.devices()[0].device_kind)

# %% [markdown]
# ## From scratch
#
# In training, standardise each feature by the batch; learn a scale gamma and a shift
# beta; keep moving averages for prediction.


# %%
def from_scratch(
    x, gamma, beta, moving_mean, moving_var, *, train, eps=1e-5, momentum=0.9
):
    if not train:
        y = gamma * (x - moving_mean) / jnp.sqrt(moving_var + eps) + beta
        return y, moving_mean, moving_var
    axes = tuple(range(x.ndim - 1))  # all but the channels
    mean = x.mean(axes)
    var = ((x - mean) ** 2).mean(axes)
    y = gamma * (x - mean) / jnp.sqrt(var + eps) + beta
    moving_mean = momentum * moving_mean + (1 - momentum) * mean
    moving_var = momentum * moving_var + (1 - momentum) * var
    return y, moving_mean, moving_var


images = jax.random.normal(jax.random.key(0), (32, 12, 12, 6)) * 3 + 1
params, state = bn_jax.init(6)
y, mean, var = from_scratch(images, *params, *state, train=True)
ours, averages = bn_jax.batch_norm(images, params, state, train=True)
print("largest difference of the outputs:", float(jnp.abs(y - ours).max()))
print("of the moving variances:", float(jnp.abs(var - averages.var).max()))

# %% [markdown]
# The same values, until the mean is large beside the deviation. A common short cut,
# E[x²] - E[x]², then has no digits left; ours keeps them.

# %%
far = images + 1e4
short_cut = (far**2).mean((0, 1, 2)) - far.mean((0, 1, 2)) ** 2
_, averages = bn_jax.batch_norm(far, params, state, train=True, momentum=0.0)
print("variances, short cut:", np.round(short_cut, 2))
print("variances, ours:     ", np.round(averages.var, 2))

# %% [markdown]
# ## LeNet with batch norm
#
# Rate 1.0 and batches of 256, as in the chapter. The embedded sample of 6,000 images
# stands in where Fashion-MNIST is not at hand.

# %%
from bn_jax import data as data_lib
from bn_jax.training import loop, parallel
from bn_jax.training.config import TrainConfig

data = data_lib.load("sample" if SMALL else "auto")
print(data.source)


def train(**choices):
    """Train LeNet; return the trainer, and what it reported by epoch."""
    config = TrainConfig(epochs=EPOCHS, **choices)
    trainer = loop.Trainer(config, data)
    history = []
    for report in trainer.train():
        if report is None:  # between epochs
            continue
        history.append(report)
        print(
            f"epoch {len(history)}: loss {report.loss:.3f}, "
            f"training accuracy {report.train_accuracy:.3f}, "
            f"test accuracy {report.test_accuracy:.3f}, "
            f"{report.examples_per_second:,.0f} examples/s"
        )
    return trainer, history


with_norm, history = train(learning_rate=1.0)

# %%
_, without = train(learning_rate=0.9, norm="none")

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.2))
for panel, name in zip(panels, ("loss", "test_accuracy"), strict=True):
    for label, of in (("batch norm, rate 1.0", history), ("none, rate 0.9", without)):
        panel.plot([getattr(report, name) for report in of], ".-", label=label)
    panel.set(xlabel="epoch", ylabel=name.replace("_", " "))
panels[0].legend()
figure.tight_layout()

# %% [markdown]
# ## Gamma and beta
#
# What the first norm has learned, a value for each of its six channels.

# %%
variables = with_norm.state().variables
norm1 = variables["params"]["norm1"]
print("gamma", np.round(norm1["scale"], 2))
print("beta ", np.round(norm1["bias"], 2))

# %% [markdown]
# ## Concise
#
# Flax's own layer in the same network, from the same seed: the same losses, but for
# rounding.

# %%
flax, _ = train(learning_rate=1.0, norm="flax")
losses = [trainer.progress().step_losses for trainer in (with_norm, flax)]
print("first step:", abs(float(losses[0][0] - losses[1][0])))

# %% [markdown]
# ## In a model of your own
#
# `bn_jax.linen.BatchNorm` takes the place of `flax.linen.BatchNorm`; variables and
# numbers stay.

# %%
from flax import linen as nn

from bn_jax.linen import BatchNorm  # was: from flax.linen import BatchNorm


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), strides=2)(x)
        x = nn.relu(BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


inputs = data.train.images[:2048] / np.float32(255)
labels = data.train.labels[:2048]
net = Net()
own = jax.jit(net.init)(jax.random.key(0), inputs[:1])
print(net.apply(own, inputs).shape)

# %% [markdown]
# What moving averages cost is one line for any model and its variables, here for the
# LeNet that was trained above: the loss by the batch's own statistics, by the averages,
# and by those of the whole data set.

# %%
from bn_jax.measures.gap import gap

lenet = with_norm.network.model
print(gap(lenet, variables, inputs, labels, measure_on=inputs, batch_size=256))

# %% [markdown]
# ## All devices, with synced statistics
#
# The cores of a TPU, several GPUs, or host devices of a CPU. Each takes a part of every
# batch; the norms merge their moments, so that the numbers are those of one device. A
# CPU is one device, unless `jax.config.update("jax_num_cpu_devices", 2)` comes before
# all else that uses JAX.

# %%
devices = max(n for n in range(1, jax.device_count() + 1) if 256 % n == 0)
config = TrainConfig(epochs=1, learning_rate=1.0)
placement = parallel.place(config, devices=str(devices))
together = loop.Trainer(config, data, placement=placement)
(report,) = [report for report in together.train() if report is not None]
first = losses[0][0]
where = "1 device" if devices == 1 else f"{devices} devices"
print(f"{where}: {report.examples_per_second:,.0f} examples/s")
print(
    "loss of the first step, difference to one device:",
    abs(float(first - together.progress().step_losses[0])),
)

# %% [markdown]
# ## An experiment: which learning rates work?
#
# The chapter's second exercise in small: each rate is a member of one compiled sweep.

# %%
from bn_jax.training import sweep

RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
accuracy = {}
for norm in ("batch_norm", "none"):
    members = [TrainConfig(epochs=1, norm=norm, learning_rate=rate) for rate in RATES]
    rates = sweep.Sweep(members, data)
    for _ in rates.train():
        pass
    accuracy[norm] = [row["train_accuracy"][-1] for row in rates.rows(exact=False)]

figure, panel = plt.subplots()
for norm, values in accuracy.items():
    points = [np.nan if value is None else value for value in values]
    panel.semilogx(RATES, points, ".-", label=norm)
panel.set(xlabel="learning rate", ylabel="training accuracy, first epoch")
panel.legend()
plt.show()

# %% [markdown]
# Ten epochs, many seeds, intervals and verdicts: `python -m experiments` lists all
# experiments, and `experiments/README.md` what came out of them.
