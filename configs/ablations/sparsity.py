"""How sparse: activations with ever more zeros, each measured as it is and under masks from 50 % to 97 %.

  python experiments/run.py --config=configs/tiny_swiglu.py
  python experiments/sweep.py --config=configs/ablations/sparsity.py

Turbo Sparse raises sparsity by the activation (ReLU 67 %, dReLU 90 %; Table 1, section 5) and by top-k masks (Table 3,
Figure 5). shifted_relu (ReLU Strikes Back) and fatrelu (ProSparse) are zero below a threshold: the higher, the sparser.
"""

from configs.ablations import relufication

SWEEP = ("config.activation=relu,fatrelu:0.1,shifted_relu:0.5,drelu",)


def get_config():
  config = relufication.get_config("ablation_sparsity")
  config.analysis.levels = (0.0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97)
  return config
