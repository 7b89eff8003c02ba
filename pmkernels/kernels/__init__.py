"""The Triton kernels, one file per family; needs triton. Read ``assembly`` first: it alone knows what a tile of W is.

``rows`` says where the rows of a tensor lie, ``linear`` computes y and dx, ``weight_grad`` the gradients that are
reductions of dW, ``low_rank`` everything about x·B and dy·A, ``merge`` writes W(γ) out, ``entropy`` is softmax_entropy.
Each file has its kernels first, then the launchers: plain functions that allocate, choose a configuration and launch.
"""
