"""What the paper claims, what it leaves open and what msjax claims: holds, does not, or not tested, from the records.

python -m experiments.claims

Verdicts are computed, whenever this runs, from the records in `experiments/results/` by the functions in
`judges_theory`, `judges_training`, `judges_open` and `judges_own`; how is said in `verdicts`. Only the claims and our
explanations are written here. An explanation is shown where its claim does not hold or holds in part.
"""

import sys

from experiments import judges_open as open_questions
from experiments import judges_own as own
from experiments import judges_theory as theory
from experiments import judges_training as training
from experiments.verdicts import Claim, Results, table

PAPER = (
    Claim(
        "Figure 1",
        "In the worked example MS lowers the error of plain top-k from 4.06 to 1.02, with 20 bytes for 64.",
        theory.figure_1,
    ),
    Claim("Size", "MS sends 13.79 times fewer bytes of features.", training.size),
    Claim(
        "Time",
        "Encoding with MS takes time O(d log k + d).",
        theory.encoding_time,
        "We guess that it is the heap of the k largest in PyTorch's `topk`, which outgrows the processor's caches; the "
        "number of operations need not. msjax finds the smallest of the k largest bit by bit instead, in time O(d).",
    ),
    Claim("Theorem 1", "Even an unbiased codec makes the gradients biased.", theory.biased),
    Claim("Lemma 2", "The gradients' error grows with the features' error E.", theory.error_grows),
    Claim(
        "Theorem 3",
        "The smaller the compression error, the better training converges.",
        theory.converges_worse,
        "The theorem bounds the worst case; which values are wrong matters beside how large the error is.",
    ),
    Claim("Bounds (31)–(33)", "The errors of QU, SP and MS are within their bounds.", theory.within_bounds),
    Claim(
        "Figure 2",
        "At equal size, 2.32 bits, errors are in the order RT > SP ≫ QU > MS (≫: at least twice).",
        theory.ordered,
        "The order is there. QU has whole bits only, and between its 2 and 3 bits its error falls several times: "
        "with 3 bits, as in the paper's trainings, it is well below half of SP's.",
    ),
    Claim(
        "Figure 2",
        "QU has a larger error than MS at any size from 2.32 to 6 bits (MS with 2-bit codes: our reading).",
        theory.ordered_at_all_sizes,
        "A bit more a value halves QU's step everywhere. MS has kept values to spend it on, and 2-bit codes for all "
        "others remain as coarse as they were. A wider mask spends it better.",
    ),
    Claim(
        "Figure 3",
        "Training with MS ends at most 0.7 points below no compression.",
        training.near_baseline,
        "A short schedule: no time to make up for a slower start, as 200 epochs have.",
    ),
    Claim(
        "Figure 3",
        "Training with QU (3 bits) ends below MS, by up to about 4.7 points on CIFAR-10.",
        training.uniform_behind,
        "We guess: three short epochs give QU's larger error less time to tell; and QU's step follows the extremes, "
        "which are smaller in a client's 25 samples than in 256.",
    ),
    Claim("Figure 3", "Training with SP or RT ends below MS.", training.sparse_behind),
    Claim(
        "Figure 3",
        "VGG19 on CIFAR-10 ends at 93.8 % without compression and at 93.3 to 93.7 % with MS (to half a point).",
        training.published_end,
        "Even 30 of its 200 epochs would take 6 to 16 hours a run on two cores, by the machine.",
    ),
    Claim(
        "Table 1",
        "MS reaches the baseline's accuracy, with about 13 times less traffic.",
        training.reaches_baseline,
        "The learning rate of a short schedule ends at 0 when both are at their best: there are no further epochs in "
        "which to catch up. And the mark is one seed's accuracy, which an equal would miss half of the time.",
    ),
    Claim(
        "Table 1",
        "At the shallow cut QU, SP and RT never reach the baseline's accuracy, and MS does.",
        training.never_reach_baseline,
        "As in the row above: in so few epochs MS does not get there, either.",
    ),
    Claim("Error feedback", "It does not help feature maps.", None),
)
OPEN = (
    Claim(
        "Theorem 4",
        "Feature maps meet the theorem's condition for MS to have a smaller bound than QU, α < 1/2.",
        theory.condition,
        "α < 1/2 takes three quarters of the energy in the 1 % that MS keeps; real maps have about a fifth there. The "
        "bounds grow with √d and are far above both errors, so they do not say which is smaller.",
    ),
    Claim(
        "Activations",
        "MS loses no more (within 0.7 points) behind other activations than behind ReLU.",
        open_questions.other_activations,
        "Negative values become zeros, as a ReLU would make them; an activation whose negative values carry much loses "
        "more by it.",
    ),
    Claim(
        "Activations",
        "Where features have signs, a sign bit for each raises MS's accuracy.",
        open_questions.sign_bit,
        "With 2 bits a step is a third of the smallest kept value. Negative values of GELU, SiLU and leaky ReLU are "
        "below half of that, so codes are the same with a sign and without.",
    ),
    Claim(
        "Depth",
        "MS loses no more (within 0.7 points) in deeper networks of equal cost.",
        open_questions.deep_networks,
        "Mostly the width, we think: at equal cost the deepest has the fewest channels at the cut, and 20 layers as "
        "narrow lose much, too.",
    ),
    Claim(
        "Distributions",
        "The heavier the tail of the values, the larger MS's advantage over QU and the smaller over SP.",
        open_questions.tails,
    ),
    Claim(
        "Mask width",
        "2 bits are the best width: 1 bit loses, 3 bits gain less than 0.7 points.",
        open_questions.two_bits,
        "Training makes up for much of the error of 2 bits. Where nothing is trained, 3 bits help behind the first "
        "layers.",
    ),
    Claim(
        "Every cut",
        "The earlier the cut, the more it suffers from compression.",
        open_questions.early_cuts,
        "It holds where features alone are compressed. With everything compressed, averages of the client's part are, "
        "too, and this part grows with the cut.",
    ),
    Claim("Every cut", "Bits shared out among the cuts by sensitivity beat equal bits in training.", None),
    Claim(
        "Text and tables",
        "MS ends at most 0.7 points below no compression on a table and on texts.",
        open_questions.not_image_data,
    ),
    Claim(
        "Downlink gradient",
        "It can be compressed, too: 2 bits down cost at most 0.7 points.",
        open_questions.downlink,
    ),
    Claim(
        "Clients (our question)",
        "MS loses no more (within 0.7 points) with 1 or 50 clients, or unlike ones, than with 10.",
        open_questions.many_clients,
    ),
)
OWN = (
    Claim(
        "Both directions",
        "`EntropyMask` sends about 20 times less over the cut, both ways, for at most a point.",
        own.both_ways,
    ),
    Claim(
        "Everything",
        "With averages at 1 bit, too, everything sent is 10 times less at every cut, for at most a point.",
        own.ten_times_everything,
        "What keeps the clients equal grows with their part of the network; at late cuts it is most of the bytes.",
    ),
    Claim(
        "Everything, our goal",
        "Everything sent is 20 times less at every cut, for at most half a point.",
        own.twenty_times_everything,
    ),
    Claim(
        "Over the cut, our goal",
        "Features and gradients are 40 times less, for at most half a point.",
        own.forty_times_over_the_cut,
        "Accuracy seems to follow the bits of the features: at 40 times these have about 1.2, and would need the error "
        "of 1.6.",
    ),
    Claim(
        "Squared error",
        "`EntropyMask` needs fewer real bits than MS with Huffman coding for the same error.",
        own.fewer_real_bits,
    ),
    Claim(
        "Untrained, about 2.32 bits",
        "`EntropyMask` loses least, then MS, QU (3 bits) and SP; differences up to 0.3 points are ties.",
        own.untrained_at_equal_size,
        "Squared error alone does not rank codecs.",
    ),
    Claim(
        "Untrained, asked for about 1 bit",
        "`EntropyMask` (1 bit) loses less than SP (2.5 % kept), MS (1 bit) and QU (1 bit).",
        own.untrained_at_one_bit,
        "Squared error alone does not rank codecs.",
    ),
    Claim(
        "Untrained, equal real bits",
        "`EntropyMask` loses less than QU and MS at the same real bits, all coded losslessly.",
        own.untrained_at_equal_real_bits,
        "Lossless coding helps QU most: its levels reach to the largest value, so that most codes are 0. A smaller "
        "squared error is not all that the network answers to: see the next row.",
    ),
    Claim(
        "Untrained, about half a real bit",
        "Of two codecs at about the same bits, the one with the smaller squared error loses less.",
        own.least_bits,
        "Squared error alone does not rank codecs at low rates. In part, we think: `EntropyMask` decodes all small "
        "values to their mean, and so a ReLU's zeros to a positive value everywhere; this lowers the squared error, "
        "but shifts the map as the network has never met it. QU leaves zeros alone.",
    ),
    Claim(
        "Fine-tuning",
        "After two epochs of fine-tuning MS is at most 0.7 points below no compression.",
        own.fine_tuned,
    ),
    Claim(
        "As PyTorch",
        "msjax takes the steps of the method in plain PyTorch: their losses, and the weights after the first, are at "
        "most twice as far apart as PyTorch's with one thread and with two.",
        own.same_steps,
    ),
    Claim(
        "As PyTorch",
        "Whole trainings end as in plain PyTorch, within a point.",
        own.same_accuracy,
        "We know of no cause. Step by step both agree, see the row above, and a t-test of SP's three pairs finds no "
        "difference (p = 0.18).",
    ),
    Claim("Published weights", "Published networks have their published accuracy in msjax.", own.published_weights),
)
HEAD = """## At a glance

Each verdict is computed from the records. A claim **holds** or **does not** where the numbers say so beyond the noise,
holds **in part** where parts of it do and others do not, is **within noise** where the records cannot tell, and is
*not tested* where there are none. ± is that noise: twice the standard error of the difference of two means over seeds,
with a standard deviation that is no smaller than an arm's usual one, so that a single seed has an estimate, too. Losses
are in points of test accuracy. A verdict is about the scale beside it: “lite” trains a narrow network for a few epochs,
and is no test of figures at the published scale. Original images come first where there are records of them, “lossy” is
the copy of CIFAR-10 that was stored as JPEG, and SP, RT, QU and MS are the paper's codecs. Details are in the sections
below.
"""
LISTS = {"What the paper claims": PAPER, "What the paper leaves open, and what we found": OPEN, "What we claim": OWN}


def page(results: Results) -> str:
    """Returns the tables of all claims as Markdown."""
    return "\n".join([HEAD, *(f"### {title}\n\n{table(claims, results)}" for title, claims in LISTS.items())])


if __name__ == "__main__":
    print(page(Results()))
    sys.exit(0)
