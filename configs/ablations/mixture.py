"""Which data a ReLUfication is trained on: prose, code, or both.

  python experiments/run.py --config=configs/tiny_swiglu.py
  python experiments/sweep.py --config=configs/ablations/mixture.py

The paper's 150B tokens are 85 % web and academic text, then books, code and mathematics (Table 4); it tells of no other
shares. Here the text is Python's own documentation and code; all runs are evaluated on the same held-out
text of both, and the report has the loss on each.
"""

from configs.ablations import relufication

SWEEP = ("config.data.mixture=stdlib_docs:1,'stdlib_docs:3,stdlib_code:1','stdlib_docs:1,stdlib_code:3',stdlib_code:1",)


def get_config():
  config = relufication.get_config("ablation_mixture")
  config.data.validation = "stdlib"
  return config
