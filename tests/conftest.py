"""Shared by all tests: the scripts can be imported, torch keeps to one thread, and one small data folder is made."""
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"                     # before torch is imported; child processes inherit it
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest                                           # noqa: E402
import torch                                            # noqa: E402

import synth                                            # noqa: E402

torch.set_num_threads(1)
SMALL = ["synth.documents=120", "synth.held_out_documents=20", "synth.shard_documents=30", "synth.workers=1"]


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """The settings of a data folder of the tiny world: four training shards of each recipe and one for dev. Read only."""
    settings = [*SMALL, f"data={tmp_path_factory.mktemp('small') / 'data'}"]
    synth.make_shards(synth.load_config(settings))
    return settings
