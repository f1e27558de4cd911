"""Which activation: twins from random parameters that differ in their activation only (Turbo Sparse, section 3.2).

  python experiments/sweep.py --config=configs/ablations/activation.py

The paper has dReLU and SwiGLU, 300M parameters, 5B tokens: the same loss, and dReLU flat under masks up to 80 %
(Tables 2 and 3). ReLU is beside them here, the activation of the ReLUfications that it starts from (Table 1). With
--config.init=MODEL the same sweep ReLUfies MODEL to each of the three.
"""

from configs import tiny_drelu

SWEEP = ("config.activation=swiglu,relu,drelu",)


def get_config():
  config = tiny_drelu.get_config()
  config.name = "ablation_activation"
  return config
