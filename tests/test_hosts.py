"""Two processes with 4 virtual devices each, on loopback, against one with 8."""

import json
import shutil
import socket

import numpy as np
import pytest

from tests import commands
from tests.conftest import ENVIRONMENT
from tests.train.test_alive import losses
from tsparse import hosts
from tsparse.data import DataSettings, accounts_at, train_iterator
from tsparse.data.accounting import unpack
from tsparse.errors import UserError

ARGUMENTS = [
  "--config=configs/tiny_drelu.py", "--config.model.num_layers=1", "--config.model.d_model=32",
  "--config.model.d_ff=64", "--config.model.head_dim=8", "--config.train.seq_len=32", "--config.train.batch_size=8",
  "--config.train.warmup_steps=2", "--config.train.steps=4", "--config.train.log_every=1",
  "--config.train.checkpoint_every=2", "--config.train.eval_every=2", "--config.train.eval_batches=1",
  "--config.mesh.data=2", "--config.analysis.tokens=500", "--config.analysis.batch_size=8",
  "--config.analysis.levels=()",
]  # fmt: skip


READER = """
import json, sys
from tsparse import hosts, sharding
from tsparse.data import DataSettings, merge_positions, train_iterator
from tsparse.data.sources import Documents

text, port, host = sys.argv[1:]
hosts.start(f"127.0.0.1:{port}", 2, int(host))
read, original = [], Documents.read_all
Documents.read_all = lambda self, indices: read.extend(map(int, indices)) or original(self, indices)
mesh = sharding.make_mesh({"data": 2, "fsdp": -1, "tensor": 1, "expert": 1})
every = sharding.local_rows(sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 8, "expert": 1}), 16)
rows = sharding.local_rows(mesh, 16)
data = train_iterator(DataSettings(train=text), seq_len=32, batch_size=16, seed=0, rows=rows)
for _ in range(3):
  next(data)
position = merge_positions(hosts.gather(data.state()))
print(json.dumps([rows, every, data.lanes, read, position.hex()]))
"""


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def run(text, workdir, processes):
  """The experiment over 8 devices; returns the completed processes, the first host's first."""
  port = free_port()
  flag = f"--xla_force_host_platform_device_count={8 // processes} --xla_cpu_multi_thread_eigen=false"
  started = []
  for host in range(processes):
    job = [f"--coordinator=127.0.0.1:{port}", f"--num_hosts={processes}", f"--host_id={host}"] * (processes > 1)
    arguments = [*ARGUMENTS, f"--config.data.train={text}", f"--workdir={workdir}", *job]
    started.append(commands.Command("experiments/run.py", *arguments, env=ENVIRONMENT | {"XLA_FLAGS": flag}))
  return outputs(started)


def outputs(started):
  try:
    done = [command.wait(400) for command in started]
  finally:
    for command in started:
      command.kill()
  assert [command.returncode for command in done] == [0] * len(done), done
  return [command.stdout for command in done]


def test_two_hosts_train_as_one_and_go_on_with_each_others_checkpoints(tmp_path):
  text = tmp_path / "text.jsonl"
  text.write_text("".join(json.dumps({"text": f"{i} is followed by {i + 1}."}) + "\n" for i in range(400)))
  one, two = tmp_path / "one", tmp_path / "two"
  run(text, one, 1)
  first, second = run(text, two, 2)
  assert "report" in first
  assert "loss" in first and "loss" not in second  # one host speaks; the rest is of the library that connects them
  assert list(losses(one)) == [1, 2, 3, 4]

  for start, processes in ((one, 2), (two, 1)):
    workdir = shutil.copytree(start, tmp_path / f"again_{processes}")
    shutil.rmtree(workdir / "checkpoints" / "4")
    assert "resumed at step 2 of 4" in run(text, workdir, processes)[0]
  for workdir in (two, tmp_path / "again_1", tmp_path / "again_2"):
    assert list(losses(workdir)) == list(losses(one))
    np.testing.assert_allclose(list(losses(workdir).values()), list(losses(one).values()), rtol=1e-6)
    held_out = [
      json.loads((each / "report" / "analysis.json").read_text())["models"][0]["loss"] for each in (one, workdir)
    ]
    np.testing.assert_allclose(*held_out, rtol=1e-6)


def test_each_host_reads_only_the_lanes_of_its_own_rows(tmp_path):
  text = tmp_path / "text.jsonl"
  text.write_text("".join(json.dumps({"text": f"{i} is followed by {i + 1}."}) + "\n" for i in range(5000)))
  # 8 lanes read 2 times streams.AHEAD documents ahead: of one epoch, for the next deals them anew
  flag, port = "--xla_force_host_platform_device_count=4", free_port()
  (reader := tmp_path / "reader.py").write_text(READER)
  env = ENVIRONMENT | {"XLA_FLAGS": flag}
  started = [commands.Command(reader, text, port, host, env=env) for host in range(2)]
  found = [json.loads(out.splitlines()[-1]) for out in outputs(started)]
  assert [rows for rows, *_ in found] == [list(range(8)), list(range(8, 16))]
  assert [every for _, every, *_ in found] == [list(range(16))] * 2  # where a row is split over hosts, each has it
  assert [lanes for _, _, lanes, *_ in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
  reads = [set(read) for *_, read, _ in found]
  assert all(reads) and not reads[0] & reads[1]
  alone = train_iterator(DataSettings(train=str(text)), seq_len=32, batch_size=16, seed=0)
  for _ in range(3):
    next(alone)
  for *_, position in found:  # each has that of all lanes
    assert accounts_at(bytes.fromhex(position)) == accounts_at(alone.state())
    assert unpack(bytes.fromhex(position))["lanes"] == unpack(alone.state())["lanes"]


@pytest.mark.parametrize(
  ("given", "sentence"),
  [
    (("a:1", 2, None), "--host_id must be given too"),
    (("a", 2, 0), "not HOST:PORT"),
    (("a:1", 2, 2), "--host_id=2 with --num_hosts=2"),
  ],
)
def test_hosts_that_make_no_sense_are_refused(given, sentence):
  with pytest.raises(UserError, match=sentence):
    hosts.start(*given)
