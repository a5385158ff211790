"""What all studies together say, as the index opens, and in three lines.

`{study.key}` stands for the number of the claim with that key, with its interval. What
is not known yet follows by itself: the claims that are undecided.
"""

# The three lines of the front page.
SHORT = (
    "**It trains faster and predicts better.** After ten epochs the training loss is "
    "{headline.loss} nats with batch norm and {headline.padded_loss} without; the odds "
    "of a right answer are {headline.odds} times as high.",
    "**It widens the range of learning rates that work**, by {learning_rates.width_50} "
    "decades, since weights grow until the rate fits: with their norms held, rate 10 "
    "changes the accuracy by {scale_invariance.held}.",
    "**Removing the mean does nearly all of it**: alone, it ends "
    "{center_scale.center_norm} nats from both, and one norm takes {which_layers.one} "
    "of what four take off the loss. At rate 1 its moving averages cost "
    "{headline.exact} of the test set.",
)
LINES = (
    "**What it buys.** In ten epochs LeNet with batch norm trains to a loss of "
    "{headline.loss} nats, as published; without, on padded images, to "
    "{headline.padded_loss}. By exact statistics its odds of a right answer on the "
    "test set are {headline.odds} times those without.",
    "**What moving averages cost.** At rate 1 they are noisy: exact statistics "
    "classify more of the test set, by a share of {headline.exact} of its images. "
    "Averages of momentum .99 end farther from them than those of .9, by "
    "{options.distance}.",
    "**Which rates work.** The largest rate that trains to a loss below .6 nats is "
    "{learning_rates.ratio_loss} decades above that without norm; the band of rates "
    "that reach an accuracy of .5 is wider by {learning_rates.width_50} decades.",
    "**Why large rates work.** Weights and gradient are orthogonal (mean |cosine| "
    "{scale_invariance.cosine}; without norm {scale_invariance.cosine_without}), so "
    "that weights grow until the rate fits: effective rates of rates that are two "
    "decades apart end {scale_invariance.effective} decades apart. With weights held "
    "at their first norm, the accuracy at rate 10 changes by {scale_invariance.held}.",
    "**Where it acts.** Most after the dense layers: with norms there alone the loss "
    "is {which_layers.dense} nats above that with all four, with norms after the "
    "convolutions alone {which_layers.convolutions} above that. One norm, the best, "
    "takes {which_layers.one} of what four take off the loss; a norm takes "
    "{which_layers.overlap} nats more off alone than beside the three others.",
    "**Which half acts.** To batch norm's loss, each at its best rate, only removing "
    "the mean is {center_scale.center_norm} nats, only dividing by the deviation "
    "{center_scale.scale_norm}; to that without norm they are "
    "{center_scale.center_none} and {center_scale.scale_none}.",
    "**What it makes redundant.** A bias before it: its gradient is {bias.gradient} "
    "of that of the weights, in float64.",
    "**Gamma and beta.** Fixing both costs {frozen.sigmoid_fixing} nats with sigmoids, "
    "and {frozen.relu_fixing} with ReLUs. With all else as initialised they classify "
    "more of the test set than as many other parameters: {frozen.sigmoid_alone} more, "
    "and {frozen.relu_alone} with ReLUs.",
    "**What trains faster by step.** Whitening in groups of 16: {transforms.zca} nats "
    "to batch norm in as many steps, each of which takes {transforms.slowdown} times "
    "as long, so that in as much time it gains nothing. By moving averages it predicts "
    "worse: {transforms.zca_moving} of the test set. After the convolutions alone, "
    "instance norm is {transforms.instance_loss} nats to batch norm.",
)
