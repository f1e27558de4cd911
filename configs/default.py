"""Every knob, with its default: the other configs start from here. Override any by --config.FIELD=VALUE."""

import dataclasses

from ml_collections import ConfigDict

from tsparse.models.config import PRESETS


def get_config(name: str = "default", preset: str = "tiny") -> ConfigDict:
  model = dataclasses.asdict(PRESETS[preset])
  config = ConfigDict()
  config.name = name  # names the default workdir, runs/NAME
  config.seed = 0  # of the initial parameters (factors of lora too) and of the order of the data
  config.init = ""  # a workdir to start from (its activation is swapped to ours), or "" for random parameters
  config.activation = model.pop("activation")  # a name of tsparse/activations.py: swiglu, relu, drelu, fatrelu:0.01 ...
  config.wandb = ""  # a project of Weights & Biases that gets the metrics too (pip install -r requirements-wandb.txt)
  config.smaller = ""  # the config to suggest where this one does not fit

  config.model = ConfigDict(model)  # fields: tsparse/models/config.py

  config.data = ConfigDict()
  config.data.train = (
    "stdlib"  # a file or folder of text, chat:FILE, or the name of a task or mixture (data/mixtures.py)
  )
  config.data.validation = ""  # the same, or "" for the held-out split of `train`
  config.data.allow_overlap = 0.01  # share of the held-out documents that may be trained on too; more is an error
  config.data.mixture = ""  # "name:weight,name:weight" in place of `train`: shares of the tokens of such names
  config.data.root = ""  # folder or bucket (gs://...) with the sources of a mixture
  config.data.allow_missing = False  # sources of a mixture that are not there are left out, the weights renormalised
  config.data.text_field = "text"  # of the lines of .jsonl and the columns of .parquet files
  config.data.skip_bad = 0  # so many malformed lines are left out and counted; one more is an error
  config.data.cache = ""  # folder for what is unpacked and indexed, or "" for $TSPARSE_CACHE or ~/.cache/tsparse
  config.data.cached = ""  # folder that seqio_cache_tasks wrote: its tokens are trained on (docs/data.md), or ""
  # independent readers of a batch, or the largest number below that divides it: no more hosts than lanes read their own
  config.data.lanes = 8
  config.data.vocabulary = "bytes"  # or a SentencePiece .model, a tokenizer.json, or a folder with one
  config.data.bos = "auto"  # on or off: documents begin with its BOS; auto: as the model started from, or the tokenizer
  config.data.eos = True  # documents end with its end-of-text token, to be predicted like the others

  config.train = ConfigDict()
  config.train.steps = 1000
  config.train.batch_size = 16  # rows of one step, over all devices
  config.train.seq_len = 256  # tokens of a row
  config.train.microbatches = 1  # a step adds up the gradients of so many pieces of the batch
  config.train.optimizer = "adamw"  # or muon, for the matrices of the layers (tsparse/train/optimizer.py)
  config.train.learning_rate = 1e-3  # peak; linear warm-up, then cosine
  config.train.final_learning_rate_fraction = 0.1  # of the peak, at the last step
  config.train.warmup_steps = 50  # or, of fewer steps, all but the last
  config.train.b1 = 0.9
  config.train.b2 = 0.95
  config.train.weight_decay = 0.01  # not on norm scales
  config.train.clip_norm = 1.0  # global norm of the gradient
  config.train.z_loss = 0.0  # weight of (log Z)^2; PaLM used 1e-4
  # of a model with experts (tsparse/models/router.py); each loss is logged under its name, as it is added to the loss
  config.train.router_z_loss = 0.0  # weight of logsumexp(router logits)^2; ST-MoE used 1e-3
  config.train.router_balance_loss = 0.0  # weight of E sum_e f_e P_e of the whole batch; Switch used 1e-2.
  # With several microbatches f_e takes a forward pass of the layers over all of them before the first backward pass.
  config.train.router_jitter = 0.0  # what routers read is multiplied by noise in 1 +- it; Switch used 1e-2
  config.train.rules = ""  # what is trained, "REGEX=NUMBER; REGEX=lora:R" (tsparse/recipes/trained.py); "" is all
  # distillation (tsparse/recipes/distill.py): loss = (1 - weight) cross-entropy + weight T^2 KL(teacher || model)
  config.train.distill_weight = 0.0
  config.train.distill_temperature = 1.0  # T
  config.train.distill_top_k = 0  # of the teacher's tokens are told apart; 0 is all
  config.train.distill_teacher = ""  # a model of the same vocabulary; "" is what training starts from, as it was
  config.train.match_until = 0.0  # share of the steps that first fit each FFN to the teacher's (recipes/match.py)
  config.train.log_every = 10  # steps between lines of metrics.jsonl
  config.train.checkpoint_every = 200  # steps; the last step always is one
  config.train.keep_checkpoints = 2  # the last ones
  config.train.keep_every = 0  # steps; checkpoints at its multiples are kept for good beside the last ones; 0: none
  config.train.eval_every = 200  # steps between losses on held-out text
  config.train.eval_batches = 4  # batches of config.analysis.batch_size rows it is measured on

  config.sparsity = ConfigDict()  # recipes that make zeros: tsparse/recipes, configs/ablations/recipes.py
  config.sparsity.start = ""  # before the first step: "signs,refit" (tsparse/recipes/start.py)
  config.sparsity.swap_until = 0.0  # share of the steps in which swiglu becomes the activation gradually
  config.sparsity.penalty = "l1"  # on the FFN hidden: l1 or log (tsparse/recipes/penalties.py)
  config.sparsity.penalty_scale = 0.1  # of log: entries well above it are left alone
  config.sparsity.penalty_weight = 0.0  # lambda, constant; with a target that at the start (0: 1e-3)
  config.sparsity.stages = ""  # lambda by ProSparse's schedule, "0.1:0,0.5:0.003": reached at these shares of the steps
  config.sparsity.target = 0.0  # share of zeros asked for: a controller moves lambda; 0 asks for none
  config.sparsity.moves = "penalty"  # or "thresholds": a target moves those of the hidden, with hidden_thresholds
  config.sparsity.target_by = 0.7  # share of the steps at which it is to be reached
  config.sparsity.per_layer = False  # each layer has the target, and a lambda of its own
  # of the hidden at the start, with config.model.hidden_thresholds: above 0 where it is learned, as it then stays (at
  # least 1e-4); a target that moves thresholds starts them at 1e-4 or here
  config.sparsity.threshold = 0.0
  config.sparsity.calibrate = 0.0  # share of zeros that thresholds are to give the trained model, in WORKDIR/calibrated
  config.sparsity.dead_after = 0  # steps without firing after which a neuron is dead, which is told; 0 for no watch
  config.sparsity.revive_every = 0  # steps between times at which dead neurons are made anew; 0 never

  config.phases = ConfigDict()  # what is trained after this, with other data or settings: tsparse/stages.py
  config.phases.order = ""  # names of phases that the config states as config.phases.NAME, "one,two"

  config.mesh = ConfigDict()  # the product is the number of devices; -1 takes what the others leave
  config.mesh.data = 1  # rows are split, parameters are copied
  config.mesh.fsdp = -1  # rows and parameters are split
  config.mesh.tensor = 1  # heads, neurons and vocabulary are split
  config.mesh.expert = 1  # rows and experts are split

  config.analysis = ConfigDict()
  config.analysis.levels = (0.0, 0.5, 0.8, 0.85, 0.9)  # sparsities of the masked-perplexity curve (paper, Table 3)
  config.analysis.thresholds = False  # CATS, TEAL and the other thresholds without training, of the control
  config.analysis.tokens = 65_536  # held-out tokens
  config.analysis.batch_size = 16  # rows of one forward pass
  config.analysis.minutes = 10.0  # less of the text is evaluated where all would take longer; 0 is no limit
  return config
