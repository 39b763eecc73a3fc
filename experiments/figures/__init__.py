"""Figures and their captions: `scripts/make_figures.py` draws them.

`runs` has those that compare runs, `layers` those of one run, `choose` finds what each shows. They
need matplotlib, the captions do not.
"""

#: One sentence for each figure, by the name of its files.
CAPTIONS = {
    "pareto_top1": "Top-1 accuracy against the size of the packed file for each method; points are"
    " means over seeds, bars standard errors over seeds where there are several, the dashed line is"
    " the original.",
    "pareto_kl": "KL divergence of the outputs from the original's against the size of the packed"
    " file for each method; points are means over seeds, bars standard errors over seeds where"
    " there are several, and the scale is linear below its lowest power of ten.",
    "init": "KL divergence of the outputs from the original's against the size of the packed file,"
    " for each clustering method of the data-free initialisation and each encoding.",
    "cost": "Time and peak resident memory of the compression against the size of the packed file"
    " for each method; the memory is that of the whole process, the network and its evaluation"
    " included.",
    "layers": "Error and bytes of each layer of one run, in the order of the network.",
    "histogram": "Histogram of a layer's packed weights before and after learning; black lines are"
    " the codewords of the packed files.",
    "reorder": "Magnitudes of a layer's packed weights with its neurons in their original order and"
    " re-ordered, where white lines separate the groups that share a scale or codebook.",
    "learning": "Training loss of each layer in the course of its learning.",
    "mapping_gradient": "What the gradient of a codeword's logit is multiplied by where the loss"
    " asks for a larger weight, against the codeword's distance (Figure 1 of the paper, measured on"
    " the implementation): the chain rule pulls most towards far codewords, Eq. 8 with its sign"
    " corrected towards near ones.",
}
