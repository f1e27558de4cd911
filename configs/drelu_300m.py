"""The paper's 300M model (Turbo Sparse, appendix A.1, Tables 2-3, 11-12): dReLU, or SwiGLU by `drelu_300m.py:swiglu`.

  python experiments/run.py --config=configs/drelu_300m.py \\
    --config.data.train=FINEWEB_FOLDER --config.data.vocabulary=llama2.model

The same with `:swiglu`, then analyze.py on both workdirs with --data=WIKITEXT2 --paper, writes Tables 1-3 with the
paper's numbers beside. On 2 cores: configs/drelu_small.py.

The paper: fineweb, 5B tokens = 19,073 steps of 128 x 2048, AdamW (0.9, 0.95), weight decay 0.01, cosine from 1e-4,
2000 warm-up steps, 4 x A100-80G; training loss 3.154 (dReLU) and 3.146 (SwiGLU). It does not print d_ff, the clipping
norm and the final learning rate: 2752 (8/3 of d_model, which makes the model 300M), 1.0 and a tenth of the peak are
taken here. Not run yet; it needs about 4 accelerators of 80 GB.
"""

from configs import default


def get_config(activation="drelu"):
  config = default.get_config("drelu_300m" if activation == "drelu" else f"drelu_300m_{activation}", preset="300m")
  config.activation = activation
  config.smaller = "configs/tiny_drelu.py"
  config.data.train = ""  # a folder of fineweb, as .parquet or .jsonl
  config.data.vocabulary = ""  # the Llama-2 SentencePiece model
  config.train.steps = 19_073
  config.train.batch_size = 128
  config.train.seq_len = 2048
  config.train.learning_rate = 1e-4
  config.train.warmup_steps = 2000
  config.train.checkpoint_every = 1000
  config.train.eval_every = 1000
  config.analysis.tokens = 262_144
  return config
