"""Flower's client side of split learning: parties ready to use, and a way into sessions for one's own code."""

from vflair_flower.clients.auditor import Auditor
from vflair_flower.clients.data_party import DataParty, PartyRows
from vflair_flower.clients.expert_party import ExpertParty, ExpertSession, expert_session
from vflair_flower.clients.generation import TextGeneration
from vflair_flower.clients.model_party import ModelParty
from vflair_flower.clients.naming import party_name, role_of
from vflair_flower.clients.session import PartySession, split_session

__all__ = [
    "Auditor",
    "DataParty",
    "ExpertParty",
    "ExpertSession",
    "ModelParty",
    "PartyRows",
    "PartySession",
    "TextGeneration",
    "expert_session",
    "party_name",
    "role_of",
    "split_session",
]
