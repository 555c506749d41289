"""A ClientApp of parties that host experts, on tiny rows; for nodes in this process or in processes of their own."""

import torch
from flwr.clientapp import ClientApp

from tests.tiny_app import rows, state_dir
from vflair_flower.clients import ExpertParty

torch.set_num_threads(1)
app = ClientApp()
ExpertParty(rows, state_dir=state_dir).register(app)
